"""A run: the directory that training writes, sampling reads, and an interrupted training goes on from.

RUN/run.json            the configuration and the form of the data, written before the first step
RUN/checkpoints/        see `checkpoint.py`
RUN/log.jsonl           see `log.py`; RUN/tensorboard/ beside it
RUN/pictures/           samples during training
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sdesens.diffusion.predict import Denoiser
from sdesens.errors import ArgumentError, CheckpointError
from sdesens.training.checkpoint import load_best, load_latest
from sdesens.training.config import TrainConfig
from sdesens.training.data import Form
from sdesens.training.files import PART, whole_file
from sdesens.training.model import make_denoiser, network_of
from sdesens.training.ranks import choose_device

FILE, LOCK = "run.json", ".lock"


@dataclass(frozen=True, eq=False)
class Run:
    """A trained model, or one in training.

    Attributes
    ----------
    path : Path
    config : TrainConfig
    form : Form
        Of the data.
    steered : dict or None
        How the model was steered, if it was; such a run is not trained on.
    """

    path: Path
    config: TrainConfig
    form: Form
    steered: dict | None = None

    @property
    def meta(self) -> dict:
        """The configuration and the form of the data, for JSON."""
        return {"config": self.config.to_json(), "form": self.form.to_json()}

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    def denoiser(
        self, *, which: Literal["last", "best"] = "last", averaged: bool = True, device: str | torch.device = "cpu"
    ) -> Denoiser:
        """The network of the last checkpoint, or of the one with the least held-out loss, in eval mode and without gradients.

        Raises
        ------
        ArgumentError, CheckpointError
            For another word; if there is no valid checkpoint, or only of another configuration.
        """
        if which not in ("last", "best"):
            raise ArgumentError(f"`which` must be 'last' or 'best', got {which!r}.")
        snapshot = (load_latest if which == "last" else load_best)(self.checkpoints)
        if snapshot is None:
            raise CheckpointError(f"{str(self.path)!r} has no checkpoint yet: let `sdesens train` write one.")
        self.check(snapshot.meta)
        device, net = choose_device(str(device)), network_of(self.config, self.form)
        net.load_state_dict(snapshot.ema if averaged else snapshot.model)
        return make_denoiser(self.config, self.form, net.to(device).eval().requires_grad_(False))

    def check(self, meta: dict) -> None:
        """Raise CheckpointError unless a checkpoint's description is this run's."""
        there = Run(self.path, TrainConfig.from_json(meta["config"]), Form.from_json(meta["form"]), self.steered)
        if differences := self.differences(there):
            raise CheckpointError(
                f"{str(self.checkpoints)!r} holds checkpoints of another run ({'; '.join(differences)}): move them away."
            )

    def differences(self, other: "Run") -> list[str]:
        """What differs in a way that changes the numbers, in words."""
        here, there = self.form.to_json(), other.form.to_json()
        form = [f"the data's {k} = {v!r} here, {there[k]!r} there" for k, v in here.items() if v != there[k]]
        if (self.steered is None) != (other.steered is None):
            return ["the one there was " + ("trained" if self.steered else "steered")]
        mine, theirs = self.steered or {}, other.steered or {}
        steered = [f"{k} = {v!r} here, {theirs.get(k)!r} there" for k, v in mine.items() if v != theirs.get(k)]
        return self.config.differences(other.config) + form + steered


def open_run(path: str | Path) -> Run:
    """The run in a directory.

    Raises
    ------
    CheckpointError
        If there is none, or its description cannot be read.
    """
    file = Path(path) / FILE
    if not file.is_file():
        raise CheckpointError(f"{str(path)!r} is not a run: it has no run.json. `sdesens train` makes one.")
    try:
        found = json.loads(file.read_text())
        config, form = TrainConfig.from_json(found["config"]), Form.from_json(found["form"])
        return Run(Path(path), config, form, found.get("steered"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{str(file)!r} does not describe a run ({error}): restore it, or train in another directory."
        ) from error


@contextmanager
def claimed(run: Run) -> Iterator[None]:
    """Hold a run's directory against other processes, with the run's description in it; the end of a process lets go.

    Raises
    ------
    CheckpointError
        For a directory of another run, of something else, or one that another process holds.
    """
    try:
        _refuse(run)  # before anything is put into the directory
        run.path.mkdir(parents=True, exist_ok=True)
        held = (run.path / LOCK).open("a")
    except OSError as error:
        raise ArgumentError(f"{str(run.path)!r} cannot be a run's directory ({error}): give another.") from error
    with held as file:
        if os.name == "posix":  # Windows has no flock: there nothing is held
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(
                    f"another process works in {str(run.path)!r}: wait for it, stop it, or give another directory."
                ) from error
        _refuse(run)  # another process may have been first
        if not (run.path / FILE).is_file():
            with whole_file(run.path / FILE) as part:
                part.write_text(json.dumps({**run.meta, "steered": run.steered}, indent=2) + "\n")
        yield


def _refuse(run: Run) -> None:
    path = run.path
    if (path / FILE).is_file():
        if differences := run.differences(open_run(path)):
            raise CheckpointError(
                f"{str(path)!r} holds another run ({'; '.join(differences)}): give another directory (--out), or the options that it was made with."
            )
    elif path.exists() and not path.is_dir():
        raise CheckpointError(f"{str(path)!r} is a file: give a new or an empty directory.")
    elif path.is_dir() and any(p.name != LOCK and PART not in p.name for p in path.iterdir()):
        raise CheckpointError(f"{str(path)!r} is not empty and is not a run: give a new or an empty directory.")
