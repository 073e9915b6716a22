"""A Monte Carlo run of an estimator: draws in tiles, gradients unit by unit, moments added up.

The unit of a standard error is the mean contribution of a few draws: one draw where parameters are few, more where the table of
gradients would be large, always whole leave-one-out groups and antithetic pairs. All units come from one `torch.func.vmap` of the
derivative of the surrogate. Laws that draw from torch's generator, and functions that vmap cannot take, are visited unit by
unit in a loop; their units are then larger and fewer.

With N items, items are strata: a unit is a draw for each item of a stratum, and only the spread between draws enters a
standard error, never that between items. The estimate is the mean over these items. Where one item looks at another (batch
normalisation), or parameters have rows for items, all items are one stratum.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from sdesens.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from sdesens.estimate import Estimate, Moments, total
from sdesens.estimators.draws import Draws
from sdesens.estimators.enumeration import states
from sdesens.estimators.laws import Law
from sdesens.estimators.methods import Choice
from sdesens.estimators.model import Question, law_at
from sdesens.estimators.torch_law import seeded
from sdesens.noise import Noise, Philox, settle
from sdesens.sde import Params
from sdesens.sensitivity.tile import pull

TILE = 2**18  # numbers of the largest array of a tile
TABLE = 2**21  # numbers of the table of gradients of a tile
LOOPS = 400  # units of a run that is looped
ROWS = 2**15  # numbers that torch adds up on one thread, whatever the number of threads
UNIT = 10_000  # draws of the largest unit

Gradients = dict[str, Tensor]
NO_CHOICE = Choice("", {}, False)  # where draws alone are wanted


@dataclass(frozen=True, eq=False)
class Task:
    """An estimator applied to a question, on given noise.

    Attributes
    ----------
    question : Question
    choice : Choice
    noise : Noise
    law : Law
        At the question's own parameters: for shapes.
    vectorised : bool
        Whether units are made by vmap or in a loop.
    divisible : bool
        Whether items can be answered apart: no item looks at another.
    """

    question: Question
    choice: Choice
    noise: Noise
    law: Law
    vectorised: bool
    divisible: bool = True

    @property
    def opaque(self) -> bool:
        """Whether the law draws from torch's generator."""
        return 0 in self.law.noise

    @property
    def unit(self) -> int:
        """The least number of draws that are one independent unit."""
        return math.lcm(self.choice.group, self.noise.unit)

    def draws(self, theta: Params, eps: Tensor, extra: Tensor, x: Tensor | None) -> Draws:
        """Draws from the law at theta."""
        q = self.question
        p = {**q.params, **theta}
        return Draws(law_at(q.model, x, p), q.f, p, x, eps, extra)

    def normals(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Noise of draws first ... first + count - 1: eps (count, *law.noise) and extra (count, N or 1, k)."""
        q, law, k = self.question, self.law, self.choice.extra
        n, like = q.n_items, q.like
        own = law.noise if q.x is None else law.noise[1:]
        width = math.prod(own)
        dim = width // law.steps + k
        if not dim:
            return like.new_empty(count, *law.noise), like.new_empty(count, n, 0)
        pair = self.noise.unit
        rows = self.noise.normals(first * n, count * n, 0, law.steps, dim, dtype=like.dtype, device=like.device)
        # draws of a pair are neighbours in the source, so items stand outside them
        by_item = rows.movedim(0, 1).reshape(count // pair, n, pair, law.steps * dim).transpose(1, 2).flatten(0, 1)
        return by_item[..., :width].reshape(count, *law.noise), by_item[..., width:]

    def generator(self, first: int) -> AbstractContextManager[None]:
        """Torch's generator seeded for draws from `first` on, where the law uses it."""
        return seeded(self.noise, first) if self.opaque else nullcontext()

    # What a tile contributes

    def contributions(self, first: int, count: int, size: int, strata: int) -> tuple[Tensor, Gradients]:
        """Values (count, N) and mean gradients (U, strata, [2,] *shape) of units of `size` draws; 2 with a control."""
        eps, extra = (t.unflatten(0, (-1, size)) for t in self.normals(first, count))
        x = self.question.x
        if x is not None:
            parts = (strata, -1)
            eps, extra, x = eps.unflatten(2, parts), extra.unflatten(2, parts), x.unflatten(0, parts)
        if self.vectorised:
            values, gradients = self._by_vmap(eps, extra, x)
        else:
            with self.generator(first):
                values, gradients = self._by_loop(eps, extra, x)
        # values: (U, size, 1), or (U, strata, size, N / strata) with items
        rows = values if x is None else values.transpose(1, 2)
        return rows.reshape(count, -1), gradients if x is not None else {k: g[:, None] for k, g in gradients.items()}

    def _objective(self, theta: Params, eps: Tensor, extra: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
        made = self.choice(self.draws(theta, eps, extra, x))
        mean = made.surrogate.mean()
        return (mean if made.control is None else torch.stack((mean, made.control.mean()))), made.values.detach()

    @property
    def controlled(self) -> bool:
        """Whether the method gives a control."""
        return self.choice.options.get("baseline") == "optimal"

    def _by_vmap(self, eps: Tensor, extra: Tensor, x: Tensor | None) -> tuple[Tensor, Gradients]:
        derivative = (jacrev if self.controlled else grad)(self._objective, has_aux=True)
        if x is not None:
            derivative = vmap(derivative, in_dims=(None, 1, 1, 0))
        gradients, values = vmap(derivative, in_dims=(None, 0, 0, None))(self.question.theta, eps, extra, x)
        return values, gradients

    def _by_loop(self, eps: Tensor, extra: Tensor, x: Tensor | None) -> tuple[Tensor, Gradients]:
        units = []
        for e, more in zip(eps, extra, strict=True):
            if x is None:
                units.append(self.one(e, more, None))
            else:
                parts = [self.one(*part) for part in zip(e.unbind(1), more.unbind(1), x, strict=True)]
                units.append((torch.stack([v for v, _ in parts]), _stack([g for _, g in parts])))
        return torch.stack([v for v, _ in units]), _stack([g for _, g in units])

    def one(self, eps: Tensor, extra: Tensor, x: Tensor | None) -> tuple[Tensor, Gradients]:
        """Values and mean gradient of one unit, by plain autograd."""
        leaves = {k: v.detach().requires_grad_() for k, v in self.question.theta.items()}
        with torch.enable_grad():
            objective, values = self._objective(leaves, eps, extra, x)
        found = [gradients(part, leaves) for part in objective.reshape(-1)]
        pairs = zip(*found, strict=True)
        return values, {k: torch.stack(g) if self.controlled else g[0] for k, g in zip(leaves, pairs, strict=True)}


def gradients(y: Tensor, leaves: Params) -> list[Tensor]:
    """dy/dleaves of a 0-dim y, zeros where it does not reach; the graph is kept."""
    found = pull(y, list(leaves.values()), torch.ones_like(y), retain_graph=True)
    return [torch.zeros_like(v) if g is None else g for g, v in zip(found, leaves.values(), strict=True)]


def _stack(parts: list[Gradients]) -> Gradients:
    return {k: torch.stack([g[k] for g in parts]) for k in parts[0]}


@dataclass(frozen=True)
class Layout:
    """How a run is cut: draws a unit, strata of items, units a tile."""

    size: int
    strata: int
    tile: int

    @classmethod
    def of(cls, task: Task, n_samples: int) -> "Layout":
        q = task.question
        least = task.unit
        numbers = sum(v.numel() for v in q.theta.values()) * (1 + task.controlled)
        whole = n_samples // least
        most = max(min(whole // LOOPS, UNIT // least), 1)  # keeps LOOPS units, if there are so many
        if not task.divisible:
            strata, size = 1, least * most
        elif not task.vectorised:
            strata = _divisor(q.n_items, max(LOOPS // whole, 1))
            size = least * most
        else:
            strata = _divisor(q.n_items, max(TABLE // numbers, 1))
            size = least * min(most, max(numbers // 64, 1))
        own = math.prod(task.law.noise) + q.n_items * task.choice.extra
        # one coordinate at a time: as many copies of a draw as it has coordinates
        copies = own // q.n_items if task.choice.name == "measure_valued" else 1
        tile = min(TILE // (size * max(own * copies, 1)), TABLE // (numbers * strata))
        return cls(size, strata, max(tile, 1))

    def stretches(self, n_samples: int) -> Iterator[tuple[int, int, int]]:
        """(first, count, draws a unit), the last unit possibly smaller."""
        whole = n_samples // self.size * self.size
        for first in range(0, whole, self.tile * self.size):
            yield first, min(self.tile * self.size, whole - first), self.size
        if whole < n_samples:
            yield whole, n_samples - whole, n_samples - whole


def answer(task: Task, n_samples: int, constants: Gradients | None = None, bar=None) -> dict[str, Estimate]:
    """Estimates of "value" and each gradient. `constants` multiply the control, if the method has one."""
    layout = Layout.of(task, n_samples)
    sums: dict[str, list[Moments]] = {"": [], **{k: [] for k in task.question.theta}}
    for first, count, size in layout.stretches(n_samples) if bar is None else bar(list(layout.stretches(n_samples))):
        values, gradients = task.contributions(first, count, size, layout.strata)
        _check_finite(task, first, values, gradients)
        pair = task.noise.unit
        means, together = (values, 1) if task.divisible else (values.mean(1, keepdim=True), task.question.n_items)
        sums[""] += _moments(means.unflatten(0, (-1, pair)).mean(1), pair * together)
        for k, g in gradients.items():
            if constants is not None:
                g = g[:, :, 0] - constants[k] * g[:, :, 1]
            sums[k] += _moments(g, size * task.question.n_items // layout.strata)
    return {k or "value": _over_strata(total(m)) for k, m in sums.items()}


def regression(task: Task, n_samples: int) -> Gradients:
    """For each coordinate, the multiple of the control that varies most like the gradient: Cov(g, s) / Var(s)."""
    layout = Layout.of(task, n_samples)
    sums: dict[str, list[Tensor]] = {}  # of g, s, g s, s s over units, by stratum
    units = 0
    for first, count, size in layout.stretches(n_samples):
        table = task.contributions(first, count, size, layout.strata)[1]
        units += count // size
        for k, pair in table.items():
            g, s = pair.double().unbind(2)
            parts = [x.sum(0) for x in (g, s, g * s, s * s)]
            sums[k] = [a + b for a, b in zip(sums[k], parts, strict=True)] if k in sums else parts
    found = {}
    for k, (g, s, gs, ss) in sums.items():
        up, down = (gs - g * s / units).sum(0), (ss - s * s / units).sum(0)
        found[k] = torch.where(down > 0, up / down, torch.zeros_like(down)).to(task.question.like.dtype)
    return found


def exactly(task: Task) -> dict[str, Estimate]:
    """The same where nothing is sampled."""
    eps, extra = task.normals(0, task.noise.unit)
    values, gradients = task.one(eps[:1], extra[:1], task.question.x)
    n = states(task.law, task.question.x is not None)
    _check_finite(task, 0, values, {k: g[None] for k, g in gradients.items()})
    found = {"value": values.mean(), **gradients}
    return {k: Estimate(v.double(), torch.zeros_like(v, dtype=torch.float64), n, n) for k, v in found.items()}


def _moments(rows: Tensor, size: int) -> list[Moments]:
    """Of units of `size` draws, (U, strata, ...), a few rows at a time: so torch adds them up in one order."""
    step = max(ROWS // max(rows[0].numel(), 1), 16)
    return [Moments.of_units(part, size) for part in rows.split(step)]


def _over_strata(m: Moments) -> Estimate:
    """The mean over strata, axis 0, of estimates that are independent.

    Variances add up; their degrees of freedom are Satterthwaite's, (sum v)^2 / sum(v^2 / (U - 1)), the least of any coordinate:
    between U - 1, where one stratum varies most, and all of them.
    """
    strata, inner = m.mean.shape[0], m.units - 1
    n, mean = m.n * strata, m.mean.mean(0)
    if inner < 1:
        return Estimate(mean, torch.full_like(mean, math.nan), n, 0)
    v, most = m.m2.reshape(strata, -1), strata * inner
    alike = torch.nan_to_num(v.sum(0).square() / v.square().sum(0), nan=float(strata))
    return Estimate(mean, (m.m2.sum(0) / most / n).sqrt(), n, int(float(alike.min()) * inner + 1e-6))


def _check_finite(task: Task, first: int, values: Tensor, gradients: Gradients) -> None:
    bad = (~torch.isfinite(values)).any(1).nonzero().flatten()
    if bad.numel():
        raise NonFiniteError(
            f"`f` is NaN or infinite on {bad.numel()} of {len(values)} draws, the first of them draw {first + int(bad[0])}. "
            "Check its domain (log or sqrt of a draw that may be negative or zero).",
            paths=tuple(first + int(i) for i in bad[:8]),
            n_bad=bad.numel(),
        )
    for name, g in gradients.items():
        rows = (~torch.isfinite(g)).reshape(len(g), -1).any(1)
        if bool(rows.any()):
            raise NonFiniteError(
                f"the {task.choice.name} gradient with respect to {name!r} is NaN or infinite, though f is finite: f or the law "
                "has no finite derivative there (a square root or a norm at 0, a probability of 0 or 1, a 0/0 hidden by torch.where).",
                n_bad=int(rows.sum()),
            )


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def vectorises(task: Task) -> bool:
    """Whether vmap can take the law and f."""
    if task.opaque:
        return False
    n, unit = task.question.n_items, task.unit
    try:
        replace(task, vectorised=True).contributions(0, 2 * unit, unit, _divisor(n, 2) if task.divisible else 1)
    except (RuntimeError, NotImplementedError):  # what torch raises for operations that vmap cannot take
        return False
    return True


def example_draws(question: Question, law: Law, count: int) -> Tensor:
    """Some draws, to see where a law is."""
    task = Task(question, NO_CHOICE, Philox(0), law, False)
    with torch.no_grad(), task.generator(0):
        return law.draw(task.normals(0, count)[0])


def noise_of(seed: int | None, noise: Noise | None) -> Noise:
    """The noise of a run.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If both are given, or the noise is none or has weights.
    """
    source = settle(seed, noise)
    if source.weights(0, 1, dtype=torch.float64, device=torch.device("cpu")) is not None:
        raise ArgumentError("`noise` has path weights, which are for an SDE's Problem and `sdesens.sensitivity`.")
    return source


def check_groups(choice: Choice, noise: Noise) -> None:
    """Raise where a leave-one-out baseline would hold the mirror image of the draw it is for."""
    if choice.group > 1 and noise.unit > 1:
        raise ArgumentError(
            f"{choice.name} with a leave-one-out baseline needs draws that are independent, and antithetic ones are pairs: give `seed`, or "
            "another baseline."
        )


def check_multiple(n_samples: int, unit: int) -> None:
    """Raise ArgumentError unless n_samples is a positive multiple of an independent unit."""
    if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 1 or n_samples % unit:
        raise ArgumentError(f"`n_samples` must be a positive multiple of {unit}, got {n_samples!r}.")


def check_samples(n_samples: int, source: Noise) -> None:
    """Raise unless so many draws have a standard error."""
    if isinstance(n_samples, bool) or not isinstance(n_samples, int):
        raise ArgumentTypeError(f"`n_samples` must be an int, got {n_samples!r}: use int(...).")
    if n_samples < 2 * source.unit or n_samples % source.unit:
        raise ArgumentError(
            f"`n_samples` must be at least {2 * source.unit}"
            + (f" and a multiple of {source.unit}" if source.unit > 1 else "")
            + f", got {n_samples}: fewer have no standard error."
        )
