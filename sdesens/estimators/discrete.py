"""Laws with few values: coins and choices, as functions of standard normals that jump.

Uniform, logistic and Gumbel noise are functions of standard normals through the normal distribution function Phi:

    u = Phi(eps),   logistic = log u - log(1 - u),   Gumbel = -log(-log u).                      (1)

Draws are numbers of the parameters' dtype, zeros and ones, so that f and its relaxations are one function.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.special import ndtr

from sdesens.errors import ArgumentError, ShapeError
from sdesens.estimators.laws import Plain, Shape, check_tensors
from sdesens.tensors import concrete


@dataclass(frozen=True, eq=False)
class Bernoulli(Plain):
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
class Categorical(Plain):
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
    """Logistic noise from standard normals, equation (1); both tails keep their digits."""
    return torch.log(ndtr(eps)) - torch.log(ndtr(-eps))


def gumbel(eps: Tensor) -> Tensor:
    """Gumbel noise from standard normals, equation (1); both tails keep their digits."""
    low, high = torch.log(ndtr(eps.clamp(max=0.0))), torch.log1p(-ndtr(-eps.clamp(min=0.0)))
    return -torch.log(-torch.where(eps < 0, low, high))


def _given(probs: Tensor | None, logits: Tensor | None) -> Tensor:
    value = logits if probs is None else probs
    assert value is not None  # one of them is, or the law was refused
    return value


def _at_edge(probs: Tensor | None) -> str | None:
    """Why a score cannot be used where a probability is 0 or 1: what is never drawn has one too."""
    if probs is None or not concrete(probs) or not bool(((probs <= 0) | (probs >= 1)).any()):
        return None
    return "a probability is 0 or 1, so draws say nothing of the values that are never drawn"


def _check_one_of(law, **tensors: Tensor | None) -> None:
    given = {k: v for k, v in tensors.items() if v is not None}
    if len(given) != 1:
        raise ArgumentError(
            f"{type(law).__name__} needs one of `probs` and `logits`, got {'both' if given else 'neither'}."
        )
    check_tensors(law, minus_infinity=isinstance(law, Categorical) and law.probs is None, **given)


def _check_probabilities(probs: Tensor | None) -> None:
    if probs is not None and concrete(probs) and not bool(((probs >= 0) & (probs <= 1)).all()):
        low, high = float(probs.detach().min()), float(probs.detach().max())
        raise ArgumentError(f"`probs` must lie in [0, 1], they reach from {low!r} to {high!r}: give `logits` instead.")
