"""Where is a function of one number roughest, and how rough is it there? Seen from values alone, for many paths at once.

Each path i has a function F_i(e). Its changes over neighbouring sections of length delta, and how far each change is from
those beside it,

    c_j = F(x_{j+1}) - F(x_j),   dev_j = |c_j - (c_{j-1} + c_{j+1}) / 2|,   D = max_j dev_j,            (1)

say how rough it is at that scale: D ~ delta^a with

    a = 3 smooth   2 a jump of F''   1 a kink   1/2 a square root   0 a jump.                           (2)

The largest deviation is followed: the three sections about it (a kink in the middle of a section shows beside it) are cut
into K new ones, and so on. Each stage divides delta by K / 3, and what is left in the end is one spot of each path. No
statistics are needed: at that spot a jump deviates by all its size at every scale, and stands alone, while what is smooth
deviates everywhere alike. What deviates much at the first look, and is neither in the end, is steep.

This file knows nothing of SDEs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GOLDEN = (math.sqrt(5) - 1) / 2
KINDS = ("smooth", "kink", "jump")  # from best to worst
STAGES = 4  # of zooming, after the first look
FIRST = 3  # sections of the first look
PROBES, PROBED = 12, 400  # points so close that they differ by rounding, on one path in so many rows
EACH = 40  # points on each path that is followed: K sections, and three more points beyond the ends
LEAST = 1e-5  # of the spread of F: what is smaller is no spot, or numbers rounded to float32 somewhere would jump
ALONE = 8.0  # times the median deviation of its stage that a lone spot deviates by: rounding makes 3 to 6
JUMP, SINGULAR, KINK = 0.15, 0.75, 1.65  # exponents below which a lone spot is a jump, a singularity, a kink
TURN = 0.6  # by which the exponent of a kink does not rise from stage to stage
STEEP = 3.0  # spreads of F per spread of what F is computed from, a change at which F is steep
WIDE = 3  # sections taken together, to see how deviations fall within a stage
SAFETY = 8.0  # times the deviations that rounding is seen to make, that are not looked at
ENOUGH = 3  # steep paths that make F steep
# One path that jumps or kinks is proof, if not many more have spots that are like it and less: the exponents of
# singularities scatter, and rounding makes resolved spots look like kinks
JUMPS_PER_SINGULAR, KINKS_PER_RESOLVED = 0.25, 0.1
GRID, CLOSER = EACH - 3, 6  # sections of a survey's grids, and how much finer the second is
SURVEYED = 2 * EACH + 6  # places that a survey looks at
CLASSES = 24  # of size of the first deviation, half a decade each, from which paths are taken alike

Paths = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Finding:
    """What is seen.

    Attributes
    ----------
    kind : {"smooth", "kink", "jump", "unknown"}
        "unknown" where F is finite on no path, or rounding hides everything.
    steep : bool
        Besides its jumps and kinks F changes by STEEP of its spreads, or more, over one spread of what it is computed from.
    exponent : float
        a of equation (2), the median over the paths that decide; NaN where F does not deviate from straight lines.
    share : float
        Part of the paths that have such a spot within the interval.
    size : float
        Of the jump, in units of F, the median; NaN for other kinds.
    still : bool
        F does not change along e. If it is not one number for all paths, `kind` is "unknown": jumps may be rare.
    spread : float
        Of F over the paths.
    passes, rows : int
        Calls of F, and values asked for.
    """

    kind: str
    steep: bool
    exponent: float
    share: float
    size: float
    still: bool
    spread: float
    passes: int
    rows: int


def examine(
    F: Paths, *, rows: int = 20_000, unit: float = 2.0**-52, finest: float = 0.0, speed: Tensor | float = 0.2
) -> Finding:
    """Look for jumps and kinks of F within a distance 5/6 of 0.

    Parameters
    ----------
    F : callable (e (R,), paths (R,)) -> Tensor (R,)
        Values of paths `paths` (int64, below `paths_looked_at(rows)`) at places e (float64). A pure function.
    rows : int
        Values a call, at most and at least 400; there are at most `1 + STAGES` calls.
    unit : float
        Unit of rounding of what F is computed from.
    finest : float
        Sections are no shorter: changes of e by less may be lost in rounding before F is reached, and a smooth F of what
        is left is a staircase.
    speed : Tensor, shape (paths,), or float
        By how many of its spreads over paths that which F is computed from moves as e moves by 1.

    Returns
    -------
    Finding

    Example
    -------
    >>> z = torch.linspace(-2, 2, 3334, dtype=torch.float64)
    >>> [examine(lambda e, i, f=f: f(z[i] + e)).kind for f in (torch.sin, torch.relu, torch.round)]
    ['smooth', 'kink', 'jump']
    """
    with torch.no_grad():
        return _verdict(*_zoom(F, rows, unit, finest), speed)


def survey(F: Callable[[float], Tensor], *, unit: float = 2.0**-52, finest: float = 0.0, speed: float = 0.2) -> Finding:
    """As `examine`, where all paths have to be at one place: two grids, the second where most paths seem to jump.

    Of a jump that few paths see less is known, and what is steep within a thousandth of the interval is taken for a jump.

    Parameters
    ----------
    F : callable float -> Tensor, shape (n,)
        Values of all paths at a place; called at most SURVEYED times.
    unit, finest, speed
        See `examine`.

    Example
    -------
    >>> z = torch.linspace(-2, 2, 1001, dtype=torch.float64)
    >>> [survey(lambda e, f=f: f(z + e)).kind for f in (torch.sin, torch.relu, torch.round)]
    ['smooth', 'kink', 'jump']
    """
    with torch.no_grad():
        return _surveyed(F, unit, finest, speed)


def paths_looked_at(rows: int) -> int:
    """How many paths the first look takes: every one at FIRST + 3 points, some at PROBES more."""
    return (rows - PROBES * (rows // PROBED)) // (FIRST + 3)


@dataclass(frozen=True)
class _Spots:
    """The roughest spots of the paths that were followed, at each stage.

    Attributes
    ----------
    D, typical : Tensor, shape (stages, n)
        Largest and median deviation.
    delta : Tensor, shape (stages,)
    wide : Tensor, shape (stages, n)
        Largest deviation of the same values with WIDE sections taken together; 0 for the first look.
    rounding : Tensor, shape (n,)
        Deviations that rounding makes.
    kept, weight : Tensor, shape (n,)
        The paths, and the part of all paths that each stands for.
    spread : float
        Of F over the paths.
    off : Tensor, shape (n,)
        Distance of F from its mean.
    """

    D: Tensor
    typical: Tensor
    delta: Tensor
    wide: Tensor
    rounding: Tensor
    kept: Tensor
    weight: Tensor
    spread: float
    off: Tensor


def _zoom(F: Paths, rows: int, unit: float, finest: float) -> tuple[_Spots | None, bool, int, int]:
    """Spots (None if F is finite nowhere), whether F stands still, passes, rows."""
    n, probed, passes, cost = paths_looked_at(rows), rows // PROBED, 0, 0

    def ask(*looks: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Values at x (n, points) of paths (n,), for each pair of these, in one pass."""
        nonlocal passes, cost
        x = [at for at, _ in looks]
        each = [i.repeat_interleave(at.shape[1]) for at, i in looks]
        values = F(torch.cat([at.flatten() for at in x]), torch.cat(each)).to("cpu", torch.float64)
        passes, cost = passes + 1, cost + len(values)
        return [v.view(at.shape) for v, at in zip(values.split([at.numel() for at in x]), x, strict=True)]

    paths, delta = torch.arange(n), 1 / FIRST
    # every path's sections begin elsewhere, so that a spot does not lie at one place of its section on all of them
    low = (paths.double() + 1) * GOLDEN % 1 * delta - (1 + delta) / 2
    near = torch.cat((torch.arange(6), 9 * torch.arange(6))) * 100 * unit
    values, close = ask(
        (low[:, None] + delta * torch.arange(-1, FIRST + 2), paths), (low[:probed, None] + near, paths[:probed])
    )
    sound = torch.isfinite(values).all(1)
    if not bool(sound.any()):
        return None, False, passes, cost
    dev = torch.where(sound[:, None], _deviations(values), 0.0)
    kept, weight = _of_every_size(dev.amax(1), max(rows // EACH, 1))
    noise = _deviations(close.unflatten(1, (2, 6))).nan_to_num(0, 0, 0).amax((1, 2)).quantile(0.9)
    rounding = SAFETY * (noise + 2 * unit * values[kept].abs().amax(1).nan_to_num(0, 0, 0))
    spread, still = float(values[sound].std()), bool((values[sound].diff() == 0).all())
    off = (values[kept].mean(1) - values[sound].mean()).abs()
    low, dev, sound = low[kept], dev[kept], sound[kept]
    stages, K = [(dev.amax(1), dev.median(1).values, torch.zeros(len(kept)).double())], rows // len(kept) - 3
    deltas = [delta]
    for _ in range(STAGES):
        finer = max(delta * 3 / K, finest)
        if finer > delta / 4:
            break
        low, delta = low + (dev.argmax(1) + 0.5) * delta - K / 2 * finer, finer
        (values,) = ask((low[:, None] + delta * torch.arange(-1, K + 2), kept))
        sound = sound & torch.isfinite(values).all(1)
        dev = torch.where(sound[:, None], _deviations(values), 0.0)
        stages.append((dev.amax(1), dev.median(1).values, _deviations(values[:, ::WIDE]).amax(1)))
        deltas.append(delta)
    D, typical, wide = (torch.stack(part) for part in zip(*stages, strict=True))
    lengths = torch.tensor(deltas, dtype=torch.float64)
    spots = _Spots(torch.where(sound, D, 0.0), typical, lengths, wide, rounding, kept, weight, spread, off)
    return spots, still, passes, cost


def _deviations(values: Tensor) -> Tensor:
    """dev of equation (1) from values (..., points): shape (..., points - 3)."""
    c = values.diff()
    return (c[..., 1:-1] - (c[..., :-2] + c[..., 2:]) / 2).abs()


def _of_every_size(D: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Paths with every size of deviation, and what part of all paths each stands for.

    Taken by turns from classes of size, the largest first: small jumps on a few paths, beside large kinks on many, are in
    a class of their own.
    """
    size = (-2 * torch.log10(D / D.amax())).nan_to_num(CLASSES, CLASSES, 0).floor().clamp(0, CLASSES - 1).long()
    order, counts = size.argsort(stable=True), size.bincount(minlength=CLASSES)
    turn = torch.empty_like(size)
    turn[order] = torch.arange(len(D)) - (counts.cumsum(0) - counts)[size[order]]
    kept = (turn * CLASSES + size).argsort()[:count]
    taken = size[kept].bincount(minlength=CLASSES)
    return kept, (counts / taken)[size[kept]] / len(D)


def _verdict(spots: _Spots | None, still: bool, passes: int, rows: int, speed: Tensor | float) -> Finding:
    def found(kind: str, steep=False, exponent=math.nan, share=0.0, size=math.nan) -> Finding:
        return Finding(kind, steep, exponent, share, size, still, spots.spread if spots else math.nan, passes, rows)

    if (
        spots is None
        or len(spots.D) == 1
        or (still and spots.spread > 0)
        or spots.rounding.median() > 0.01 * spots.spread > 0
    ):
        return found("unknown")
    D, n = spots.D, torch.arange(spots.D.shape[1])
    visible = torch.maximum(spots.rounding, torch.tensor(LEAST * spots.spread))
    lone = (visible < D) & (ALONE * spots.typical < D)
    lone[0] = False  # three sections do not tell
    stages = torch.arange(len(D))[:, None]
    last = (lone * stages).amax(0)  # the finest stage with a lone spot; 0 for none

    def slope(a: Tensor, b: Tensor) -> Tensor:
        """Exponent between stages a and b of each path, at least: rounding adds to deviations, and seldom takes away."""
        fall = D[a, n].clamp(min=1e-300) / torch.maximum(D[b, n], spots.rounding / SAFETY).clamp(min=1e-300)
        return fall.log() / (spots.delta[a] / spots.delta[b]).log()

    end = len(D) - 1
    before, after, two = (last - 1).clamp(min=0), (last + 1).clamp(max=end), (last - 2).clamp(min=0)
    step, drop = slope(before, last), slope(last, after)
    within = (spots.wide[last, n] / D[last, n].clamp(min=1e-300)).log() / math.log(WIDE)
    longer = torch.where(last > 1, slope(two, last), (step + within) / 2)
    # a steep slope looks like a jump until it is resolved, and in between for a moment like anything
    turning = (last > 1) & (step - slope(two, before) > TURN)
    resolved = (last > 0) & ((within > KINK) | ((last < end) & (drop > KINK)))
    # a spot is alone from the first zoom on, and beyond its last stage it sinks below what is visible
    always = (lone | (stages == 0) | (stages > last)).all(0)
    spot = (last > 0) & always & ~resolved & ~turning & ((last == end) | (D[after, n] <= visible))
    jump = spot & (last == end) & (torch.stack((step, within, longer)).amax(0) < JUMP)
    kink = spot & ~jump & (longer >= JUMP)
    usual = torch.clamp(spots.off, min=spots.spread) * spots.delta[0]
    usual = usual * (speed[spots.kept] if isinstance(speed, Tensor) else speed)
    steep = int((~jump & ~kink & (D[0] > STEEP * usual)).sum()) >= ENOUGH
    for kind, which, others in (
        ("jump", jump, JUMPS_PER_SINGULAR * (kink & (longer < SINGULAR)).sum()),
        ("kink", kink, KINKS_PER_RESOLVED * (resolved | turning).sum()),
    ):
        if int(which.sum()) >= max(1.0, float(others)):
            size = float(D[end, which].median()) if kind == "jump" else math.nan
            return found(kind, steep, float(longer[which].median()), float(spots.weight[which].sum()), size)
    if int(resolved.sum()) >= ENOUGH:
        return found("smooth", steep, float(torch.maximum(within, drop)[resolved].median()))
    bent = D[0] > torch.maximum(visible, 1e3 * spots.rounding)
    first = slope(torch.zeros_like(last), torch.ones_like(last))[bent]
    return found("smooth", steep, float(first.median()) if len(first) else math.nan)


def _surveyed(F: Callable[[float], Tensor], unit: float, finest: float, speed: float) -> Finding:
    passes = cost = 0

    def ask(x: Tensor) -> Tensor:
        """Values (n, points)."""
        nonlocal passes, cost
        values = torch.stack([F(float(e)).to("cpu", torch.float64) for e in x], 1)
        passes, cost = passes + len(x), cost + values.numel()
        return values

    def found(kind: str, steep=False, exponent=math.nan, share=0.0, size=math.nan, still=False, spread=math.nan):
        return Finding(kind, steep, exponent, share, size, still, spread, passes, cost)

    # nothing of interest is to lie on the grid
    low, delta = -0.5 - 0.1 * GOLDEN / GRID, 1 / GRID
    values = ask(low + delta * torch.arange(-1, GRID + 2))
    sound = torch.isfinite(values).all(1)
    if not bool(sound.any()) or finest > delta:
        return found("unknown")
    values = values[sound]
    spread, still = float(values.std()), bool((values.diff() == 0).all())
    dev = _deviations(values)
    close = _deviations(ask(low + 100 * unit * torch.arange(6))).nan_to_num(0, 0, 0)
    rounding = SAFETY * (close.amax(1).quantile(0.9) + 2 * unit * values.abs().amax(1))
    if rounding.median() > 0.01 * spread > 0 or (still and spread > 0):
        return found("unknown", still=still, spread=spread)
    visible = rounding.clamp(min=LEAST * spread)
    D, within, lone = _at_one_scale(values, visible)
    usual = torch.clamp((values.mean(1) - values.mean()).abs(), min=spread) * speed / FIRST
    abrupt = lone & (within < JUMP)
    kink = lone & ~abrupt & (within < KINK)
    coarse = _deviations(values[:, :: EACH // 3]).amax(1)
    steep = ~kink & ~abrupt & (coarse > STEEP * usual)
    share = 1 / len(sound)
    if bool(abrupt.any()):
        spot = dev.argmax(1)
        most = int(spot[abrupt].bincount().argmax())
        there = abrupt & ((spot - most).abs() <= 1)
        finer = max(delta / CLOSER, finest)
        begin = low + (most + 0.5) * delta - GRID / 2 * finer
        closer = ask(begin + finer * torch.arange(-1, GRID + 2))[sound]
        D2, within2, lone2 = _at_one_scale(closer, visible)
        fallen = (D / D2.clamp(min=1e-300)).log() / math.log(delta / finer)
        jump = there & lone2 & (torch.maximum(within2, fallen) < JUMP)
        if bool(jump.any()):
            size = float(D2[jump].median())
            return found("jump", False, float(fallen[jump].median()), float(abrupt.sum()) * share, size, spread=spread)
        steep |= abrupt
    many = int(steep.sum()) >= ENOUGH
    if int(kink.sum()) >= max(1.0, KINKS_PER_RESOLVED * float((lone & (within >= KINK)).sum())):
        return found("kink", many, float(within[kink].median()), float(kink.sum()) * share, spread=spread)
    bent = dev.amax(1) > visible.clamp(min=float(rounding.amax()))
    exponent = float(within[bent].median()) if bool(bent.any()) else math.nan
    return found("smooth", many, exponent, still=still, spread=spread)


def _at_one_scale(values: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest deviations of values (n, points), their exponents from WIDE sections to one, and whether they stand alone."""
    dev = _deviations(values)
    D = dev.amax(1)
    within = (_deviations(values[:, ::WIDE]).amax(1) / D.clamp(min=1e-300)).log() / math.log(WIDE)
    return D, within, (visible < D) & (ALONE * dev.median(1).values < D)
