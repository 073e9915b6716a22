"""Laws of a random draw, written as functions of noise where that can be done.

    z = g(eps),   eps standard normal,   q(z) its density or its probabilities.                  (1)

A law holds the tensors that define it and answers three questions: how a draw is made from standard normals (`draw`), how
likely a draw is (`log_prob`), and whether (1) may be differentiated with eps held fixed (`reparameterised`). Uniform,
logistic and Gumbel noise are functions of standard normals too, through the normal distribution function Phi:

    u = Phi(eps),   logistic = log u - log(1 - u),   Gumbel = -log(-log u).                      (2)

Shapes: L draws are (L, *shape), made from eps (L, *law.noise). A law conditioned on N items has N as the first axis of
both. `log_prob` gives (L, ...), one number for each independent part of a draw. This file takes no derivative.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.special import ndtr

from sdesens.errors import ArgumentError, ArgumentTypeError, ShapeError
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


class _Plain:
    """What most laws have in common: a normal for each number drawn."""

    steps: ClassVar[int] = 1
    bounds: ClassVar[tuple[float, float]] = EVERYWHERE

    @property
    def shape(self) -> Shape:
        """Shape of one draw."""
        raise NotImplementedError

    @property
    def noise(self) -> Shape:
        return self.shape

    def fixed(self, z: Tensor) -> Tensor:
        return z.detach()

    def no_density(self) -> str | None:
        return None


@dataclass(frozen=True, eq=False)
class Normal(_Plain):
    """Independent normals: z = mean + scale eps.

    Parameters
    ----------
    mean, scale : Tensor, one shape (or shapes that broadcast)
        scale > 0 is a standard deviation, not a variance.

    Raises
    ------
    ArgumentTypeError, ArgumentError, ShapeError

    Example
    -------
    >>> Normal(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])).draw(torch.tensor([[0.0, 1.0]]))
    tensor([[1., 5.]])
    """

    mean: Tensor
    scale: Tensor
    reparameterised: ClassVar[bool] = True

    def __post_init__(self):
        _check_tensors(self, mean=self.mean, scale=self.scale)
        _broadcast(self, mean=self.mean, scale=self.scale)
        _check_positive("scale", self.scale)

    @property
    def shape(self) -> Shape:
        return tuple(torch.broadcast_shapes(self.mean.shape, self.scale.shape))

    def draw(self, eps: Tensor) -> Tensor:
        return self.mean + self.scale * eps

    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * ((z - self.mean) / self.scale).square() - self.scale.log() - 0.5 * math.log(2 * math.pi)

    def gaussian(self) -> "tuple[Normal, Callable[[Tensor], Tensor]]":
        """The normal law beneath, and the map from its draws to ours."""
        return self, _same


@dataclass(frozen=True, eq=False)
class LogNormal(_Plain):
    """Independent log-normals: z = exp(mean + scale eps).

    Parameters
    ----------
    mean, scale : Tensor
        Of log z, as for `Normal`.
    """

    mean: Tensor
    scale: Tensor
    reparameterised: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (0.0, math.inf)

    def __post_init__(self):
        Normal(self.mean, self.scale)  # raises for both

    @property
    def shape(self) -> Shape:
        return Normal(self.mean, self.scale).shape

    def draw(self, eps: Tensor) -> Tensor:
        return torch.exp(self.mean + self.scale * eps)

    def log_prob(self, z: Tensor) -> Tensor:
        return Normal(self.mean, self.scale).log_prob(z.log()) - z.log()

    def gaussian(self) -> tuple[Normal, Callable[[Tensor], Tensor]]:
        """The normal law of log z, and exp."""
        return Normal(self.mean, self.scale), torch.exp


@dataclass(frozen=True, eq=False)
class MultivariateNormal(_Plain):
    """Correlated normals: z = mean + scale_tril eps, covariance scale_tril scale_tril'.

    Parameters
    ----------
    mean : Tensor, shape (..., d)
    scale_tril : Tensor, shape (..., d, d)
        A Cholesky factor: its lower triangle, with a positive diagonal. What stands above the diagonal is not looked at.
    """

    mean: Tensor
    scale_tril: Tensor
    reparameterised: ClassVar[bool] = True

    def __post_init__(self):
        _check_tensors(self, mean=self.mean, scale_tril=self.scale_tril)
        d = self.mean.shape[-1] if self.mean.dim() else 0
        if d < 1 or self.scale_tril.shape[-2:] != (d, d):
            raise ShapeError(
                f"`mean` and `scale_tril` must have shapes (..., d) and (..., d, d), got {tuple(self.mean.shape)} and "
                f"{tuple(self.scale_tril.shape)}: for independent components use Normal."
            )
        _check_positive("scale_tril, on its diagonal,", self.scale_tril.diagonal(dim1=-2, dim2=-1))

    @property
    def shape(self) -> Shape:
        return tuple(torch.broadcast_shapes(self.mean.shape, self.scale_tril.shape[:-1]))

    def draw(self, eps: Tensor) -> Tensor:
        return self.mean + (self.scale_tril.tril() @ eps[..., None])[..., 0]

    def log_prob(self, z: Tensor) -> Tensor:
        factor, r = self.scale_tril.tril(), z - self.mean
        factor = factor.expand(*r.shape, r.shape[-1])
        u = torch.linalg.solve_triangular(factor, r[..., None], upper=False)[..., 0]
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * u.square().sum(-1) - log_det - 0.5 * r.shape[-1] * math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class Bernoulli(_Plain):
    """Independent coins: z = 1 with probability p, else 0; as numbers of the parameters' dtype.

    Parameters
    ----------
    probs : Tensor, in [0, 1]
    logits : Tensor
        log p - log(1 - p). Give one of the two.

    Example
    -------
    >>> Bernoulli(probs=torch.tensor([0.5, 0.9])).draw(torch.tensor([[0.1, 0.1]]))   # 1 where Phi(eps) < p
    tensor([[0., 1.]])
    """

    probs: Tensor | None = None
    logits: Tensor | None = None
    reparameterised: ClassVar[bool] = False

    def __post_init__(self):
        _check_one_of(self, probs=self.probs, logits=self.logits)
        _check_probabilities(self.probs)

    @property
    def shape(self) -> Shape:
        return tuple(_given(self.probs, self.logits).shape)

    @property
    def p(self) -> Tensor:
        """Probability of a 1."""
        given = _given(self.probs, self.logits)
        return given if self.logits is None else torch.sigmoid(given)

    @property
    def logit(self) -> Tensor:
        """log p - log(1 - p)."""
        given = _given(self.probs, self.logits)
        return given if self.probs is None else torch.logit(given)

    def draw(self, eps: Tensor) -> Tensor:
        return (ndtr(eps) < self.p).to(eps.dtype)

    def log_prob(self, z: Tensor) -> Tensor:
        if self.logits is not None:
            return torch.nn.functional.logsigmoid((2 * z - 1) * self.logits)
        return self.prob(z).log()  # not z log p + ..., which is NaN at p = 0

    def prob(self, z: Tensor) -> Tensor:
        """Probability of each value, shape of z; differentiable at 0 and 1 too."""
        return torch.where(z > 0.5, self.p, 1 - self.p)

    def no_density(self) -> str | None:
        return _at_edge(self.probs)

    def support(self) -> Tensor:
        """The values of one component, shape (2,)."""
        p = self.p
        return torch.tensor([0.0, 1.0], dtype=p.dtype, device=p.device)


@dataclass(frozen=True, eq=False)
class Categorical(_Plain):
    """Independent choices among K: z is one-hot, shape (..., K), as numbers of the parameters' dtype.

    A draw is the largest of logits + Gumbel noise, so that a relaxed draw can share its noise.

    Parameters
    ----------
    probs : Tensor, shape (..., K), in [0, 1], rows that sum to 1
        A derivative is that of probs / sum(probs): one probability grows at the expense of the others.
    logits : Tensor, shape (..., K)
        Logarithms of the probabilities, up to a constant; minus infinity masks a choice. Give one of the two.
    """

    probs: Tensor | None = None
    logits: Tensor | None = None
    reparameterised: ClassVar[bool] = False

    def __post_init__(self):
        _check_one_of(self, probs=self.probs, logits=self.logits)
        given = _given(self.probs, self.logits)
        if given.dim() < 1 or given.shape[-1] < 2:
            raise ShapeError(
                f"Categorical needs `probs` or `logits` of shape (..., K) with K >= 2, got {tuple(given.shape)}: for two "
                "outcomes Bernoulli takes a single number."
            )
        _check_probabilities(self.probs)
        if self.probs is not None and concrete(self.probs):
            sums = self.probs.sum(-1)
            if not bool(((sums - 1).abs() < 1e-4).all()):
                raise ArgumentError(
                    f"`probs` must sum to 1 along the last axis, they sum to {sums.flatten()[:4].tolist()}: divide by the "
                    "sum, or give `logits`."
                )

    @property
    def shape(self) -> Shape:
        return tuple(_given(self.probs, self.logits).shape)

    @property
    def log_probs(self) -> Tensor:
        """Logarithms of the probabilities, shape (..., K)."""
        given = _given(self.probs, self.logits)
        return torch.log_softmax(given, -1) if self.probs is None else (given / given.sum(-1, keepdim=True)).log()

    def draw(self, eps: Tensor) -> Tensor:
        best = (self.log_probs + gumbel(eps)).argmax(-1, keepdim=True)
        return (torch.arange(eps.shape[-1], device=eps.device) == best).to(eps.dtype)

    def log_prob(self, z: Tensor) -> Tensor:
        if self.probs is None:
            return torch.where(z > 0.5, self.log_probs, 0.0).sum(-1)
        return self.prob(z).log()  # not z log p, which is NaN at p = 0

    def prob(self, z: Tensor) -> Tensor:
        """Probability of each choice, shape of z without its last axis; differentiable where some are 0."""
        given = _given(self.probs, self.logits)
        p = torch.softmax(given, -1) if self.probs is None else given / given.sum(-1, keepdim=True)
        return torch.where(z > 0.5, p, 0.0).sum(-1)

    def no_density(self) -> str | None:
        return _at_edge(self.probs)

    def support(self) -> Tensor:
        """The values of one choice, shape (K, K)."""
        given = _given(self.probs, self.logits)
        return torch.eye(given.shape[-1], dtype=given.dtype, device=given.device)


def logistic(eps: Tensor) -> Tensor:
    """Logistic noise from standard normals, equation (2); both tails keep their digits."""
    return torch.log(ndtr(eps)) - torch.log(ndtr(-eps))


def gumbel(eps: Tensor) -> Tensor:
    """Gumbel noise from standard normals, equation (2); both tails keep their digits."""
    low, high = torch.log(ndtr(eps.clamp(max=0.0))), torch.log1p(-ndtr(-eps.clamp(min=0.0)))
    return -torch.log(-torch.where(eps < 0, low, high))


def _same(z: Tensor) -> Tensor:
    return z


def _given(probs: Tensor | None, logits: Tensor | None) -> Tensor:
    value = logits if probs is None else probs
    assert value is not None  # one of them is, or the law was refused
    return value


def _check_tensors(law, minus_infinity: bool = False, **tensors) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ArgumentTypeError(
                f"`{name}` of {type(law).__name__} must be a floating tensor, got {describe(value)}: use torch.tensor(...)."
            )
        fine = torch.isfinite(value) | (value == -math.inf) if minus_infinity else torch.isfinite(value)
        if concrete(value) and not bool(fine.all()):
            raise ArgumentError(f"`{name}` of {type(law).__name__} holds NaN or infinite values.")


def _at_edge(probs: Tensor | None) -> str | None:
    """Why a score cannot be used where a probability is 0 or 1: what is never drawn has one too."""
    if probs is None or not concrete(probs) or not bool(((probs <= 0) | (probs >= 1)).any()):
        return None
    return "a probability is 0 or 1, so draws say nothing of the values that are never drawn"


def _check_positive(name: str, value: Tensor) -> None:
    if concrete(value) and not bool((value > 0).all()):
        worst = float(value.detach().min())
        raise ArgumentError(
            f"`{name}` must be positive, its smallest entry is {worst!r}: it is a standard deviation; write it as "
            "exp or softplus of a free parameter."
        )


def _check_one_of(law, **tensors: Tensor | None) -> None:
    given = {k: v for k, v in tensors.items() if v is not None}
    if len(given) != 1:
        raise ArgumentError(
            f"{type(law).__name__} needs one of `probs` and `logits`, got {'both' if given else 'neither'}."
        )
    _check_tensors(law, minus_infinity=isinstance(law, Categorical) and law.probs is None, **given)


def _check_probabilities(probs: Tensor | None) -> None:
    if probs is not None and concrete(probs) and not bool(((probs >= 0) & (probs <= 1)).all()):
        low, high = float(probs.detach().min()), float(probs.detach().max())
        raise ArgumentError(f"`probs` must lie in [0, 1], they reach from {low!r} to {high!r}: give `logits` instead.")


def _broadcast(law, **tensors: Tensor) -> None:
    try:
        torch.broadcast_shapes(*(v.shape for v in tensors.values()))
    except RuntimeError as error:
        shapes = " and ".join(f"`{k}` {tuple(v.shape)}" for k, v in tensors.items())
        raise ShapeError(f"the tensors of {type(law).__name__} do not fit each other: {shapes}.") from error
