"""What every estimator is given, and what it gives back.

An estimator is a function

    method(draws, **options) -> Surrogate                                                        (1)

of L draws from the law at parameters p. Its surrogate is a number for each draw whose derivative in p is that draw's
contribution to the gradient; its own value means nothing (J. Schulman et al., NeurIPS 2015). Since f may depend on p itself,

    grad E[f] = int f grad q dz + E[grad f],                                                     (2)

every surrogate has two parts: one for the law, which is where methods differ, and f(z, p) at fixed z, which gives the second.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sdesens.errors import ArgumentTypeError, DtypeError, ShapeError
from sdesens.estimators.laws import Law
from sdesens.estimators.own import repeated
from sdesens.sde import Params


class Surrogate(NamedTuple):
    """What a method makes of L draws for each of n items (n = 1 without items).

    Attributes
    ----------
    values : Tensor, shape (L, n)
        f of each draw: E[f] is their mean.
    surrogate : Tensor, shape (L, n)
        The gradient is the mean of its derivative.
    control : Tensor (L, n), or None
        Something whose derivative has mean zero; a multiple of it may be subtracted, coordinate by coordinate.
    """

    values: Tensor
    surrogate: Tensor
    control: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Draws:
    """L draws from a law at parameters p.

    Attributes
    ----------
    law : Law
    f : callable (z, p) or (z, x, p) -> (B,)
    p : dict of Tensor
    x : Tensor, shape (N, ...), or None
        Items the law is conditioned on.
    eps : Tensor, shape (L, *law.noise)
    extra : Tensor, shape (L, N or 1, k)
        Further normals, for methods that need some.
    """

    law: Law
    f: Callable[..., Tensor]
    p: Params
    x: Tensor | None
    eps: Tensor
    extra: Tensor

    def made(self) -> Tensor:
        """The draws, a function of the law's tensors."""
        return self.law.draw(self.eps)

    def fixed(self) -> Tensor:
        """The draws, which stay where they are when the law's tensors move."""
        return self.law.fixed(self.made())

    def value(self, z: Tensor) -> Tensor:
        """f of draws (M, *shape), shape (M, N or 1)."""
        return evaluate(self.f, z, self.x, self.p)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of draws, shape (L, N or 1)."""
        return self.per_item(self.law.log_prob(z))

    def per_item(self, parts: Tensor) -> Tensor:
        """Sum over what belongs to one item: (L, N, ...) or (L, ...) to (L, N or 1)."""
        items = 1 if self.x is None else self.x.shape[0]
        return parts.reshape(parts.shape[0], items, -1).sum(-1)


def evaluate(f: Callable[..., Tensor], z: Tensor, x: Tensor | None, p: Params) -> Tensor:
    """f of rows: z (M, *event) or (M, N, *event) to (M, 1) or (M, N).

    Raises
    ------
    ShapeError, ArgumentTypeError, DtypeError
        If f does not give one floating number a row.
    """
    rows = z if x is None else z.flatten(0, 1)
    value = f(rows, p) if x is None else f(rows, repeated(x, z.shape[0]), p)
    signature = "f(z, p)" if x is None else "f(z, x, p)"
    wanted = f"one number a draw, shape ({rows.shape[0]},) for z of shape {tuple(rows.shape)}"
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"`{signature}` must return a tensor, {wanted}, got {type(value).__name__}.")
    if value.shape != rows.shape[:1]:
        raise ShapeError(
            f"`{signature}` returned shape {tuple(value.shape)}, but must return {wanted}: sum over the components of a draw, "
            "and take no mean over draws."
        )
    if not value.is_floating_point():
        raise DtypeError(
            f"`{signature}` returned {value.dtype}: use .to(z.dtype), and an estimator that needs no derivative."
        )
    return value[:, None] if x is None else value.unflatten(0, z.shape[:2])
