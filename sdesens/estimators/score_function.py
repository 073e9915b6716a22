"""Score function, also likelihood ratio or REINFORCE: differentiate the density, not the draw.

    int f grad q dz = E[ (f(z) - c) grad log q(z) ],    since E[grad log q] = 0.                 (1)

f need not even be continuous. The constant c changes the variance alone:

    "none"            c = 0
    "leave_one_out"   of K draws, c_i = mean of the f_j with j != i; K draws are one unit        (2)
    "optimal"         c* = E[f s^2] / E[s^2] for each coordinate's s, from draws of its own     (3)
    a number          that number

(2) is the sample covariance of s and f, unbiased (W. Kool, H. van Hoof, M. Welling, 2019). For (3) the multiple of s that is
subtracted is the regression coefficient of f s + grad f on s, which is c* where f does not depend on p.
References: R. Williams, Machine Learning 8 (1992) 229; S. Mohamed et al., JMLR 21 (2020) 132.
"""

from sdesens.errors import ArgumentError
from sdesens.estimators.draws import Draws, Surrogate
from sdesens.estimators.laws import Law

BASELINES = ("none", "leave_one_out", "optimal")


def score_function(draws: Draws, *, baseline: str | float = "none", group: int = 1) -> Surrogate:
    """Equation (1); `group` is K of equation (2)."""
    z = draws.fixed()
    log_q = draws.log_prob(z)  # first: f might write into z
    values = draws.value(z)
    f = values.detach()
    if baseline == "leave_one_out":
        of_group = f.unflatten(0, (-1, group))  # (L / K, K, n)
        f = ((of_group - of_group.mean(1, keepdim=True)) * (group / (group - 1))).flatten(0, 1)
    elif not isinstance(baseline, str):
        f = f - baseline
    return Surrogate(values.detach(), f * log_q + values, log_q if baseline == "optimal" else None)


def rloo(draws: Draws, *, group: int = 2) -> Surrogate:
    """REINFORCE with leave-one-out baseline, equation (2) with K = `group`."""
    return score_function(draws, baseline="leave_one_out", group=group)


def needs_density(law: Law) -> str | None:
    """Why (1) cannot be used."""
    return law.no_density()


def check_baseline(baseline) -> None:
    """Raise ArgumentError unless it is one of the choices or a finite number."""
    number = isinstance(baseline, int | float) and not isinstance(baseline, bool) and abs(baseline) < float("inf")
    if not number and baseline not in BASELINES:
        raise ArgumentError(
            f"`baseline` must be one of {', '.join(map(repr, BASELINES))}, or a number, got {baseline!r}."
        )
