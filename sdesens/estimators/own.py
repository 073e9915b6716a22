"""A user's own law: a function of noise, or a sampler that is not one.

    Reparameterised    z = g(eps, p), differentiable; its density is optional
    Sampler            z = whatever `sample` draws; a draw has no derivative, but a density has

Both are models: called with the parameters they give the law. Conditioned on items x, every function takes x before p, rows
of x beside rows of noise or draws.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sdesens.errors import ArgumentError, ArgumentTypeError, ShapeError
from sdesens.estimators.laws import EVERYWHERE, Law, Shape
from sdesens.sde import Params
from sdesens.tensors import describe


@dataclass(frozen=True)
class Reparameterised:
    """A draw as a function of standard normals, z = g(eps, p).

    Parameters
    ----------
    g : callable (eps, p) -> (B, *event), or (eps, x, p)
        eps has shape (B, *noise_shape). Row i of the result depends on row i of eps (and of x) alone.
    noise_shape : tuple of int, or int
    log_prob : callable (z, p) -> (B,), or (z, x, p), optional
        Log density of rows of z. Without it the score function cannot be used.

    Example
    -------
    >>> import torch
    >>> shifted = Reparameterised(lambda eps, p: p["a"] + eps[:, 0] ** 3, noise_shape=1)
    >>> shifted({"a": torch.tensor(1.0)}).draw(torch.tensor([[2.0]]))
    tensor([9.])
    """

    g: Callable[..., Tensor]
    noise_shape: Shape | int
    log_prob: Callable[..., Tensor] | None = None

    def __post_init__(self):
        shape = (self.noise_shape,) if isinstance(self.noise_shape, int) else tuple(self.noise_shape)
        if not shape or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
            raise ShapeError(f"`noise_shape` must hold positive ints, got {self.noise_shape!r}: 3, or (3, 4).")
        object.__setattr__(self, "noise_shape", shape)
        _check_callable(g=self.g, log_prob=self.log_prob)

    def __call__(self, *given: Any) -> Law:
        assert isinstance(self.noise_shape, tuple)  # made so when the model was
        return Own(self.noise_shape, *_with_items(given, self.g, self.log_prob), True)


@dataclass(frozen=True)
class Sampler:
    """A sampler that is not a function of noise: it draws from torch's generator, which is seeded for it.

    Parameters
    ----------
    sample : callable (n, p) -> (n, *event), or (n, x, p) with x (n, ...)
    log_prob : callable (z, p) -> (n,), or (z, x, p), optional
        Log density or log probability of rows of z. Every sound estimator for such a law needs it.

    Example
    -------
    >>> import torch
    >>> poisson = Sampler(
    ...     lambda n, p: torch.poisson(p["rate"].expand(n)), lambda z, p: z * p["rate"].log() - p["rate"] - torch.lgamma(z + 1)
    ... )
    """

    sample: Callable[..., Tensor]
    log_prob: Callable[..., Tensor] | None = None

    def __post_init__(self):
        _check_callable(sample=self.sample, log_prob=self.log_prob)

    def __call__(self, *given: Any) -> Law:
        items, sample, log_prob = _with_items(given, lambda eps, *rest: self.sample(len(eps), *rest), self.log_prob)
        return Own((0,), items, sample, log_prob, False)


@dataclass(frozen=True, eq=False)
class Own:
    """Either of them at given parameters; functions of (B, ...) rows, items repeated."""

    width: Shape
    items: int | None
    make: Callable[[Tensor], Tensor]
    density: Callable[[Tensor], Tensor] | None
    differentiable: bool
    steps: ClassVar[int] = 1
    bounds: ClassVar[tuple[float, float]] = EVERYWHERE

    @property
    def reparameterised(self) -> bool:
        return self.differentiable

    @property
    def noise(self) -> Shape:
        return self.width if self.items is None else (self.items, *self.width)

    def draw(self, eps: Tensor) -> Tensor:
        rows = eps if self.items is None else eps.flatten(0, 1)
        z = self.make(rows)
        if not isinstance(z, Tensor) or z.dim() < 1 or z.shape[0] != rows.shape[0]:
            raise ShapeError(
                f"the model's draw must be a tensor with a row for each of {rows.shape[0]} rows of noise, got {describe(z)}."
            )
        return z if self.items is None else z.unflatten(0, (-1, self.items))

    def log_prob(self, z: Tensor) -> Tensor:
        assert self.density is not None  # `no_density` was asked
        rows = z if self.items is None else z.flatten(0, 1)
        value = self.density(rows)
        if not isinstance(value, Tensor) or value.shape != rows.shape[:1]:
            raise ShapeError(
                f"`log_prob` must give one number a row, shape ({rows.shape[0]},), got {describe(value)}: sum over components."
            )
        return value if self.items is None else value.unflatten(0, (-1, self.items))

    def fixed(self, z: Tensor) -> Tensor:
        return z.detach()

    def no_density(self) -> str | None:
        return None if self.density is not None else "the model has no `log_prob`: give one"


def _check_callable(**functions: Callable | None) -> None:
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ArgumentTypeError(f"`{name}` must be a function, got {type(function).__name__}.")


def _with_items(
    given: tuple, make: Callable, density: Callable | None
) -> tuple[int | None, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]:
    """Number of items or None, and the two functions of rows alone."""
    if len(given) not in (1, 2):
        raise ArgumentError(f"a model is called with (p) or (x, p), got {len(given)} arguments.")
    p: Params = given[-1]
    if len(given) == 1:
        return None, lambda eps: make(eps, p), None if density is None else lambda z: density(z, p)
    x = given[0]

    def beside(rows: Tensor) -> Tensor:
        return repeated(x, len(rows) // len(x))

    return (
        len(x),
        lambda eps: make(eps, beside(eps), p),
        None if density is None else lambda z: density(z, beside(z), p),
    )


def repeated(x: Tensor, times: int) -> Tensor:
    """Items x (N, ...) beside flattened draws: shape (times N, ...)."""
    return x.expand(times, *x.shape).flatten(0, 1)
