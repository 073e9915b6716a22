"""Numbers and coefficients: small things that every file here needs.

This file knows nothing of schedules.
"""

import math
from collections.abc import Mapping
from copy import copy

import torch
from torch import Tensor

from sdesens.errors import ArgumentError, ArgumentTypeError, DtypeError, ShapeError
from sdesens.tensors import concrete, describe


def like(a: Tensor, x: Tensor) -> Tensor:
    """A coefficient of shape () or (B,) in the dtype of x (B, *event), with axes that line up with its rows."""
    if not x.is_floating_point():
        raise DtypeError(
            f"states must be real and floating, got {x.dtype}: use x.float(), with data scaled to order 1."
        )
    if a.dim() > 1 or (a.dim() == 1 and len(a) != len(x)):
        raise ShapeError(
            f"`t` must have shape () or ({len(x)},), one time a row of x {tuple(x.shape)}, got {tuple(a.shape)}: give each row its own, "
            "or one for all."
        )
    return a.to(x).reshape(-1, *[1] * (x.dim() - 1)) if a.dim() else a.to(x)


def bad_rows(x: Tensor) -> list[int]:
    """Which rows of x (B, *event) hold NaN or infinite values."""
    return (~torch.isfinite(x.detach())).flatten(1).any(1).nonzero().flatten().tolist()


def rebound(frozen, **values):
    """A copy of a frozen dataclass with other tensors in some of its fields, unchecked: in a time loop checks would cost more than steps."""
    new = copy(frozen)
    for name, value in values.items():
        object.__setattr__(new, name, value)
    return new


def reals(name: str, x) -> Tensor:
    """Numbers as a float64 tensor; raise DtypeError unless they are real."""
    try:
        given = x if isinstance(x, Tensor) else torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(
            f"`{name}` must be a number or a tensor, got {x!r:.60}: use torch.tensor(...)."
        ) from error
    if given.is_complex() or given.dtype == torch.bool:
        raise DtypeError(f"`{name}` must be real, got {given.dtype}: use torch.float64.")
    # torch reads plain floats in its default dtype: 0.1 would be off by 1e-9
    return given.to(torch.float64) if isinstance(x, Tensor) else torch.as_tensor(x, dtype=torch.float64)


def double(x: float | Tensor) -> Tensor:
    """A parameter in float64; gradients flow."""
    return torch.as_tensor(x, dtype=torch.float64)


def root(x: Tensor) -> Tensor:
    """sqrt(x), with derivative 0 where x = 0: there a parameter has no influence, yet sqrt' is infinite."""
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def same(a, b) -> bool:
    """Whether two fields hold the same values."""
    if a is b:
        return True
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return concrete(a) and concrete(b) and torch.equal(a, b)
    return type(a) is type(b) and a == b


def require_increasing(low_name: str, low: Tensor, high_name: str, high: Tensor, *, strict: bool = True) -> None:
    """Raise ArgumentError unless 0 < low < high (strict), or 0 <= low <= high and 0 < high."""
    if not (concrete(low) and concrete(high)):
        return
    a, b = float(low.detach()), float(high.detach())
    fine = 0 < a < b < math.inf if strict else 0 <= a <= b < math.inf and b > 0
    if not fine:
        sign = "<" if strict else "<="
        raise ArgumentError(
            f"`{low_name}` and `{high_name}` must satisfy 0 {sign} {low_name} {sign} {high_name}, got {a:g} and {b:g}: swap or move them."
        )


def shown(value) -> str:
    """A field's value in a repr."""
    if isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0 and concrete(value)):
        return f"{value.item() if isinstance(value, Tensor) else value:.6g}"
    if isinstance(value, Tensor):
        return f"<{describe(value)}>"
    return getattr(value, "__name__", None) or ("{...}" if isinstance(value, Mapping) else repr(value))
