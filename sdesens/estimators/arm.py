"""ARM, augment-REINFORCE-merge: a coin's gradient in its logit from two evaluations that share one uniform.

    d/dl E[f] = E[ (f(1{u > sigma(-l)}) - f(1{u < sigma(l)})) (u - 1/2) ],   u uniform on (0, 1).   (1)

For several coins (1) holds with vectors u and l; f is still evaluated only twice. Unbiased.
Reference: M. Yin, M. Zhou, ICLR 2019.
"""

from torch.special import ndtr

from sdesens.estimators.discrete import Bernoulli
from sdesens.estimators.draws import Draws, Surrogate
from sdesens.estimators.laws import Law


def arm(draws: Draws) -> Surrogate:
    """Equation (1)."""
    law = draws.law
    assert isinstance(law, Bernoulli)
    u, p = ndtr(draws.eps), law.p.detach()
    first, second = draws.value((u > 1 - p).to(u.dtype)), draws.value((u < p).to(u.dtype))
    values = (first + second) / 2
    per_item = (u - 0.5) * law.logit
    return Surrogate(values.detach(), (first - second).detach() * draws.per_item(per_item) + values)


def needs_coins(law: Law) -> str | None:
    """Why (1) cannot be used."""
    return law.no_density() if isinstance(law, Bernoulli) else "it is written for Bernoulli laws"
