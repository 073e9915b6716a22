"""Any torch.distributions.Distribution as a law.

Normal, LogNormal, MultivariateNormal, Bernoulli and OneHotCategorical become our own laws, and so functions of our noise. The
others draw from torch's generator by their own samplers, `rsample` where they have one: Gamma, Beta and Dirichlet there are
implicit reparameterisations (M. Figurnov, S. Mohamed, A. Mnih, NeurIPS 2018). The generator is seeded for each run and put back
after it, so the numbers depend on the seed alone.

`has_rsample` is not taken on trust: `OneHotCategoricalStraightThrough` has it, but its derivative is that of another function
than the one it draws. And a density is not enough for the score function where the support moves with a parameter.
"""

import hashlib
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, distributions
from torch.distributions import Distribution, constraints

from sdesens.errors import ArgumentError
from sdesens.estimators.discrete import Bernoulli, Categorical
from sdesens.estimators.gaussian import LogNormal, MultivariateNormal, Normal
from sdesens.estimators.laws import Law, Shape
from sdesens.noise import Noise, Philox
from sdesens.tensors import concrete

_GENERATOR = threading.RLock()
BIASED = (distributions.OneHotCategoricalStraightThrough,)


@dataclass(frozen=True, eq=False)
class TorchLaw:
    """A distribution with its own sampler; see the module docstring."""

    distribution: Distribution
    steps: ClassVar[int] = 1

    @property
    def noise(self) -> Shape:
        batch = self.distribution.batch_shape
        return (*batch[:1], 0) if batch else (0,)  # so that items, the first axis, are seen

    @property
    def reparameterised(self) -> bool:
        return self.distribution.has_rsample

    @property
    def biased(self) -> bool:
        """Whether its `rsample` is not the derivative of its draw."""
        d: Distribution | None = self.distribution
        while d is not None and not isinstance(d, BIASED):
            d = getattr(d, "base_dist", None)
        return d is not None

    @property
    def discrete(self) -> bool:
        """Whether its values are apart from each other."""
        return bool(getattr(self.distribution.support, "is_discrete", False))

    @property
    def bounds(self) -> tuple[float, float]:
        support = self.distribution.support
        low, high = getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf)
        return float(torch.as_tensor(low).detach().min()), float(torch.as_tensor(high).detach().max())

    def draw(self, eps: Tensor) -> Tensor:
        d, n = self.distribution, torch.Size(eps.shape[:1])
        return d.rsample(n) if d.has_rsample else d.sample(n).to(eps.dtype)

    def log_prob(self, z: Tensor) -> Tensor:
        return self.distribution.log_prob(z)

    def fixed(self, z: Tensor) -> Tensor:
        return z.detach()

    def no_density(self) -> str | None:
        d = self.distribution
        try:
            with torch.random.fork_rng():
                d.log_prob(d.sample())
        except NotImplementedError:
            return f"{type(self.distribution).__name__} has no `log_prob`"
        if isinstance(d, distributions.Categorical | distributions.OneHotCategorical) and bool((d.probs <= 0).any()):
            return "a probability is 0, so draws say nothing of the values that are never drawn"
        moving = [v for v in vars(self.distribution.support).values() if isinstance(v, Tensor) and v.requires_grad]
        if moving:
            return f"the support of {type(self.distribution).__name__} moves with its parameters"
        return None

    def support(self) -> Tensor | None:
        """The values of one component, shape (S, *event), if they are few and alike for all."""
        d = self.distribution
        if not d.has_enumerate_support:
            return None
        try:
            values = d.enumerate_support(expand=False)
        except NotImplementedError:
            return None  # components with unlike values
        return values.reshape(values.shape[0], *d.event_shape).to(torch.get_default_dtype())


def as_law(d: Distribution) -> Law:
    """A distribution as a law: our own where there is one.

    Raises
    ------
    ArgumentError
        If its arguments do not meet their constraints; torch itself stops looking once anything has been compiled.
    """
    _check_arguments(d)
    event = d.event_shape
    if isinstance(d, distributions.Independent):
        return as_law(d.base_dist)  # log densities of parts are summed anyway
    if type(d) is distributions.Normal:
        return Normal(d.loc, d.scale)
    if type(d) is distributions.LogNormal:
        return LogNormal(d.loc, d.scale)
    if type(d) is distributions.MultivariateNormal:
        return MultivariateNormal(d.loc, d.scale_tril)
    if type(d) is distributions.Bernoulli:
        return Bernoulli(logits=d.logits) if "logits" in vars(d) else Bernoulli(probs=d.probs)
    if type(d) is distributions.OneHotCategorical and len(event) == 1:
        given = d._categorical  # which knows what it was given: logits made from probabilities hide a 0
        return Categorical(logits=given.logits) if "logits" in vars(given) else Categorical(probs=given.probs)
    return TorchLaw(d)


def _check_arguments(d: Distribution) -> None:
    for name, constraint in d.arg_constraints.items():
        value = vars(d).get(name)  # those that were given, not those that follow from them
        if constraints.is_dependent(constraint) or not isinstance(value, Tensor) or not concrete(value):
            continue
        if not bool(constraint.check(value).all()):
            shown = value.detach().flatten()[:4].tolist()
            raise ArgumentError(f"`{name}` of {type(d).__name__} must satisfy {constraint}, got {shown}.")


@contextmanager
def seeded(noise: Noise, first: int) -> Iterator[None]:
    """Torch's global generator at a place that depends on the seed and on `first` alone; put back afterwards.

    Raises
    ------
    ArgumentError
        If the noise is not Philox, whose seed and stream can be used.
    """
    if not isinstance(noise, Philox):
        raise ArgumentError(
            "this model draws from torch's generator and cannot be driven by `noise`: give `seed`, or write the draw as a "
            "function of noise with Reparameterised."
        )
    digest = hashlib.sha256(f"{noise.seed % 2**64} {noise.stream} {first}".encode()).digest()
    with _GENERATOR, torch.random.fork_rng():  # there is one generator, for all threads
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        yield
