"""Gumbel-Softmax, or concrete: differentiate through a relaxed draw. Biased, at every temperature.

    categorical   y = softmax((log q + G) / tau),   G Gumbel noise;   argmax(log q + G) is an exact draw     (1)
    coin          y = sigma((l - L) / tau),         L logistic noise; 1{l - L > 0} is an exact draw          (2)

The gradient is that of E[f(y)], not of E[f(z)]. Its bias falls like tau^2 as tau -> 0 while its variance grows like 1 / tau.
With `straight_through`, f' is taken at the exact draw and dy from the relaxed one: for nonlinear f the limit tau -> 0 is wrong too.
The value is that of exact draws in both cases.
References: E. Jang, S. Gu, B. Poole, ICLR 2017; C. Maddison, A. Mnih, Y. W. Teh, ICLR 2017.
"""

import math

import torch

from sdesens.errors import ArgumentError
from sdesens.estimators.discrete import Bernoulli, Categorical, gumbel, logistic
from sdesens.estimators.draws import Draws, Surrogate
from sdesens.estimators.laws import Law


def gumbel_softmax(draws: Draws, *, temperature: float = 0.5, straight_through: bool = False) -> Surrogate:
    """Equations (1) and (2)."""
    law = draws.law
    if isinstance(law, Bernoulli):
        soft = torch.sigmoid((law.logit - logistic(draws.eps)) / temperature)
    else:
        assert isinstance(law, Categorical)
        soft = torch.softmax((law.log_probs + gumbel(draws.eps)) / temperature, -1)
    hard = draws.fixed()
    relaxed = hard + (soft - soft.detach()) if straight_through else soft
    values = draws.value(hard)
    return Surrogate(values.detach(), draws.value(relaxed))


def straight_through(draws: Draws, *, temperature: float = 0.5) -> Surrogate:
    """The same with f' at the exact draw."""
    return gumbel_softmax(draws, temperature=temperature, straight_through=True)


def needs_relaxation(law: Law) -> str | None:
    """Why (1) and (2) cannot be used."""
    return law.no_density() if isinstance(law, Bernoulli | Categorical) else "it relaxes Bernoulli and Categorical laws"


def check_temperature(temperature) -> None:
    """Raise ArgumentError unless it is a positive number."""
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise ArgumentError(f"`temperature` must be a positive number, got {temperature!r}: 0.1 ... 1 is usual.")
