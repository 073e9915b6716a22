"""Which method? The unbiased one that needs the least work for a given precision, found by trial.

A method with variance V of one path and c seconds a path needs time V c / e^2 for a standard error e. So on paths of other
noise each method that applies is run, and ranked by

    the geometric mean over components of theta of V, times c.                                    (1)

A first round on few paths drops what is hopeless; what is left is tried on more. Seconds are measured, so the choice may differ
between machines, and between two runs where two methods are close; name the method to fix it.
"""

import math
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sdesens.applicable import UNBIASED, Case
from sdesens.errors import MethodError, SdesensError
from sdesens.sensitivity import METHODS, SETTLE
from sdesens.sensitivity.tile import Contributions

FIRST, SPARE = 1_000, 10.0  # paths of the first round, and how many times the best may cost to stay in
SECOND, LEAST = 50, 10_000  # of a run's paths one in so many are tried in the second round, at most so many
GROUPS = 100  # whose spread tells the variance in reverse mode
FEW = 16  # components of theta beyond which forward methods are not tried: they carry a tangent for each


@dataclass(frozen=True)
class Trial:
    """What was found of a method.

    Attributes
    ----------
    work : float
        Equation (1) in seconds times variance, relative to the best; NaN if it was not tried.
    refused : str
        Why it was not tried, or could not be used; empty if it was.
    """

    work: float = math.nan
    refused: str = ""

    def to_dict(self) -> dict:
        """Plain numbers and strings."""
        return {"work": self.work, "refused": self.refused}

    def __repr__(self) -> str:
        why = textwrap.shorten(self.refused.split(". ")[0], 90, placeholder=" ...")
        return f"refused ({why})" if self.refused else f"{self.work:.3g}"


@dataclass(frozen=True)
class Candidate:
    """A method that may be tried.

    Attributes
    ----------
    compute : callable (tile, theta, **options) -> Contributions
    refusal : callable () -> str or None
        Why it cannot be used.
    settle : callable (tile, theta, options) -> options, optional
    """

    compute: Callable[..., Contributions]
    refusal: Callable[[], str | None]
    settle: Callable[..., dict[str, Any]] | None = None


def candidates(case: Case) -> dict[str, Candidate]:
    """The unbiased methods for first derivatives."""
    components = sum(v.numel() for v in case.theta.values())

    def refusal(method: str) -> str | None:
        if method in ("forward", "malliavin") and components > FEW:
            return f"it carries a tangent for each of {components} components of theta"
        if method == "conditional" and hasattr(case.problem.functional, "bridge"):
            return "it watches the barrier between output times too, which is another number: name it to have that"
        return case.refusal(method)

    return {m: Candidate(METHODS[m], partial(refusal, m), SETTLE.get(m)) for m in UNBIASED}


def choose(case: Case, candidates: dict[str, Candidate]) -> tuple[str, dict[str, Trial]]:
    """The best of some methods for a question, and what was tried.

    Raises
    ------
    MethodError
        If none applies.
    """
    tried: dict[str, Trial] = {}
    running: list[str] = []
    for method, candidate in candidates.items():
        refused = candidate.refusal()
        if refused is None:
            running.append(method)
        else:
            tried[method] = Trial(refused=refused)
    if not running:
        reasons = " ".join(f"{k}: {v.refused}" for k, v in tried.items())
        raise MethodError(f"method='auto' found no unbiased method that applies. {reasons}")
    options: dict[str, dict[str, Any]] = {}
    for count in (FIRST, min(case.n_paths // SECOND, LEAST)):
        if len(running) == 1 or count < FIRST:
            break
        work = {m: _work(case, m, candidates[m], count, tried, options) for m in running}
        work = {m: w for m, w in work.items() if not math.isnan(w)}
        if not work:
            reasons = " ".join(f"{k}: {v.refused}" for k, v in tried.items())
            raise MethodError(f"method='auto': every method that applies failed in its trial. {reasons}")
        best = min(work.values())
        tried |= {m: Trial(w / best if best > 0 else 1.0) for m, w in work.items()}
        running = sorted((m for m, w in work.items() if w <= SPARE * best), key=work.__getitem__)
    if running[0] not in tried:
        tried[running[0]] = Trial(1.0)
    return running[0], dict(sorted(tried.items(), key=lambda kv: (bool(kv[1].refused), kv[1].work)))


def _work(case: Case, method: str, candidate: Candidate, count: int, tried: dict[str, Trial], options: dict) -> float:
    """Equation (1); NaN, with the reason in `tried`, if the method fails. `options` keeps what was settled."""
    group = max(count // GROUPS, 1)
    tile = case.pilot(count // group * group, group)
    try:
        if method not in options:
            options[method] = {}
            if candidate.settle is not None:
                options[method] = candidate.settle(case.pilot(FIRST), case.theta, {})
            else:  # the first call costs more
                candidate.compute(case.pilot(2 * group, group), case.theta)
        began = time.perf_counter()
        found = candidate.compute(tile, case.theta, **options[method])
        seconds = time.perf_counter() - began
    except (SdesensError, RuntimeError) as error:
        tried[method] = Trial(refused=str(error).splitlines()[0])
        return math.nan
    flat = torch.cat([g.reshape(len(g), -1) for g in found.gradients.values()], 1)
    variance = flat.var(0) * (tile.count / len(flat))
    if not bool(torch.isfinite(variance).all()):
        tried[method] = Trial(refused="its gradient is not finite")
        return math.nan
    floor = 1e-6 * flat.square().mean(0) + 1e-300  # what hardly varies is as good as what does not vary at all
    return float(variance.clamp_min(0).add(floor).log().mean().exp()) * seconds / tile.count
