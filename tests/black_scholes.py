"""Black-Scholes in one exact step: prices, their derivatives, and the exact spread of one path of every estimator.

S_T = s0 exp((r - sigma^2 / 2) T + a Z), a = sigma sqrt(T), so that each estimator is a function of one normal Z and its standard
deviation an integral over it, done here by quadrature. Formulas: P. Glasserman, Monte Carlo Methods in Financial Engineering,
2003, chapter 7; M. Broadie, P. Glasserman, Management Science 42 (1996) 269.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import integrate
from scipy.stats import norm

S0, STRIKE, R, SIGMA, T = 100.0, 100.0, 0.05, 0.2, 1.0
A, DISCOUNT = SIGMA * math.sqrt(T), math.exp(-R * T)
D1 = (math.log(S0 / STRIKE) + (R + SIGMA**2 / 2) * T) / A
D2 = D1 - A
EXACT = {
    "call": {
        "value": S0 * norm.cdf(D1) - STRIKE * DISCOUNT * norm.cdf(D2),
        "s0": norm.cdf(D1),
        "sigma": S0 * norm.pdf(D1) * math.sqrt(T),
        "r": STRIKE * T * DISCOUNT * norm.cdf(D2),
        "s0, s0": norm.pdf(D1) / (S0 * A),
        "s0, sigma": -norm.pdf(D1) * D2 / SIGMA,
        "sigma, sigma": S0 * norm.pdf(D1) * math.sqrt(T) * D1 * D2 / SIGMA,
    },
    "digital": {
        "value": DISCOUNT * norm.cdf(D2),
        "s0": DISCOUNT * norm.pdf(D2) / (S0 * A),
        "sigma": -DISCOUNT * norm.pdf(D2) * D1 / SIGMA,
        "r": DISCOUNT * (norm.pdf(D2) * math.sqrt(T) / SIGMA - T * norm.cdf(D2)),
        "s0, s0": -DISCOUNT * norm.pdf(D2) * D1 / (S0 * A) ** 2,
    },
}


def price(z):
    return S0 * np.exp((R - SIGMA**2 / 2) * T + A * z)


def payoff(kind: str, z):
    gain = price(z) - STRIKE
    return DISCOUNT * (np.maximum(gain, 0) if kind == "call" else (gain > 0))


SCORES: dict[str, Callable] = {  # of the law of log S_T; the discount's derivative comes on top for r
    "s0": lambda z: z / (S0 * A),
    "sigma": lambda z: (z * z - 1) / SIGMA - z * math.sqrt(T),
    "r": lambda z: z * math.sqrt(T) / SIGMA - T,
}
TANGENTS: dict[str, Callable] = {  # of S_T
    "s0": lambda z: price(z) / S0,
    "sigma": lambda z: price(z) * (z * math.sqrt(T) - SIGMA * T),
    "r": lambda z: T * price(z),
}


@dataclass(frozen=True)
class Row:
    """An estimator of one derivative, as a function of Z."""

    kind: str
    method: str
    name: str
    of: Callable

    @property
    def exact(self) -> float:
        return EXACT[self.kind][self.name]

    @property
    def deviation(self) -> float:
        """Standard deviation of one path. The integrand has a kink or a jump where S_T = K."""
        return math.sqrt(expectation(lambda z: (self.of(z) - self.exact) ** 2))


def expectation(f: Callable) -> float:
    kink = -D2
    halves = ((-12.0, kink), (kink, 12.0))
    return sum(integrate.quad(lambda z: float(f(z)) * norm.pdf(z), *h, epsabs=1e-12, limit=200)[0] for h in halves)


def first_order() -> list[Row]:
    """First derivatives by the likelihood ratio (which is the Malliavin weight here), and of the call along the path."""
    rows = []
    for kind in ("call", "digital"):
        for name, score in SCORES.items():
            rows.append(Row(kind, "likelihood_ratio", name, lambda z, k=kind, s=score: payoff(k, z) * s(z)))
            rows.append(Row(kind, "malliavin", name, rows[-1].of))
    for name, tangent in TANGENTS.items():
        own = 0.0 if name != "r" else T

        def along(z, tangent=tangent, own=own):
            return DISCOUNT * (price(z) > STRIKE) * tangent(z) - own * payoff("call", z)

        rows.append(Row("call", "pathwise", name, along))
        rows.append(Row("call", "forward", name, along))
    return rows


def vibrato_delta(kind: str) -> Row:
    """Vibrato with one antithetic pair: the whole step is the last one."""
    return Row(kind, "vibrato", "s0", lambda z: z / (2 * A * S0) * (payoff(kind, z) - payoff(kind, -z)))


def second_order() -> list[Row]:
    """Gamma by two methods in a row."""
    s = S0 * A

    def lr_pw(z):
        return DISCOUNT * (price(z) > STRIKE) * STRIKE * z / (S0**2 * A)

    def pw_lr(z):
        return DISCOUNT * (price(z) > STRIKE) * price(z) / S0**2 * (z / A - 1)

    def lr(kind, z):
        return payoff(kind, z) * ((z * z - 1) / s**2 - z / (S0 * s))

    return [
        Row("call", "likelihood_ratio_pathwise", "s0, s0", lr_pw),
        Row("call", "pathwise_likelihood_ratio", "s0, s0", pw_lr),
        Row("call", "likelihood_ratio", "s0, s0", lambda z: lr("call", z)),
        Row("digital", "likelihood_ratio", "s0, s0", lambda z: lr("digital", z)),
    ]


if __name__ == "__main__":
    for row in (*first_order(), vibrato_delta("call"), vibrato_delta("digital"), *second_order()):
        mean = expectation(row.of)
        print(
            f"{row.kind:8} {row.method:26} {row.name:7} exact {row.exact:.10g}  mean {mean:.10g}  sd {row.deviation:.5g}"
        )
