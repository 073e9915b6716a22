"""Does f jump where a derivative is taken? `sdesens.jumps` decides; here is what is moved.

Along z: each component of each item by a share of its own spread, within the support; and for a law that is the user's own, or a
chain, by moving the parameters, for then the draw itself may jump. In the parameters: each by a share of its own size, draws fixed.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sdesens.estimators.chain import Chain
from sdesens.estimators.draws import evaluate
from sdesens.estimators.own import Own
from sdesens.estimators.probe import draws_of, free, moved, signs, spread_of
from sdesens.estimators.run import Task
from sdesens.jumps import jumps
from sdesens.sde import Params

AUDITED = 8192  # draws that are looked at
NUMBERS = 2**21  # but fewer, where a draw is many numbers


def explicit_jump(task: Task) -> bool:
    """Whether f jumps in the parameters at fixed draws."""
    q = task.question
    with torch.no_grad():
        z = draws_of(task, _audited(task)).made()
        spread = spread_of(z).median()  # a threshold that is 0 itself is compared with draws
        direction = {k: signs(v, i) * (v.detach().abs() + spread) for i, (k, v) in enumerate(q.theta.items())}
        return _jumps(lambda e: evaluate(q.f, z, q.x, {**q.params, **moved(q.theta, direction, e)}).flatten())


def pathwise_jump(task: Task) -> bool:
    """Whether f jumps along the draws: about in their support, or as the user's own g moves with the parameters."""
    q, count = task.question, _audited(task)
    with torch.no_grad():
        z = draws_of(task, count).made()
        to, back = free(task.law)
        u = back(z)
        step = spread_of(u) * signs(u[0], 0)
        if _jumps(lambda e: evaluate(q.f, to(u + e * step), q.x, q.p).flatten()):
            return True
        if not isinstance(task.law, Own | Chain):
            return False
        direction = {k: signs(v, i) * (v.detach().abs() + 0.1) for i, (k, v) in enumerate(q.theta.items())}
        return _jumps(lambda e: _along(task, count, moved(q.theta, direction, e)))


def _along(task: Task, count: int, theta: Params) -> Tensor:
    draws = draws_of(task, count, theta)
    return draws.value(draws.made()).flatten()


def _jumps(F: Callable[[float], Tensor]) -> bool:
    try:
        return jumps(F)
    except (ValueError, RuntimeError, ArithmeticError):
        return False  # the parameters cannot be moved freely: nothing to compare with


def _audited(task: Task) -> int:
    numbers = max(math.prod(task.law.noise), task.question.n_items)  # of one draw for each item
    return max(min(AUDITED // task.question.n_items, NUMBERS // numbers), 16)
