"""Draws to look at before a run, and ways to move them and the parameters a little.

Their noise is away from any stream that a run uses, so nothing a check sees is used again.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from sdesens.estimators.draws import Draws
from sdesens.estimators.laws import Law
from sdesens.estimators.run import Task
from sdesens.estimators.torch_law import TorchLaw
from sdesens.noise import Philox
from sdesens.sde import Params

PROBE = Philox(0, 0xFFFFFFFE)


def draws_of(task: Task, count: int, theta: Params | None = None) -> Draws:
    """Some draws of a task, at theta or at the question's own parameters."""
    eps, extra = task.normals(0, count + count % task.noise.unit)
    return task.draws(task.question.theta if theta is None else theta, eps, extra, task.question.x)


def moved(theta: Params, direction: Params, e: float) -> Params:
    """Parameters a step of length e along a direction."""
    return {k: v.detach() + e * direction[k] for k, v in theta.items()}


def direction_of(v: Tensor, stream: int) -> Tensor:
    """A made-up move of a parameter, of its own size; a symmetric matrix stays one."""
    move = signs(v, stream) * (v.detach().abs() + v.detach().abs().mean())
    symmetric = v.dim() > 1 and v.shape[-1] == v.shape[-2] and torch.equal(v.detach(), v.detach().mT)
    return (move + move.mT) / 2 if symmetric else move


def signs(like: Tensor, stream: int) -> Tensor:
    """Signs and sizes of a made-up direction."""
    z = PROBE.normals(0, like.numel(), stream, 1, 1, dtype=like.dtype, device=like.device)
    return z.reshape(like.shape)


def spread_of(u: Tensor) -> Tensor:
    """Spread over draws, axis 0, of each component of each item: from quartiles, which heavy tails leave alone."""
    ordered = u.sort(0).values
    spread = (ordered[3 * len(u) // 4] - ordered[len(u) // 4]) / 1.35
    return torch.where(spread > 0, spread, 1.0)


def free(law: Law) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Maps between a law's support and coordinates that may be moved freely."""
    if isinstance(law, TorchLaw):
        try:
            to = biject_to(law.distribution.support)
        except NotImplementedError:
            return _same, _same
        return to, to.inv
    low, high = law.bounds
    if (low, high) == (0.0, math.inf):
        to = biject_to(constraints.positive)
        return to, to.inv
    return _same, _same


def _same(z: Tensor) -> Tensor:
    return z
