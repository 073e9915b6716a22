"""What decides the numbers of a training run: one dataclass, which is also the command line and is saved beside the run.

Learning rate, EMA decay and noise are functions of the step, so that a run resumes from its step alone:

    lr_k    = lr min(1, (k + 1)/warmup) (1 + cos(pi k/steps))/2,                                  (1)
    decay_k = min(ema, (1 + k)/(10 + k)).                                                         (2)
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from sdesens.diffusion.preserving import VP, Cosine, SubVP
from sdesens.diffusion.schedule import Schedule
from sdesens.diffusion.schedules import EDM, VE, CondOT
from sdesens.errors import ArgumentError, ArgumentTypeError

SCHEDULES = {"edm": EDM, "vp": VP, "cosine": Cosine, "subvp": SubVP, "ve": VE, "condot": CondOT}
PREDICTIONS = ("edm", "eps", "v", "x0", "velocity")
WEIGHTS = ("auto", "simple", "min_snr", "edm", "likelihood")
TIMES = ("auto", "uniform", "lognormal")
NETWORKS = ("mlp", "conv")


def option(default: Any, help: str, *, free: bool = False, choices: tuple[str, ...] = (), above: float | None = None, low: float | None = None, high: float | None = None) -> Any:  # fmt: skip
    """A field with its help text and limits; a free one may change when a run is resumed."""
    limits = {"choices": choices, "above": above, "low": low, "high": high}
    return field(default=default, metadata={"help": help, "free": free, **limits})


@dataclass(frozen=True)
class TrainConfig:
    """What decides the numbers of a run; see `recipe` for the values that suit the built-in data.

    Raises
    ------
    ArgumentTypeError, ArgumentError
        For a value of another type, outside its limits, or that does not go with the others.

    Example
    -------
    >>> recipe("gmm8", steps=100).batch
    512
    """

    data: str = field(metadata={"help": "gmm8, moons, digits, FILE.npy, or FILE.npz with x and labels."})
    steps: int = option(3000, "Optimiser steps.", low=1)
    batch: int = option(256, "Items a step, over all ranks.", low=1)
    lr: float = option(1e-3, "Peak learning rate of AdamW.", above=0)
    warmup: int = option(100, "Steps of linear warm-up; then cosine decay to 0.", low=0)
    weight_decay: float = option(0.01, "AdamW's.", low=0)
    clip: float = option(1.0, "Largest norm of the gradient; 'inf' for none.", above=0)
    ema: float = option(0.999, "Decay of the averaged weights, late in training.", low=0, high=1)
    schedule: str = option("edm", "Noise schedule.", choices=tuple(SCHEDULES))
    prediction: str = option("edm", "What the network returns; edm is preconditioned.", choices=PREDICTIONS)
    weight: str = option(
        "auto", "Loss weight; auto: edm for edm, equal weight on v for v, else simple.", choices=WEIGHTS
    )
    times: str = option("auto", "Law of training times; auto: lognormal for edm, else uniform.", choices=TIMES)
    network: str = option("mlp", "Residual MLP, or a small convolutional network for images.", choices=NETWORKS)
    width: int = option(256, "Units, or channels, of a hidden layer.", low=1)
    depth: int = option(3, "Residual blocks.", low=1)
    norm: bool = option(False, "Layer normalisation in the MLP's blocks.")
    drop_label: float = option(0.1, "Share of labels that are hidden, for guidance.", low=0, high=1)
    accumulate: int = option(1, "Pieces in which a rank goes through its share of the batch.", low=1)
    bf16: bool = option(False, "Network in bfloat16 autocast.")
    seed: int = option(0, "Of data order, times, noise and initial weights.")
    log_every: int = option(10, "Steps a line of the log.", low=1)
    checkpoint_every: int = option(500, "Steps between checkpoints.", free=True, low=1)
    keep_last: int = option(3, "Checkpoints kept, beside the best.", free=True, low=1)
    picture_every: int = option(1000, "Steps between pictures of samples; 0 for none.", free=True, low=0)

    def __post_init__(self):
        for f in fields(self):
            object.__setattr__(self, f.name, _checked(f, getattr(self, f.name)))
        if self.batch % self.accumulate:
            raise ArgumentError(f"`batch` = {self.batch} must be a multiple of `accumulate` = {self.accumulate}.")
        if self.weight == "edm" and self.prediction != "edm" and self.schedule == "condot":
            raise ArgumentError("`weight` edm on the condot schedule is infinite at its end: use simple or min_snr.")

    def make_schedule(self) -> Schedule:
        """The schedule, with its usual parameters."""
        return SCHEDULES[self.schedule]()

    @property
    def law_of_times(self) -> Literal["uniform", "lognormal"]:
        """`times`, decided."""
        if self.times == "auto":
            return "lognormal" if self.prediction == "edm" else "uniform"
        return "lognormal" if self.times == "lognormal" else "uniform"

    def lr_at(self, step: int) -> float:
        """Equation (1)."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.lr * warm * (1 + math.cos(math.pi * step / self.steps)) / 2

    def to_json(self) -> dict[str, Any]:
        """A dict for JSON; an infinite clip is the word "inf"."""
        return {k: "inf" if v == math.inf else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainConfig":
        """The configuration that `to_json` wrote; raise ArgumentError for unknown or missing names."""
        names = {f.name for f in fields(cls)}
        got = set(map(str, values)) if isinstance(values, dict) else set()
        if got != names:
            raise ArgumentError(
                f"this configuration has unknown options {sorted(got - names)} and lacks {sorted(names - got)}: it was made by another "
                "version of sdesens."
            )
        return cls(**{**values, "clip": math.inf if values["clip"] == "inf" else values["clip"]})

    def differences(self, other: "TrainConfig") -> list[str]:
        """What differs in a way that changes the numbers, in words."""
        return [
            f"{f.name} = {getattr(self, f.name)!r} here, {getattr(other, f.name)!r} there"
            for f in fields(self)
            if not f.metadata.get("free") and getattr(self, f.name) != getattr(other, f.name)
        ]

    def show(self) -> str:
        """Readable JSON."""
        return json.dumps(self.to_json(), indent=2)


RECIPES: dict[str, dict[str, Any]] = {
    "gmm8": {"batch": 512, "lr": 2e-3, "width": 128, "depth": 3},
    "moons": {"batch": 512, "lr": 2e-3, "width": 128, "depth": 3},
    "digits": {"batch": 256, "lr": 1e-3, "width": 384, "depth": 3, "norm": True},
}


def recipe(data: str, **changes) -> TrainConfig:
    """The configuration that suits some data, with changes.

    Raises
    ------
    ArgumentTypeError, ArgumentError
        For an unknown option or a bad value.

    Example
    -------
    >>> recipe("digits").width
    384
    """
    unknown = changes.keys() - {f.name for f in fields(TrainConfig)}
    if unknown:
        raise ArgumentTypeError(f"TrainConfig has no option {', '.join(sorted(unknown))}.")
    base = TrainConfig(data=data, **RECIPES.get(data, {}))
    return replace(base, **changes)


def _checked(f, value):
    """The value in the field's type; raise unless it is one and within the field's limits."""
    kind, limits = f.type, f.metadata
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError as error:
            raise ArgumentError(f"`{f.name}` must be a number that a float can hold, got {value!r:.40}.") from error
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ArgumentTypeError(f"`{f.name}` must be {kind.__name__}, got {value!r} ({type(value).__name__}).")
    if kind is float and math.isnan(value):
        raise ArgumentError(f"`{f.name}` must be a number, got nan.")
    choices, above, low, high = (limits.get(k) for k in ("choices", "above", "low", "high"))
    if choices and value not in choices:
        raise ArgumentError(f"`{f.name}` must be one of {', '.join(choices)}, got {value!r}.")
    too_low = (above is not None and not value > above) or (low is not None and value < low)
    if too_low or (high is not None and value > high) or (f.name != "clip" and value == math.inf):
        wanted = (f"above {above:g}" if above is not None else f"at least {low:g}") + (f" and at most {high:g}" if high is not None else "")  # fmt: skip
        raise ArgumentError(f"`{f.name}` must be {wanted}, got {value!r}.")
    if f.name == "seed" and not -(2**63) <= value < 2**64:
        raise ArgumentError(f"`seed` must be a 64-bit integer, got {value}.")
    return value
