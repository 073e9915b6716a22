"""Kills of training, and whether the same command goes on to the same bits: `python benchmarks/resume.py`.

    python benchmarks/resume.py [--kills 20] [--seed 0] [--steps 1000] [--keep DIR]

Trains the eight Gaussians by the commands `sdesens train ...` and `torchrun --nproc-per-node 2 -m sdesens train ...`, once
left alone and then killed (SIGKILL) again and again, each time giving the same command. Every other kill comes before a
random fsync or rename of a process's first checkpoints, the others at random moments of the training; of two ranks both
with torchrun are killed, or one alone. A run that gets to its end before the kills are used up is followed by a new one.
All runs are compared with the one left alone: the bytes of weights, averaged weights, optimiser, log and samples.
Exit status 1 if any differ.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from training_cases import KILLED, PARTS, argv, results  # noqa: E402

from sdesens.training.config import TrainConfig, recipe  # noqa: E402

COMPARED = (*PARTS, "log", "samples")
CALLS = (3, 26)  # file operations of a process that goes on: first 2 of the log, then about 10 a checkpoint
LONGEST = 0.3  # of the time of a run, to the moment of a random kill: so that a run takes several


@dataclass(frozen=True)
class Kill:
    """One kill: before a file operation of the first rank, or after a share of the time that a run trains for."""

    call: int = 0
    moment: float = 0.0
    victim: int | None = None  # a rank; None: all processes


def plan(kills: int, ranks: int, seed: int) -> Iterator[Kill]:
    """The kills of a run, a function of the seed."""
    chance = random.Random(seed)
    for i in range(kills):
        if i % 2 == 0:
            yield Kill(call=chance.randint(*CALLS))
        else:
            alone = ranks > 1 and i % 4 == 3
            yield Kill(moment=chance.uniform(0, LONGEST), victim=chance.randrange(ranks) if alone else None)


def start(words: list[str], ranks: int, call: int, errors) -> subprocess.Popen:
    """The command as a user gives it, or one that is killed before a file operation."""
    program = [str(TESTS / "training_cases.py"), str(call)] if call else ["-m", "sdesens"]
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *launcher, *program, *words], stderr=errors, env=environment)


def children(pid: int) -> list[int]:
    """The processes that one has started: torchrun's ranks."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_training(process: subprocess.Popen, log: Path, before: int) -> None:
    """Until a process has begun: it then writes the log anew."""
    while process.poll() is None and inode(log) == before:
        time.sleep(0.01)


def inode(file: Path) -> int:
    """Which file it is; 0 if there is none."""
    return file.stat().st_ino if file.exists() else 0


def attempt(words: list[str], path: Path, ranks: int, kill: Kill | None, seconds: float) -> tuple[bool, float]:
    """Give the command once; whether it was killed, and how long it trained."""
    before = inode(path / "log.jsonl")
    with tempfile.TemporaryFile("w+") as errors:
        process = start(words, ranks, kill.call if kill else 0, errors)
        wait_for_training(process, path / "log.jsonl", before)
        began, sent = time.monotonic(), False
        while process.poll() is None:
            if kill and kill.moment and time.monotonic() - began > kill.moment * seconds:
                found = children(process.pid) if ranks > 1 else []
                for pid in [process.pid, *found] if kill.victim is None else [found[kill.victim]]:
                    os.kill(pid, signal.SIGKILL)
                sent = True
                process.wait()
            time.sleep(0.01)
        errors.seek(0)
        said = errors.read()
        killed = process.returncode != 0 and (sent or KILLED in said)
        if process.returncode != 0 and not killed:
            raise SystemExit(f"{' '.join(words)} failed: {said}")
        return killed, time.monotonic() - began


def torn(path: Path) -> bool:
    """Whether a kill has left something half-done among the checkpoints: names that do not count, or stand in."""
    folder = path / "checkpoints"
    return folder.is_dir() and any(p.name.startswith(".") or p.suffix == ".new" for p in folder.iterdir())


def measure(config: TrainConfig, folder: Path, ranks: int, kills: int, seed: int) -> Counter:
    """Kill runs as planned; how many kills there were, of which kinds, and how many results were the same bits."""
    _, seconds = attempt(argv(config, folder / "alone"), folder / "alone", ranks, None, 0.0)
    straight, found = results(folder / "alone"), Counter()
    queue: list[Kill | None] = [*plan(kills, ranks, seed), None]
    while queue:
        kill, path = queue[0], folder / str(found["runs"])
        killed, _ = attempt(argv(config, path), path, ranks, kill, seconds)
        if not killed:  # a kill that came too late is tried again
            found["runs"] += 1
            found.update(k for k, same in results(path).equal(straight).items() if same)
        if killed or kill is None:
            queue.pop(0)
        if killed and kill:
            half = torn(path)
            found.update(kills=1, calls=kill.call > 0, torn=half, alone=kill.victim is not None)
            print(f"{ranks} ranks: {kill}{', amid a checkpoint' if half else ''}", file=sys.stderr, flush=True)
    return found


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--keep", type=Path, help="leave the runs in this folder")
    given = parser.parse_args()
    config = recipe("gmm8", steps=given.steps, checkpoint_every=50, log_every=7, picture_every=0)
    title = f"{given.steps} steps of {config.batch} items, a checkpoint every {config.checkpoint_every}: the same bits in ... of the runs"
    table = Table(
        "ranks", "kills", "at a file operation", "amid a checkpoint", "one rank alone", *COMPARED, "", title=title
    )
    ok = True
    with tempfile.TemporaryDirectory() as scratch:
        for ranks in (1, 2):
            folder = (given.keep or Path(scratch)) / str(ranks)
            n = measure(config, folder, ranks, given.kills, given.seed)
            holds = n["kills"] == given.kills and all(n[k] == n["runs"] for k in COMPARED)
            ok &= holds
            counts = (n[k] for k in ("kills", "calls", "torn", "alone"))
            same = (f"{n[k]} of {n['runs']}" for k in COMPARED)
            table.add_row(str(ranks), *map(str, counts), *same, "ok" if holds else "FAILED")
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
