"""Does autograd see all of a function? A part that is detached makes a gradient that looks like an answer.

Derivatives by autograd are held against central differences: f in z, f in the parameters, the law in the parameters. Only a gross
gap counts, for a wrong number hides nothing less: .item(), detach(), numpy, no_grad, or a custom backward that is wrong.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sdesens.errors import DetachedError
from sdesens.estimators.draws import evaluate
from sdesens.estimators.probe import direction_of, draws_of, free, signs
from sdesens.estimators.run import Task
from sdesens.estimators.torch_law import TorchLaw

LINES = 16  # draws along which derivatives are compared


def check_explicit(task: Task) -> None:
    """f in the parameters, at fixed draws.

    Raises
    ------
    DetachedError
    """
    q = task.question
    with torch.no_grad():
        z = draws_of(task, LINES).made()
    for i, (name, v) in enumerate(q.theta.items()):
        line = v.detach(), direction_of(v, i)

        def along(s: Tensor, name: str = name, line: tuple[Tensor, Tensor] = line) -> Tensor:
            return evaluate(q.f, z, q.x, {**q.p, name: line[0] + s * line[1]}).flatten()

        check_derivative(along, f"`f` depends on {name!r}")


def check_law(task: Task) -> None:
    """The law in its parameters: draws of a fixed noise, or the density of fixed draws."""
    q = task.question
    pathwise = task.choice.name == "pathwise" and not isinstance(task.law, TorchLaw)
    if not pathwise and (task.choice.name == "pathwise" or task.law.no_density() is not None):
        return
    with torch.no_grad():
        draws = draws_of(task, LINES)
        z = draws.law.fixed(draws.made())
    weights = signs(z, 0)
    for i, (name, v) in enumerate(q.theta.items()):
        line = v.detach(), direction_of(v, i)

        def along(s: Tensor, name: str = name, line: tuple[Tensor, Tensor] = line) -> Tensor:
            moved = task.draws({**q.theta, name: line[0] + s * line[1]}, draws.eps, draws.extra, q.x)
            return (moved.per_item(weights * moved.made()) if pathwise else moved.log_prob(z)).flatten()

        check_derivative(along, f"the law depends on {name!r}")


def check_along(task: Task) -> None:
    """f along z: what autograd sees must be all there is."""
    q, p = task.question, task.question.p
    with torch.no_grad():
        z = draws_of(task, LINES).made()
    if task.choice.name in ("gumbel_softmax", "straight_through"):
        z = z.clamp(0.05, 0.95)  # where a relaxed draw of zeros and ones may be
    move = 0.1 * (z.abs() + z.abs().mean()) * signs(z, 0)
    to, back = free(task.law)
    at = back(z)
    check_derivative(lambda s: evaluate(q.f, to(at + s * move), q.x, p).flatten(), "`f` depends on z")


def check_derivative(F: Callable[[Tensor], Tensor], what: str) -> None:
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
