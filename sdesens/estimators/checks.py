"""What is checked about a question before it is answered, on a few draws.

    functions    draws and f depend on what they are given alone, row by row and item by item
    the score    has mean zero, and belongs to the draw: E[grad log q] = 0, E[h grad log q] = E[grad h]
    reach        every parameter is reached by the graph of the result, and autograd sees all of its influence
    jumps        nothing jumps where a derivative is taken

A parameter that is not reached, a part that is detached or a jump would give a number that looks like an answer.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from sdesens.audit import jumps
from sdesens.errors import DetachedError, JumpError, MethodError, NotAFunctionError, UnusedParameterError
from sdesens.estimators.chain import Chain
from sdesens.estimators.draws import Draws, evaluate
from sdesens.estimators.laws import Law
from sdesens.estimators.methods import applicable
from sdesens.estimators.model import law_at, with_graph
from sdesens.estimators.own import Own
from sdesens.estimators.run import Task
from sdesens.estimators.torch_law import TorchLaw
from sdesens.noise import Philox
from sdesens.sde import Params

PROBE = Philox(0, 0xFFFFFFFE)  # away from any stream that a run uses
ROWS = 4  # draws, and items, that are looked at one by one
LINES = 16  # draws along which derivatives are compared
AUDITED = 8192  # draws that are looked at for jumps
GROUPS, GROUP = 50, 40  # draws from which a density is judged
ALARM = 6.0  # of Student's t with 49 degrees of freedom: 2e-7 a coordinate
THROUGH_SCORE = ("score_function", "rloo")
THROUGH_F = ("pathwise", "gumbel_softmax", "straight_through")  # methods that differentiate f in z


def check_functions(task: Task) -> None:
    """Raise unless draws and f are functions of what they are given, row by row.

    Raises
    ------
    NotAFunctionError, ShapeError, ArgumentTypeError, DtypeError
    """
    probe = replace(task, noise=PROBE)
    with probe.generator(0):
        _check_rows(probe)
    if probe.opaque:
        _check_generator(probe)


def divisible(task: Task) -> bool:
    """Whether an item alone has the law and the f that it has among the others."""
    x = task.question.x
    if x is None or len(x) == 1:
        return True
    probe = replace(task, noise=PROBE)
    with torch.no_grad(), probe.generator(0):
        try:
            return not _items_differ(probe, x)
        except (ValueError, RuntimeError, IndexError, TypeError):
            return False  # parameters with a row for each item


def check_method(task: Task) -> None:
    """Raise unless the task's method gives the gradient of every parameter asked for.

    Raises
    ------
    DetachedError, UnusedParameterError, JumpError, MethodError
    """
    if task.choice.name in THROUGH_SCORE:
        fault = density_fault(task)
        if fault is not None:
            raise MethodError(f"method={task.choice.name!r} cannot be used for this model: {fault}.")
    probe = replace(task, noise=PROBE)
    with probe.generator(0):
        _check_reached(probe)
        check_explicit(probe)
        _check_law(probe)
        if task.choice.name in THROUGH_F:
            _check_along(probe)
        if task.choice.name == "pathwise" and pathwise_jump(probe):
            others = [k for k in applicable(task.law, task.question.x is not None) if k != "pathwise"]
            raise JumpError(
                "`f` jumps along z (a comparison, a rounding, a sign), so the pathwise gradient misses a part of the answer, or "
                f"all of it. Unbiased methods that apply: {', '.join(map(repr, others)) or 'none; give the model a log_prob'}. "
                "If f is continuous but very steep, check=False skips this check."
            )


def check_explicit(task: Task) -> None:
    """Raise if f jumps, or hides a part of itself from autograd, as a function of the parameters at fixed draws."""
    if explicit_jump(task):
        raise JumpError(
            "`f` jumps as a function of the parameters themselves, at a fixed draw: E[grad f], which every method needs, "
            "misses the jump. Move the parameter into the law (a threshold on z is a shift of z)."
        )
    q = task.question
    with torch.no_grad():
        z = _draws(task, LINES).made()
    for i, (name, v) in enumerate(q.theta.items()):
        line = v.detach(), _direction(v, i)

        def along(s: Tensor, name: str = name, line: tuple[Tensor, Tensor] = line) -> Tensor:
            return evaluate(q.f, z, q.x, {**q.params, **q.theta, name: line[0] + s * line[1]}).flatten()

        _check_derivative(along, f"`f` depends on {name!r}")


def refuses_pathwise(task: Task) -> str | None:
    """Why the pathwise gradient of a reparameterised law would miss something; None if it would not."""
    probe = replace(task, noise=PROBE)
    with probe.generator(0):
        draws = _draws(probe, ROWS)
        if _cut_off(draws):
            return "f is cut off from z"
        try:
            _check_along(probe)
        except DetachedError:
            return "f is cut off from z in part"
        return "f jumps along z" if pathwise_jump(probe) else None


def _draws(task: Task, count: int, theta: Params | None = None) -> Draws:
    eps, extra = task.normals(0, count + count % task.noise.unit)
    return task.draws(task.question.theta if theta is None else theta, eps, extra, task.question.x)


# Functions of what they are given


def _check_rows(task: Task) -> None:
    q, p = task.question, {**task.question.params, **task.question.theta}
    with torch.no_grad():
        draws = _draws(task, ROWS)
        z = draws.made()
        if not task.opaque and not (torch.equal(z, draws.made()) and torch.equal(z, _draws(task, ROWS).made())):
            raise NotAFunctionError(
                "the model drew two different results from the same noise: it may not draw random numbers of its own. Write it as "
                "a function of eps, or use Sampler for a draw that is not one."
            )
        held = z.clone()
        values = draws.value(z)
        if not torch.equal(z, held):
            raise NotAFunctionError(
                "`f` writes into z, which others read after it: use abs, clamp, ... without the underscore."
            )
        if not torch.equal(values.nan_to_num(), draws.value(z).nan_to_num()):
            raise NotAFunctionError(
                "`f` gave two different results for the same draws: it may not draw random numbers."
            )
        if not task.opaque:
            alone = torch.cat([draws.law.draw(e[None]) for e in draws.eps])
            if _differ(alone, z):
                raise NotAFunctionError(
                    "the model mixes rows of its noise: a draw alone is another one than in a batch. Reduce over components, never "
                    "over the first axis of eps."
                )
        if _differ(torch.cat([evaluate(q.f, row[None], q.x, p) for row in z]), values):
            raise NotAFunctionError(
                "`f` mixes draws: a draw alone gives another number than in a batch. Reduce over components, never over the "
                "first axis of z."
            )


def _items_differ(task: Task, x: Tensor) -> bool:
    q, p = task.question, {**task.question.params, **task.question.theta}
    draws = _draws(task, ROWS)
    z = draws.made()
    values = draws.value(z)
    for i in range(min(len(x), ROWS)):
        one, here = x[i : i + 1], slice(i, i + 1)
        law = law_at(q.model, one, p)
        if task.opaque:
            dense = law.no_density() is None
            moved = dense and _differ(_log_prob(law, z[:, here]), _log_prob(draws.law, z)[:, here])
        else:
            moved = _differ(law.draw(draws.eps[:, here]), z[:, here])
        if moved or _differ(evaluate(q.f, z[:, here], one, p), values[:, here]):
            return True
    return False


def _log_prob(law: Law, z: Tensor) -> Tensor:
    return law.log_prob(z).reshape(*z.shape[:2], -1).sum(-1)


def _differ(a: Tensor, b: Tensor) -> bool:
    scale = torch.finfo(b.dtype).eps ** 0.5 * (1 + b.abs().nan_to_num())
    return a.shape != b.shape or bool(((a - b).abs().nan_to_num() > scale).any())


def _check_generator(task: Task) -> None:
    """An opaque sampler draws from torch's generator, which is what `seed` sets."""
    with torch.no_grad():
        law, rows = task.law, task.normals(0, 64)[0]
        draws = []
        for first in (0, 0, 1):
            with task.generator(first):
                draws.append(law.draw(rows))
    constant = bool((draws[0] == draws[0][:1]).all())
    if not torch.equal(draws[0], draws[1]) or (torch.equal(draws[0], draws[2]) and not constant):
        raise NotAFunctionError(
            "`sample` does not draw from torch's generator, so `seed` has no hold of it: use torch.rand and its like, not random or "
            "numpy."
        )


# The score


def density_fault(task: Task) -> str | None:
    """Why a density that is not our own cannot be used: its score must have mean zero, and fit the draw where that has a derivative."""
    q = task.question
    law = with_graph(q)  # sees which of its tensors depend on the parameters
    if not isinstance(law, Own | TorchLaw) or law.no_density() is not None:
        return None
    probe = replace(task, noise=PROBE)
    leaves = {k: v.detach().requires_grad_() for k, v in q.theta.items()}
    rows = []
    with probe.generator(1), torch.enable_grad():
        for g in range(GROUPS):
            eps, extra = probe.normals(g * GROUP, GROUP)
            draws = probe.draws(leaves, eps, extra, q.x)
            z = draws.made()
            log_q = draws.log_prob(z.detach())
            tests = [log_q.mean()]
            if isinstance(law, Own) and law.reparameterised:
                h = draws.per_item(z)
                centred = (h - h.mean(0)).detach() * (GROUP / (GROUP - 1))
                tests.append((centred * log_q - h).mean())
            rows.append(torch.stack([_flat_gradient(t, leaves) for t in tests]))
    found = torch.stack(rows)  # (GROUPS, tests, P)
    spread = found.std(0) / math.sqrt(GROUPS)
    wrong = (found.mean(0).abs() > ALARM * spread + 1e-9 * found.abs().mean(0)).any(-1)
    if bool(wrong[0]):
        return (
            "`log_prob` is no log density of the draws, the mean of its gradient is not zero: it must have its normalising constant, as "
            "far as that depends on the parameters, and a support that does not; and torch clamps draws of extreme laws"
        )
    return "`log_prob` does not belong to g(eps), their gradients of E[z] differ" if bool(wrong.any()) else None


def _flat_gradient(y: Tensor, leaves: Params) -> Tensor:
    found = [None] * len(leaves) if not y.requires_grad else torch.autograd.grad(y, list(leaves.values()), retain_graph=True, allow_unused=True)  # fmt: skip
    return torch.cat(
        [
            (torch.zeros_like(v) if g is None else g).flatten().double()
            for g, v in zip(found, leaves.values(), strict=True)
        ]
    )


# Reach


def _check_reached(task: Task) -> None:
    leaves = {k: v.detach().requires_grad_() for k, v in task.question.theta.items()}
    with torch.enable_grad():
        draws = _draws(task, task.unit * ROWS, leaves)
        surrogate = task.choice(draws).surrogate
        found = torch.autograd.grad(surrogate.sum(), list(leaves.values()), allow_unused=True) if surrogate.requires_grad else [None] * len(leaves)  # fmt: skip
        missing = [k for k, g in zip(leaves, found, strict=True) if g is None]
        if missing and task.choice.name in THROUGH_F and _cut_off(draws):
            raise DetachedError(
                "`f` returned a tensor that is cut off from z (a comparison, detach(), .item(), numpy, or a cast): its "
                f"{task.choice.name} gradient would be missing, not zero. Use a method that needs no derivative of f, such as "
                "'score_function'."
            )
    if missing:
        raise UnusedParameterError(
            f"the result cannot depend on {', '.join(map(repr, missing))}: it enters neither the law nor f as a tensor (or only "
            "detached). Leave it out of `wrt`, or use it."
        )


def _check_law(task: Task) -> None:
    """The law in its parameters: draws of a fixed noise, or the density of fixed draws."""
    q = task.question
    pathwise = task.choice.name == "pathwise" and not isinstance(task.law, TorchLaw)
    if not pathwise and (task.choice.name == "pathwise" or task.law.no_density() is not None):
        return
    with torch.no_grad():
        draws = _draws(task, LINES)
        z = draws.law.fixed(draws.made())
    weights = _signs(z, 0)
    for i, (name, v) in enumerate(q.theta.items()):
        line = v.detach(), _direction(v, i)

        def along(s: Tensor, name: str = name, line: tuple[Tensor, Tensor] = line) -> Tensor:
            moved = task.draws({**q.theta, name: line[0] + s * line[1]}, draws.eps, draws.extra, q.x)
            return (moved.per_item(weights * moved.made()) if pathwise else moved.log_prob(z)).flatten()

        _check_derivative(along, f"the law depends on {name!r}")


def _cut_off(draws: Draws) -> bool:
    with torch.enable_grad():
        z = draws.made().detach().requires_grad_()
        values = draws.value(z)
        return not values.requires_grad or torch.autograd.grad(values.sum(), z, allow_unused=True)[0] is None


def _check_along(task: Task) -> None:
    """f along z: what autograd sees must be all there is."""
    q, p = task.question, {**task.question.params, **task.question.theta}
    with torch.no_grad():
        z = _draws(task, LINES).made()
    if task.choice.name != "pathwise" and not (task.choice.name == "" or isinstance(task.law, TorchLaw)):
        z = z.clamp(0.05, 0.95)  # where a relaxed draw of zeros and ones may be
    move = 0.1 * (z.abs() + z.abs().mean()) * _signs(z, 0)
    to, back = _free(task.law)
    at = back(z)
    _check_derivative(lambda s: evaluate(q.f, to(at + s * move), q.x, p).flatten(), "`f` depends on z")


def _check_derivative(F: Callable[[Tensor], Tensor], what: str) -> None:
    """Compare autograd with central differences along a line, row by row.

    A kink or a jump within the difference may spoil a row or two, and rows where two steps disagree say nothing; three rows that are
    wrong are no accident.
    """
    try:
        s = torch.zeros((), dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            values = F(s)
            own = [
                torch.autograd.grad(v, s, retain_graph=True, allow_unused=True)[0] if v.requires_grad else None
                for v in values
            ]
        step = torch.finfo(values.dtype).eps ** (1 / 3)
        with torch.no_grad():
            wide, numeric = ((F(torch.tensor(h)) - F(torch.tensor(-h))).double() / (2 * h) for h in (2 * step, step))
    except (ValueError, RuntimeError, ArithmeticError):
        return  # nothing to compare with
    seen = torch.tensor([0.0 if g is None else float(g) for g in own], dtype=torch.float64)
    rounding = 1e3 * step**2 * values.detach().double().abs() + 1e-30
    size = torch.maximum(seen.abs(), numeric.abs())
    sure = (wide - numeric).abs() <= 0.02 * size + rounding
    wrong = sure & ~((seen - numeric).abs() <= 0.05 * size + rounding)
    if int(wrong.sum()) > 2:
        i = int(wrong.nonzero()[0])
        raise DetachedError(
            f"{what} by {float(numeric[i]):.4g} (central difference on a draw), but autograd sees {float(seen[i]):.4g}: a part of it is "
            "detached (.item(), float(), .detach(), numpy, no_grad), or a custom backward is wrong."
        )


# Jumps


def explicit_jump(task: Task) -> bool:
    """Whether f jumps in the parameters at fixed draws."""
    q = task.question
    with torch.no_grad():
        z = _draws(task, _audited(task)).made()
        spread = _spread(z).median()  # a threshold that is 0 itself is compared with draws
        direction = {k: _signs(v, i) * (v.detach().abs() + spread) for i, (k, v) in enumerate(q.theta.items())}
        return _jumps(lambda e: evaluate(q.f, z, q.x, {**q.params, **_moved(q.theta, direction, e)}).flatten())


def pathwise_jump(task: Task) -> bool:
    """Whether f jumps along the draws: about in their support, or as the user's own g moves with the parameters."""
    q, count = task.question, _audited(task)
    p = {**q.params, **q.theta}
    with torch.no_grad():
        z = _draws(task, count).made()
        to, back = _free(task.law)
        u = back(z)
        step = _spread(u) * _signs(u[0], 0)
        if _jumps(lambda e: evaluate(q.f, to(u + e * step), q.x, p).flatten()):
            return True
        if not isinstance(task.law, Own | Chain):
            return False
        direction = {k: _signs(v, i) * (v.detach().abs() + 0.1) for i, (k, v) in enumerate(q.theta.items())}
        return _jumps(lambda e: _along(task, count, _moved(q.theta, direction, e)))


def _spread(u: Tensor) -> Tensor:
    """Spread over draws, axis 0, of each component of each item: from quartiles, which heavy tails leave alone."""
    low, high = u.double().quantile(torch.tensor([0.25, 0.75], dtype=torch.float64, device=u.device), 0)
    spread = (high - low) / 1.35
    return torch.where(spread > 0, spread, 1.0).to(u.dtype)


def _free(law: Law) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
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


def _along(task: Task, count: int, theta: Params) -> Tensor:
    draws = _draws(task, count, theta)
    return draws.value(draws.made()).flatten()


def _jumps(F: Callable[[float], Tensor]) -> bool:
    try:
        return jumps(F)
    except (ValueError, RuntimeError, ArithmeticError):
        return False  # the parameters cannot be moved freely: nothing to compare with


def _moved(theta: Params, direction: Params, e: float) -> Params:
    return {k: v.detach() + e * direction[k] for k, v in theta.items()}


def _direction(v: Tensor, stream: int) -> Tensor:
    """A made-up move of a parameter, of its own size; a symmetric matrix stays one."""
    move = _signs(v, stream) * (v.detach().abs() + v.detach().abs().mean())
    symmetric = v.dim() > 1 and v.shape[-1] == v.shape[-2] and torch.equal(v.detach(), v.detach().mT)
    return (move + move.mT) / 2 if symmetric else move


def _signs(like: Tensor, stream: int) -> Tensor:
    """Signs and sizes of a made-up direction."""
    z = PROBE.normals(0, like.numel(), stream, 1, 1, dtype=like.dtype, device=like.device)
    return z.reshape(like.shape)


def _audited(task: Task) -> int:
    return max(AUDITED // task.question.n_items, 16)
