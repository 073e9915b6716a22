"""Which methods can answer a question, and what each of them differentiates along the path.

    pathwise, forward, adjoints     F itself: it may not jump
    conditional                     the expectation that F declares: it may not jump
    vibrato                         F at a last state whose noisy components stand still
    malliavin                       F with the noisy components standing still at every output time
    likelihood_ratio                the same, the others run along the fixed path of the noisy ones
    finite_difference               nothing

"Standing still" leaves what moves all the same: a strike that is differentiated, a discount, a running integral. A jump there is
as silent as any other, and `judge` looks for it too. The laws behind the last three need noise; what they say of that is asked of
them, not guessed.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sdesens.audit import Audit, look
from sdesens.errors import HighVarianceWarning, JumpError, JumpWarning, SdesensError
from sdesens.integrate import euler
from sdesens.noise import Noise, Philox
from sdesens.problem import Problem, Theta
from sdesens.sde import SDE, Params
from sdesens.sensitivity import SMOOTHED
from sdesens.sensitivity.conditional import smoothed
from sdesens.sensitivity.probe import check_problem
from sdesens.sensitivity.tile import Tile
from sdesens.sensitivity.transition import Parts, check_span, parts_of, reached

ALONG = ("pathwise", "forward", "adjoint", "torchsde_adjoint")  # these differentiate F itself along the path
AUDIT = ("warn", "allow", False)
UNBIASED = ("pathwise", "forward", "conditional", "vibrato", "malliavin", "likelihood_ratio")  # of the chain's gradient
ROWS = 20_000  # of an audit's pass
RARE = 0.01  # of the paths: a singularity that fewer come near is the tail's business
PILOT = 4_000  # paths from which constants are taken
PILOT_STREAM = 0xFFFFFFFB  # away from any stream that a run uses


@dataclass(frozen=True)
class Case:
    """A question that passed its checks, and what is known of it so far."""

    problem: Problem
    theta: dict[str, Tensor]
    noise: Noise
    noise_dim: int
    vectorised: bool
    n_paths: int

    def pilot(self, count: int = PILOT, group: int = 20) -> Tile:
        """Paths to learn from, on noise of their own: what is learnt does not depend on the run that uses it."""
        noise = Philox(0, PILOT_STREAM)
        return Tile(self.problem, noise, 0, count, group, self.noise_dim, self.vectorised)

    @property
    def rows(self) -> int:
        """Rows of an audit's pass: a tenth of the run, within bounds."""
        return min(max(self.n_paths // 10, 6_000), ROWS)

    def audit(self, problem: Any = None, evaluate: Any = None) -> Audit:
        """Look at something that moves with theta: the functional, unless another view or evaluation is given."""
        return look(
            problem or self.problem, self.theta, self.noise_dim, n_paths=self.rows, vectorised=self.vectorised, evaluate=evaluate
        )  # fmt: skip

    @cached_property
    def plain(self) -> Audit:
        """Of the functional itself."""
        return self.audit()

    def seen(self, method: str) -> Audit | None:
        """Of what the method differentiates along the path; None if that is nothing."""
        q, theta = self.problem, self.theta
        if method == "finite_difference":
            return None
        if method == "conditional":
            measure = smoothed(q, theta, self.noise_dim)
            return self.audit(_View(q, outputs=measure.outputs), lambda ys, ys0, th: measure(th, ys, None))
        if method in ("vibrato", "malliavin", "likelihood_ratio"):
            parts = parts_of(q, theta, self.noise_dim, f"method={method!r}")
            if method == "likelihood_ratio":
                return self.audit(_replayed(q, theta, parts))
            return self.audit(evaluate=_held(q, parts, method))
        return self.plain

    def refusal(self, method: str) -> str | None:
        """Why a method cannot be used, for want of noise, of a declaration, or because what it differentiates jumps."""
        try:
            STRUCTURE.get(method, _anything)(self)
            seen = self.seen(method)
        except SdesensError as error:
            return str(error)
        return None if seen is None or seen.kind != "jump" else _jumps(method, seen)

    def applicable(self) -> list[str]:
        """The unbiased methods that can be used."""
        return [m for m in UNBIASED if self.refusal(m) is None]


def _anything(case: Case) -> None:
    pass


def _attached(case: Case) -> None:
    check_problem(case.problem, case.theta)


STRUCTURE: dict[str, Callable[[Case], Any]] = {
    "pathwise": _attached,
    "forward": _attached,
    "conditional": lambda case: smoothed(case.problem, case.theta, case.noise_dim),
    "vibrato": lambda case: reached(case.problem, case.theta, case.noise_dim, "method='vibrato'"),
    "malliavin": lambda case: reached(case.problem, case.theta, case.noise_dim, "method='malliavin'"),
    "likelihood_ratio": lambda case: check_span(
        case.problem, case.theta, case.noise_dim, "method='likelihood_ratio'"
    ),
}  # fmt: skip


def judge(case: Case, method: str, options: dict[str, Any], *, allow: bool) -> Audit | None:
    """Look at what a method differentiates along the path, and say what is wrong with it.

    Raises
    ------
    JumpError
        If it jumps, unless that is allowed; then a JumpWarning.
    MethodError
        If the method cannot be used.
    """
    if method in SMOOTHED:  # the others passed their check before
        STRUCTURE[method](case)
    seen = case.seen(method)
    if seen is None:
        return None
    if seen.kind == "jump":
        others = [m for m in case.applicable() if m != method]
        text = _jumps(method, seen)
        if allow:
            warnings.warn(f"{text} The result misses it.", JumpWarning, stacklevel=5)
            return seen
        raise JumpError(
            f"{text} Unbiased methods that apply: {', '.join(map(repr, others)) or 'none'}; method='auto' takes the best of them. "
            "method='finite_difference' with a wide relative_step, such as 0.02, sees the jump with a bias. audit='allow' computes "
            "the derivative without it all the same."
        )
    if seen.steep or (seen.singular and seen.share > RARE):
        what = (
            "is steep, close to a jump"
            if seen.steep
            else "has a derivative with infinite variance (a square root at 0)"
        )
        warnings.warn(
            f"what method={method!r} differentiates along the path {what}: {seen.reason}. The gradient is unbiased, but its "
            "standard error may be far too small. Compare with method='auto'.",
            HighVarianceWarning,
            stacklevel=5,
        )
    return seen


def _jumps(method: str, seen: Audit) -> str:
    what = {
        "conditional": "what the functional declares as its conditional expectation",
        "vibrato": "the functional, even with the last state's noisy components held,",
        "malliavin": "the functional, even with the path's noisy components held,",
        "likelihood_ratio": "the functional, even along a path held fixed,",
    }.get(method, "the functional (or a coefficient)")
    return (
        f"{what} jumps: {seen.reason}. A derivative along the path, as method={method!r} takes it, exists on "
        "almost every path and misses the jump; for a digital option it is silently zero."
    )


class _View:
    """A problem with some of its attributes replaced, for an audit of something else than its functional."""

    def __init__(self, problem: Problem, **replaced: Any):
        self.__dict__.update(replaced)
        self._problem = problem

    def __getattr__(self, name: str):
        return getattr(self._problem, name)


def _held(problem: Problem, parts: Parts, method: str) -> Callable[[Tensor, Tensor, Theta], Tensor]:
    """The functional of moved states ys (T, B, *event) with the noisy components of ys0 standing still."""

    def evaluate(ys: Tensor, ys0: Tensor, theta: Theta) -> Tensor:
        first = len(ys) - 1 if method == "vibrato" else 1
        shown = torch.cat((ys[:first], torch.where(parts.noisy, ys0[first:], ys[first:])))
        return problem.functional(shown, problem.params(theta))

    return evaluate


def _replayed(problem: Problem, theta: Theta, parts: Parts) -> _View:
    """The problem along paths whose noisy components are held: states are pairs (B, 2, *event), held and moved."""
    sde, p0, y0 = problem.sde, problem.params(theta), problem.initial(theta)

    def step(_: SDE, p: Params, t: Tensor, dt: Tensor, y: Tensor, dW: Tensor) -> Tensor:
        held, moved = y[:, 0], y[:, 1]
        held = euler.step(sde, p0, t, dt, held, dW)
        return torch.stack((held, torch.where(parts.noisy, held, moved + sde.drift(t, moved, p) * dt)), 1)

    return _View(
        problem,
        sde=replace(sde, step=step),
        initial=lambda th: torch.stack((y0, problem.initial(th))),
        functional=lambda ys, p: problem.functional(ys[:, :, 1], p),
    )
