"""Arguments, checked in one way everywhere: what is wrong in kind is an ArgumentTypeError, what is out of range an ArgumentError."""

import math

import torch
from torch import Tensor

from sdesens.errors import ArgumentError, ArgumentTypeError, ShapeError
from sdesens.sde import check_parameter
from sdesens.tensors import concrete


def parameter(name: str, value) -> Tensor:
    """A number or a 0-dim tensor as a parameter; numbers become float64."""
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise ArgumentTypeError(f"`{name}` must be a number or a 0-dim tensor, got {value!r:.60}: use float(...).")
    value = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
    check_parameter(name, value)
    if value.dim():
        raise ShapeError(f"`{name}` must be one number, got shape {tuple(value.shape)}: give a 0-dim tensor.")
    if concrete(value) and not bool(torch.isfinite(value)):
        raise ArgumentError(f"`{name}` must be finite, got {value.item()}: look at where it comes from.")
    return value


def number(name: str, value, low: float = -math.inf, high: float = math.inf, *, hint: str, ends: bool = False) -> float:
    """A plain number strictly between low and high, or one of the two if `ends`; a 0-dim tensor counts as its value."""
    if isinstance(value, Tensor) and value.dim() == 0 and concrete(value) and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(f"`{name}` must be a number, got {value!r:.60}: {hint}.")
    if not (low < value < high or (ends and value in (low, high))):
        between = f"[{low:.6g}, {high:.6g}]" if ends else f"({low:.6g}, {high:.6g})"
        raise ArgumentError(f"`{name}` must lie in {between}, got {value!r}: {hint}.")
    return float(value)


def whole(name: str, value, least: int = 1, most: int | None = None, *, hint: str = "use int(...)") -> int:
    """An int, at least `least` and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"`{name}` must be an int, got {value!r:.60}: {hint}.")
    if value < least or (most is not None and value > most):
        limit = f"at least {least}" if most is None else f"in {least} ... {most}"
        raise ArgumentError(f"`{name}` must be {limit}, got {value}: {hint}.")
    return value


def shape_of(name: str, event) -> tuple[int, ...]:
    """The shape of one sample, a tuple of positive ints."""
    if not isinstance(event, tuple | list | torch.Size) or not event:
        raise ArgumentTypeError(f"`{name}` must be a tuple of ints such as (2,) or (3, 32, 32), got {event!r:.60}.")
    return tuple(whole(name, n, hint="it is a size") for n in event)
