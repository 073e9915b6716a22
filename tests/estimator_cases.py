"""Questions that several tests of the estimators ask."""

import torch
from problems import F64, scalar

N11 = {"mean": scalar(1.0), "scale": scalar(1.0)}


def vector(*x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=F64)


def quadratic(z, p):
    return z.square()


def squared_distance(z, p):
    return (z - 0.45).square().reshape(len(z), -1).sum(1)


def variance_of_draw(result, name):
    e = result.gradient[name]
    return (e.standard_error.square() * e.n).item()


def coin(z, p):
    """f(0) = 1.5, f(1) = 4."""
    return 1.5 + 2.5 * z
