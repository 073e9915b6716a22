"""Pathwise, or reparameterised: differentiate along a fixed draw of the noise.

    z = g(eps; p),   grad E[f] = E[ f'(z) dz/dp + df/dp ].                                       (1)

Unbiased if f is continuous along z, and z a function of noise that does not depend on p. A jump of f is not seen.
References: D. Kingma, M. Welling, ICLR 2014; D. Rezende, S. Mohamed, D. Wierstra, ICML 2014.
"""

from sdesens.estimators.draws import Draws, Surrogate
from sdesens.estimators.laws import Law


def pathwise(draws: Draws) -> Surrogate:
    """f itself, with the draw left in the graph."""
    values = draws.value(draws.made())
    return Surrogate(values.detach(), values)


def needs_noise(law: Law) -> str | None:
    """Why (1) cannot be used."""
    if law.reparameterised:
        return None
    return "a draw has no derivative: write it as z = g(eps) with Reparameterised, or use the score function"
