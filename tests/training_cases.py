"""Runs of the trainer for tests: small configurations, comparison to the bit, and processes that can be killed.

As a script this is a nursery: it imports the library once, then forks a process for each run that a test asks for, a
line of JSON a run. Several ranks are started as torchrun starts them, by its agent. With arguments it is the command
`sdesens`, killed at a file operation: `python training_cases.py K train ...` ends before the K-th fsync or rename.
"""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

from sdesens.cli import main
from sdesens.training.checkpoint import Snapshot, load_checkpoint
from sdesens.training.config import TrainConfig, recipe
from sdesens.training.data import Data, load_data
from sdesens.training.ranks import Ranks
from sdesens.training.run import open_run
from sdesens.training.samples import draw_samples
from sdesens.training.trainer import Trainer

CPU = Ranks(0, 1, torch.device("cpu"))
KILLED = "-- killed --"
PARTS = ("weights", "EMA", "optimiser", "rest")


def small(data: str | Path, **changes) -> TrainConfig:
    """A configuration that trains in a second."""
    usual = {"steps": 24, "batch": 33, "width": 8, "depth": 1, "warmup": 5, "log_every": 3, "checkpoint_every": 5}
    return recipe(str(data), **{**usual, "keep_last": 1, "picture_every": 0, **changes})


def write_table(file: Path, rows: int, event: tuple[int, ...] = (2,), classes: int = 3) -> Path:
    """Labelled rows, an npz file."""
    source = np.random.default_rng(rows)
    labels = np.arange(rows) % classes
    np.savez(file, x=source.normal(size=(rows, *event)) + labels.reshape(-1, *[1] * len(event)), labels=labels)
    return file


def bits(x):
    """What distinguishes two nested values, tensors by their bytes."""
    if isinstance(x, torch.Tensor):
        return x.dtype, tuple(x.shape), x.detach().contiguous().numpy().tobytes()
    if isinstance(x, dict):
        return {k: bits(v) for k, v in x.items()}
    return [bits(v) for v in x] if isinstance(x, (list, tuple)) else x


def parts(s: Snapshot) -> dict[str, object]:
    """A snapshot in four parts, to be compared to the bit."""
    rest = {k: v for k, v in s.state.items() if k != "optimiser"} | {"at": s.step, "score": s.score}
    return dict(zip(PARTS, map(bits, (s.model, s.ema, s.state["optimiser"], rest)), strict=True))


def equal_parts(a: Snapshot, b: Snapshot) -> dict[str, bool]:
    """Which parts of two snapshots are the same bits."""
    return {k: v == parts(b)[k] for k, v in parts(a).items()}


def frozen(trainer: Trainer) -> Snapshot:
    """A copy of a trainer's state that shares no memory with it, as a checkpoint makes it."""
    buffer = io.BytesIO()
    torch.save(vars(trainer.snapshot(0.0)), buffer)
    buffer.seek(0)
    return Snapshot(**torch.load(buffer, weights_only=True))


def trained(config: TrainConfig, data: Data, last: int, start: Snapshot | None = None) -> list[Snapshot]:
    """Snapshots from the start, a new trainer's own if there is none given, to step `last`, by a new trainer."""
    trainer = Trainer(config, data, CPU)
    if start is not None:
        trainer.restore(start)
    found = [frozen(trainer)]
    for step in trainer.steps() if trainer.step < last else ():
        found.append(frozen(trainer))
        if step == last:
            break  # as an interrupt does: the generator is dropped amid the run
    return found


class Results(NamedTuple):
    """What a run has made: the last checkpoint, the log, and samples of the averaged weights."""

    last: Snapshot
    log: bytes
    samples: bytes

    def equal(self, other: "Results") -> dict[str, bool]:
        """Which of them are the same bits."""
        return {
            **equal_parts(self.last, other.last),
            "log": self.log == other.log,
            "samples": self.samples == other.samples,
        }


def results(path: Path) -> Results:
    """What the run at `path` has made; the checkpoint of its last step must be there."""
    run = open_run(path)
    last = load_checkpoint(run.checkpoints / f"step-{run.config.steps:08d}")
    x = draw_samples(run.denoiser(), run.form, 50, steps=5).x
    return Results(last, (path / "log.jsonl").read_bytes(), x.numpy().tobytes())


def losses(path: Path) -> torch.Tensor:
    """The losses in a run's log, float64."""
    rows = map(json.loads, (path / "log.jsonl").read_text().splitlines())
    return torch.tensor([row["loss"] for row in rows if "loss" in row], dtype=torch.float64)


def argv(config: TrainConfig, out: Path) -> list[str]:
    """The command that trains a configuration."""
    options = {k: v for k, v in config.to_json().items() if k != "data"}
    words = ["train", config.data, "--out", str(out), "--device", "cpu", "--no-report", "--no-tensorboard", "--quiet"]
    for name, value in options.items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


class Outcome(NamedTuple):
    """How a process ended: its exit status, minus the signal if it was killed; what it said; how long it took."""

    status: int
    words: str
    seconds: float

    @property
    def killed(self) -> bool:
        """Whether it ended by a kill that was asked for, whatever its other ranks said of it."""
        return self.status != 0 and KILLED in self.words


class Nursery:
    """Runs the command `sdesens` in processes of its own."""

    def __init__(self, process: subprocess.Popen):
        self.process = process

    def run(
        self,
        words: list[str],
        *,
        ranks: int = 1,
        delay: float | None = None,
        victim: int | None = None,
        call: int = 0,
        careless: bool = False,
    ) -> Outcome:
        """Run a command.

        Parameters
        ----------
        words : list of str
        ranks : int
            More than one are started as torchrun does.
        delay, victim : float, int, optional
            Seconds after which the `victim` rank is killed; all processes at once if none is named.
        call : int
            The fsync or rename before which the first rank kills itself; 0 for none.
        careless : bool
            Leave out the passes that settle the order of sums, a negative control.
        """
        job = {"words": words, "ranks": ranks, "delay": delay, "victim": victim, "call": call, "careless": careless}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return Outcome(*json.loads(self.process.stdout.readline()))

    def run_to_the_end(self, words: list[str], **options) -> Outcome:
        """Run a command that is to succeed."""
        end = self.run(words, **options)
        assert end.status == 0, end.words
        return end


def killed(children: Nursery, folder: Path, config: TrainConfig, kills: list[dict], *, ranks: int = 1) -> list[dict]:
    """Kill a run again and again, giving the same command; compare whatever gets to its end with a run left alone.

    Parameters
    ----------
    folder : Path
        Gets the run that is left alone, "whole", and the others.
    kills : list of dict
        `call` or `delay`, and `victim`, as `Nursery.run` takes them; a delay is a share of the time of a whole run.

    Returns
    -------
    list of dict
        For each run that got to its end, which results are the same bits; one at least.
    """
    whole = children.run_to_the_end(argv(config, folder / "whole"), ranks=ranks)
    straight, found, hits = results(folder / "whole"), [], 0
    for kill in [*kills, {}]:
        path = folder / str(len(found))  # a new one if the last kill came too late
        how = {**kill, "delay": kill["delay"] * whole.seconds} if "delay" in kill else kill
        end = children.run(argv(config, path), ranks=ranks, **how)
        hits += end.killed
        if not end.killed:
            assert end.status == 0, end.words
            found.append(results(path).equal(straight))
    assert hits > len(kills) / 2  # not vacuous
    return found


@contextmanager
def nursery() -> Iterator[Nursery]:
    """A nursery, to the end of the block."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # no thread pool: forks are safe
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Nursery(process)
        process.stdin.close()


# In the nursery


def _serve() -> None:
    Trainer(small("gmm8"), load_data("gmm8"), CPU)  # torch imports more when the first optimiser is made
    for line in sys.stdin:
        print(json.dumps(_job(**json.loads(line))), flush=True)


def _job(words, ranks, delay, victim, call, careless) -> Outcome:
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        pid = os.fork()
        if pid == 0:
            _child(output.fileno(), words, ranks, call, careless)
        killed = _await(pid, began + delay if delay is not None else float("inf"), victim)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        return Outcome(status, output.read() + KILLED * killed, time.monotonic() - began)


def _await(pid: int, moment: float, victim: int | None) -> bool:
    """Wait for the process to end, or for the moment to kill it or a child of it; whether the latter came first."""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() >= moment:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if victim is None:
                os.killpg(pid, signal.SIGKILL)
            elif victim < len(children):
                os.kill(int(children[victim]), signal.SIGKILL)
            else:
                continue  # not born yet
            return True
        time.sleep(0.001)
    return False


def _child(output: int, words: list[str], ranks: int, call: int, careless: bool) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        with mock.patch.object(Ranks, "wrap", _unsettled) if careless else nullcontext():
            if ranks == 1:
                status = command(words, call)
            else:
                agent = LaunchConfig(
                    1, 1, ranks, run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork"
                )  # fmt: skip
                elastic_launch(agent, _rank)(words, call)
                status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _unsettled(ranks: Ranks, net, dry_pass):
    """What `Ranks.wrap` must not be: the first two steps of a process then do other sums than the later ones."""
    return DistributedDataParallel(net)


def _rank(words: list[str], call: int) -> None:
    signal.signal(
        signal.SIGTERM, signal.SIG_DFL
    )  # not the agent's handler, which a fork inherits and torchrun's do not
    if status := command(words, call):
        raise RuntimeError(f"exit status {status}")
    run = open_run(Path(words[words.index("--out") + 1]))
    load_checkpoint(run.checkpoints / f"step-{run.config.steps:08d}")  # no rank leaves before it is there


def command(words: list[str], call: int = 0) -> int:
    """The command `sdesens`; its exit status. Before the `call`-th fsync or rename of the first rank that is killed."""
    done = 0

    def deadly(function):
        def counted(*args):
            nonlocal done
            done += 1
            if done == call and os.environ.get("RANK", "0") == "0":
                print(KILLED, file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return counted

    with mock.patch.multiple(os, fsync=deadly(os.fsync), replace=deadly(os.replace)):
        sys.argv = ["sdesens", *words]
        try:
            main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def threads() -> list[str]:
    """The names of this process's threads."""
    return [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        end = command(sys.argv[2:], int(sys.argv[1]))
        print("threads at the end:", *threads(), file=sys.stderr)
        sys.exit(end)
    _serve()
