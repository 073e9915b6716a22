"""Which methods can answer a question, and what each of them differentiates along the path.

    pathwise, forward, adjoints     F itself: it may not jump
    conditional                     the expectation that F declares: it may not jump
    vibrato                         F at a last state whose noisy components stand still, and the law of that state
    malliavin                       F with the noisy components standing still at every output time, and the path
    likelihood_ratio                F along a path whose noisy components are held, and the density of that path
    finite_difference               nothing

What stands still leaves what moves all the same: a strike that is differentiated, a discount, a running integral. And a
coefficient may jump: a regime that begins at a threshold. A jump there is as silent as any other, so these are looked at too, F and
the other in one sum. What the methods need of the noise is asked of them, not guessed.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sdesens.audit import Audit, Evaluate, look
from sdesens.errors import DetachedError, HighVarianceWarning, JumpError, JumpWarning, SdesensError
from sdesens.integrate import euler
from sdesens.noise import Noise, Philox
from sdesens.problem import Problem, Theta
from sdesens.sde import SDE, Params
from sdesens.sensitivity import SMOOTHED
from sdesens.sensitivity.conditional import Bridge, check_declared, smoothed
from sdesens.sensitivity.probe import check_problem
from sdesens.sensitivity.tile import Tile
from sdesens.sensitivity.transition import Parts, check_span, log_density, parts_of, reached
from sdesens.sensitivity.vibrato import LastStep

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
    _seen: dict[str, Audit | None] = field(default_factory=dict, init=False)

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
        if method not in self._seen:
            self._seen[method] = self._look_at(method)
        return self._seen[method]

    def _look_at(self, method: str) -> Audit | None:
        q, theta = self.problem, self.theta
        if method == "finite_difference":
            return None
        if method == "conditional":
            measure = smoothed(q, theta, self.noise_dim)
            if isinstance(measure, Bridge):  # continuous in the path and the barrier; what is left is the path
                spread = self.scales[1]
                return self.audit(evaluate=lambda ys, ys0, th: _projected(ys[1:], spread))
            return self.audit(_View(q, outputs=measure.outputs), lambda ys, ys0, th: measure(th, ys, None))
        if method in ("vibrato", "malliavin", "likelihood_ratio"):
            parts = parts_of(q, self.noise_dim, f"method={method!r}")
            if method == "likelihood_ratio":
                return self.audit(_replayed(self, parts))
            return self.audit(*(_last_step(self, parts) if method == "vibrato" else (None, _held(self, parts))))
        return self.plain

    @cached_property
    def scales(self) -> tuple[Tensor, Tensor]:
        """Spread over paths of the functional, 0-dim, and of the states at the last time, (*event); 1 where there is none."""
        with torch.no_grad():
            tile = self.pilot(200, 200)
            ys = tile.paths(self.theta)
            spreads = (tile.values(self.theta, ys).std(), ys[-1].std(0))
        value, states = (torch.where(torch.isfinite(x) & (x > 0), x, 1.0) for x in spreads)
        return value, states

    @property
    def detached(self) -> bool:
        """Whether the functional is cut off from the path, as a comparison is."""
        try:
            check_problem(self.problem, self.theta)
        except DetachedError:
            return True
        return False

    def refusal(self, method: str) -> str | None:
        """Why a method cannot be used, for want of noise, of a declaration, or because what it differentiates jumps."""
        try:
            STRUCTURE.get(method, _anything)(self)
            if self.plain.kind in ("smooth", "kink"):  # then no part of it jumps
                return None
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


def _declared(case: Case) -> None:
    measure = smoothed(case.problem, case.theta, case.noise_dim)
    check_declared(case.pilot(2_000, 2_000), case.theta, measure)


STRUCTURE: dict[str, Callable[[Case], Any]] = {
    "pathwise": _attached,
    "forward": _attached,
    "conditional": _declared,
    "vibrato": lambda case: reached(case.problem, case.noise_dim, "method='vibrato'"),
    "malliavin": lambda case: reached(case.problem, case.noise_dim, "method='malliavin'"),
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
        answer = f"methods that apply: {', '.join(map(repr, others))}; method='auto' takes the best of them"
        raise JumpError(
            f"{text} Unbiased {answer if others else 'methods that apply: none'}. "
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
        "vibrato": "the functional with the last state's noisy components held, or that state's law,",
        "malliavin": "the functional with the path's noisy components held, or the path itself,",
        "likelihood_ratio": "the functional along a path held fixed, or that path's density,",
    }.get(method, "the functional (or a coefficient)")
    return (
        f"{what} jumps: {seen.reason.split(': a pathwise')[0]}. A derivative along the path, as method={method!r} takes it, exists on "
        "almost every path and misses the jump; for a digital option it is silently zero."
    )


class _View:
    """A problem with some of its attributes replaced, for an audit of something else than its functional."""

    def __init__(self, problem: Problem, **replaced: Any):
        self.__dict__.update(replaced)
        self._problem = problem

    def __getattr__(self, name: str):
        return getattr(self._problem, name)


def _held(case: Case, parts: Parts) -> Evaluate:
    """For Malliavin weights: the functional with the noisy components standing still, and the states that its tangents come from."""
    q = case.problem
    scale, spread = case.scales

    def evaluate(ys: Tensor, ys0: Tensor, theta: Theta) -> Tensor:
        shown = torch.cat((ys[:1], torch.where(parts.noisy, ys0[1:], ys[1:])))
        return q.functional(shown, q.params(theta)) / scale + _projected(ys[1:], spread)

    return evaluate


def _last_step(case: Case, parts: Parts) -> tuple[_View, Evaluate]:
    """For vibrato: the functional with the last state's noisy components standing still, and the law that it is drawn from."""
    q, step = case.problem, LastStep(case.problem)
    scale, spread = case.scales
    outputs = tuple(sorted({*q.outputs, q.n_steps - 1}))
    own, before = [outputs.index(i) for i in q.outputs], outputs.index(q.n_steps - 1)

    def evaluate(ys: Tensor, ys0: Tensor, theta: Theta) -> Tensor:
        last = torch.where(parts.noisy, ys0[-1], ys[-1])
        shown = torch.stack([*(ys[i] for i in own[:-1]), last])
        mean, s = step.law(theta, ys[before])
        law = _projected(mean[None], spread) + s.flatten(1).sum(1) / spread.mean()
        return q.functional(shown, q.params(theta)) / scale + law

    return _View(q, outputs=outputs), evaluate


def _projected(ys: Tensor, spread: Tensor) -> Tensor:
    """One number (B,) that moves with every component of states (T, B, *event)."""
    weights = torch.linspace(1.0, 2.0, ys[:, 0].numel(), dtype=ys.dtype, device=ys.device).view_as(ys[:, 0])
    return (ys * (weights / spread)[:, None]).flatten(2).sum((0, 2))


def _replayed(case: Case, parts: Parts) -> _View:
    """For the likelihood ratio: the problem along paths whose noisy components are held, and the log density of those.

    States are triples (B, 3, *event): held, moved, and log q in a corner.
    """
    problem, theta = case.problem, case.theta
    sde, p0, y0 = problem.sde, problem.params(theta), problem.initial(theta)
    corner = torch.zeros_like(y0).flatten()
    corner[0] = 1.0
    corner, scale = corner.view_as(y0), case.scales[0]
    width = math.sqrt(problem.n_steps * int(parts.noisy.sum()))  # of log q over the paths

    def step(_: SDE, p: Params, t: Tensor, dt: Tensor, y: Tensor, dW: Tensor) -> Tensor:
        held, moved, log_q = y.unbind(1)
        held = euler.step(sde, p0, t, dt, held, dW)
        s = sde.diffusion(t, moved, p) * dt.sqrt()
        s = s if parts.diagonal else s.expand(*moved.shape, s.shape[-1])
        mean = moved + sde.drift(t, moved, p) * dt
        gained = log_density(parts, held, mean, s)[0]
        log_q = log_q + gained.view(-1, *[1] * (moved.dim() - 1)) * corner
        return torch.stack((held, torch.where(parts.noisy, held, mean), log_q), 1)

    def functional(ys: Tensor, p: Params) -> Tensor:
        return problem.functional(ys[:, :, 1], p) / scale + (ys[-1, :, 2] * corner).flatten(1).sum(1) / width

    return _View(
        problem,
        sde=replace(sde, step=step),
        initial=lambda th: torch.stack((y0, problem.initial(th), torch.zeros_like(y0))),
        functional=functional,
    )
