"""Train: a run's directory, its trainer, checkpoints, log and progress, put together."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from sdesens.diffusion.predict import Denoiser
from sdesens.errors import ArgumentError, ArgumentTypeError
from sdesens.training.checkpoint import load_checkpoint, load_latest, save_checkpoint, tidy
from sdesens.training.config import TrainConfig
from sdesens.training.data import Data, data_of
from sdesens.training.floors import training_floors
from sdesens.training.log import Log
from sdesens.training.ranks import join
from sdesens.training.run import Run, claimed
from sdesens.training.trainer import Trainer

Picture = Callable[[Denoiser, Data, Path], None]


def train(
    config: TrainConfig,
    path: str | Path,
    *,
    device: str = "auto",
    tensorboard: bool = True,
    progress: bool = True,
    picture: Picture | None = None,
) -> Run:
    """Train to the last step, or go on from where an earlier call was interrupted, to the same bits.

    Started by torchrun, all ranks train together.

    Parameters
    ----------
    config : TrainConfig
    path : str or Path
        The run's directory: new, empty, or that of a run of the same configuration and data.
    device : str
        "auto" takes a GPU if there is one.
    tensorboard, progress : bool
        Write TensorBoard's files; show progress.
    picture : callable (denoiser, data, file), optional
        Draws samples into a file, every `config.picture_every` steps.

    Returns
    -------
    Run

    Raises
    ------
    ArgumentError, ShapeError, CheckpointError
        For data, options or a directory that cannot be used.
    NonFiniteError
        If the loss is not a number.

    Example
    -------
    >>> import tempfile
    >>> from sdesens.training.config import recipe
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = train(recipe("gmm8", steps=2, width=8), folder, tensorboard=False, progress=False)
    ...     run.denoiser()
    Denoiser(ResidualMLP of ... parameters, EDM(sigma_max=80), sigma_data=1.4...)
    """
    if not isinstance(config, TrainConfig):
        raise ArgumentTypeError(
            f"`config` must be a TrainConfig, got {type(config).__name__}: recipe('gmm8', steps=100) is one."
        )
    data = data_of(config)
    run = Run(Path(path), config, data.form)
    with join(device) as ranks, same_convolutions(), ExitStack() as held:
        trainer = Trainer(config, data, ranks)
        try:
            if ranks.first:
                held.enter_context(claimed(run))
            _resume(trainer, run)
            if trainer.step == config.steps and progress and ranks.first:
                print(f"{str(path)!r} is trained to its last step, {config.steps}.", file=sys.stderr)
            if trainer.step < config.steps:
                _loop(trainer, run, Progress(config, data, progress and ranks.first), tensorboard, picture)
        except OSError as error:
            raise ArgumentError(
                f"{str(path)!r} could not be written ({error}): make room, or give another directory. What was saved is intact, and the "
                "same command goes on from there."
            ) from error
    return run


@contextmanager
def same_convolutions() -> Iterator[None]:
    """Have cuDNN take the same algorithm, which rounds the same way, in every run."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def _resume(trainer: Trainer, run: Run) -> None:
    """Load the newest valid checkpoint that the first rank finds."""
    ranks = trainer.ranks
    snapshot = load_latest(run.checkpoints) if ranks.first else None
    if snapshot is not None and snapshot.step == run.config.steps:
        tidy(run.checkpoints, keep_last=run.config.keep_last)  # no later save will
    step = ranks.agree(0 if snapshot is None else snapshot.step)
    if step and snapshot is None:
        snapshot = load_checkpoint(run.checkpoints / f"step-{step:08d}")
    if snapshot is not None:
        run.check(snapshot.meta)
        trainer.restore(snapshot)


def _loop(trainer: Trainer, run: Run, progress: "Progress", tensorboard: bool, picture: Picture | None) -> None:
    config, first = run.config, trainer.ranks.first
    log = Log(run.path, trainer.step, tensorboard=tensorboard) if first else None
    progress.start(trainer.step)
    try:
        for step in trainer.steps():
            last = step == config.steps
            if step % config.log_every == 0 or last:
                losses = trainer.gather()
                trainer.losses.clear()
                progress.update(step, sum(losses) / len(losses))
                if log:
                    log.write(step, loss=sum(losses) / len(losses), lr=config.lr_at(step - 1), grad_norm=float(trainer.grad_norm))  # fmt: skip
                    log.show(step, items_a_second=progress.speed(step) * config.batch)
            if step % config.checkpoint_every == 0 or last:
                trainer.gather()
                if log:
                    score = trainer.validation()
                    log.write(step, validation=score)
                    log.sync()
                    save_checkpoint(run.checkpoints, trainer.snapshot(score), keep_last=config.keep_last)
                    progress.saved(step, score)
            if first and picture and config.picture_every and step % config.picture_every == 0 and not last:
                picture(trainer.averaged, trainer.data, run.path / "pictures" / f"step-{step:08d}.png")
    finally:
        progress.close()
        if log:
            log.close()


class Progress:
    """What the first rank says while it works: a bar on a terminal, a line a checkpoint elsewhere."""

    def __init__(self, config: TrainConfig, data: Data, wanted: bool):
        self.config, self.wanted = config, wanted
        self.bar: tqdm | None = None
        self.floor = ""
        if wanted:
            found = training_floors(config, data)
            self.floor = ", ".join(f"{name} floor {value:.4f}" for name, value in found.items())

    def start(self, step: int) -> None:
        """Begin at a step."""
        self.begun, self.first = time.monotonic(), step
        if self.wanted:
            self._say((f"from step {step}; " if step else "") + f"to compare the loss with: {self.floor}")
            self.bar = tqdm(total=self.config.steps, initial=step, unit=" steps", disable=None, dynamic_ncols=True)

    def speed(self, step: int) -> float:
        """Steps a second since the start."""
        return (step - self.first) / (time.monotonic() - self.begun)

    def update(self, step: int, loss: float) -> None:
        """After a line of the log."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f} ({self.floor})", refresh=False)
            self.bar.update(step - self.bar.n)

    def saved(self, step: int, score: float) -> None:
        """After a checkpoint."""
        if self.bar is not None and self.bar.disable:
            self._say(f"step {step}/{self.config.steps}: held-out loss {score:.4f}, {self.speed(step):.0f} steps/s")

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()

    def _say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)
