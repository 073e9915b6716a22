"""Laws of a random draw, written as functions of noise where that can be done.

    z = g(eps),   eps standard normal,   q(z) its density or its probabilities.                  (1)

A law holds the tensors that define it and answers three questions: how a draw is made from standard normals (`draw`), how
likely a draw is (`log_prob`), and whether (1) may be differentiated with eps held fixed (`reparameterised`).

Shapes: L draws are (L, *shape), made from eps (L, *law.noise). A law conditioned on N items has N as the first axis of
both. `log_prob` gives (L, ...), one number for each independent part of a draw. This file takes no derivative.
"""

import math
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sdesens.errors import ArgumentError, ArgumentTypeError
from sdesens.tensors import concrete, describe

Shape = tuple[int, ...]
EVERYWHERE = (-math.inf, math.inf)


class Law(Protocol):
    """What an estimator needs from a law.

    Attributes
    ----------
    noise : tuple of int
        Shape of the standard normals that one draw is made of; (0,) if it is not made of them.
    steps : int
        How many steps of a noise source they come from: 1, or the steps of a chain.
    reparameterised : bool
        Whether equation (1) may be differentiated in the law's tensors, with eps held fixed.
    bounds : (float, float)
        Between which each component of a draw lies.
    """

    @property
    def noise(self) -> Shape: ...

    @property
    def steps(self) -> int: ...

    @property
    def reparameterised(self) -> bool: ...

    @property
    def bounds(self) -> tuple[float, float]: ...

    def draw(self, eps: Tensor) -> Tensor:
        """L draws from eps (L, *noise): shape (L, *shape)."""
        ...

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of draws (L, *shape): shape (L, ...), a number for each independent part."""
        ...

    def fixed(self, z: Tensor) -> Tensor:
        """The draws z, held fixed while the law's tensors move."""
        ...

    def no_density(self) -> str | None:
        """Why `log_prob` or its gradient cannot be used; None if it can."""
        ...


class Plain:
    """What most laws have in common: a normal for each number drawn."""

    steps: ClassVar[int] = 1
    bounds: ClassVar[tuple[float, float]] = EVERYWHERE

    @property
    def noise(self) -> Shape:
        return self.shape  # type: ignore[attr-defined]

    def fixed(self, z: Tensor) -> Tensor:
        return z.detach()

    def no_density(self) -> str | None:
        return None


def check_tensors(law, minus_infinity: bool = False, **tensors) -> None:
    """Raise unless a law's tensors are floating and finite; minus infinity may be allowed."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ArgumentTypeError(
                f"`{name}` of {type(law).__name__} must be a floating tensor, got {describe(value)}: use torch.tensor(...)."
            )
        fine = torch.isfinite(value) | (value == -math.inf) if minus_infinity else torch.isfinite(value)
        if concrete(value) and not bool(fine.all()):
            raise ArgumentError(f"`{name}` of {type(law).__name__} holds NaN or infinite values.")
