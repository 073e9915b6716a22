"""Does the functional of a problem jump, or kink, as its parameters move? Seen from values alone, on common noise.

On path i, with its noise held and the parameters moved along a direction u, the functional is a function of one number,

    F_i(e) = F(X^i(theta + e u); theta + e u),                                                      (1)

and `sdesens.zoom` finds how rough each is at its roughest. Nothing in the user's code is asked: jumps behind `round`,
`where`, a comparison or a cast, in the functional or in a coefficient, are seen alike.

    smooth   the pathwise derivative is right, to second order too
    kink     it is right to first order; a singularity such as sqrt(|x|) gives it infinite variance
    jump     it exists on almost every path and misses the jump: for a digital option it is silently zero

Every (path, e) is a row with a copy of theta, and one pass solves all rows of a stage at once, by vmap. A row costs about
what a path costs in a plain run. Where that cannot be done, or theta is too large to be copied, all paths move together
and less is seen. What is not looked at: other directions, larger moves, numbers that change by less than 1e-5 of F's spread.

Reference: P. Glasserman, Monte Carlo Methods in Financial Engineering, 2003, section 7.2.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch.func import vmap

from sdesens.closer import look_closer
from sdesens.errors import ArgumentError, ArgumentTypeError, SdesensError
from sdesens.integrate.chunk import Dynamics, advance, chunk_length, plan
from sdesens.noise import Held, Noise, Philox
from sdesens.problem import Problem, Theta
from sdesens.sensitivity.probe import check_number, check_problem
from sdesens.sensitivity.tile import HELD_BYTES, Tile
from sdesens.zoom import KINDS, SINGULAR, SURVEYED, Finding, examine, paths_looked_at, survey

STREAM, DIRECTIONS = 0xFFFFFFFD, 0xFFFFFFFC  # of noise and of directions, away from any stream that a run uses
LEAST_ROWS = 1000  # of a pass: fewer see nothing
MOVE = 0.2  # spreads of the states over paths, that the interval looked at moves them by
LARGEST = 0.12  # part of a parameter's own size that the interval moves it by, at most
TRIAL, TRIED = 0.03, 800  # the same where the movement is measured, and paths for that
NUMBERS = 2**23  # of one kind at once: longer passes are cut up
COPIED = 2**22  # numbers of the parameters, one copy a row, in a pass
TURNS = 4  # directions, that paths take in turn
DROWNED = 5.0  # times the least section of the best direction, beyond which another is left out
PASSES = 6  # what all may cost
# what a function may raise at parameters that it does not like
USER = (SdesensError, ValueError, RuntimeError, ArithmeticError)

Evaluate = Callable[[Tensor, Tensor, Theta], Tensor]


@dataclass(frozen=True)
class Audit:
    """How rough a functional is along its parameters, on common noise.

    Attributes
    ----------
    kind : {"smooth", "kink", "jump", "unknown"}
    steep : bool
        No jump, but it looks like one from a distance: the pathwise derivative is right and varies much.
    exponent : float
        Size of the deviations from a straight line as a power of distance, at the roughest spots: about 0 for a jump, 1/2
        for a square root, 1 for a kink, 2 or 3 where it is smooth. NaN if not known, or if there are none.
    passes, rows : int
        Forward runs, and paths solved in all.
    share : float
        Part of the paths that jump or kink as the parameters move over the interval looked at.
    reason : str
        The finding in a sentence.
    """

    kind: str
    steep: bool
    exponent: float
    passes: int
    rows: int
    share: float
    reason: str

    @property
    def singular(self) -> bool:
        """A kink so sharp that the pathwise derivative has infinite variance, as sqrt(|x|) has."""
        return self.kind == "kink" and self.exponent < SINGULAR

    def to_dict(self) -> dict:
        """Plain numbers and strings."""
        return {**asdict(self), "singular": self.singular}

    def __repr__(self) -> str:
        steep = ", steep" if self.steep else ""
        return f"{self.kind}{steep}: {self.reason} [{self.passes} passes, {self.rows} paths]"


def audit(problem: Problem, *, wrt: Sequence[str] | str | None = None, n_paths: int = 20_000, seed: int = 0) -> Audit:
    """Whether the functional jumps or kinks as parameters move, from values alone.

    Parameters
    ----------
    problem : Problem
    wrt : str or sequence of str, optional
        What moves: parameters, "y0", "t1". All parameters if left out.
    n_paths : int
        Paths solved in each of at most six passes, an upper bound; at least 1000. Fewer may miss a small jump that few paths
        see.
    seed : int
        Of the noise and of the direction. The noise is none that a run uses.

    Returns
    -------
    Audit

    Raises
    ------
    ArgumentError and its kin
        If the problem or the arguments are at fault. Where only the moved parameters are, `kind` is "unknown".

    Example
    -------
    >>> from sdesens import SDE
    >>> from sdesens.functionals import Call, Digital
    >>> params = {"mu": torch.tensor(0.05), "sigma": torch.tensor(0.2)}
    >>> gbm = SDE(lambda t, y, p: p["mu"] * y, lambda t, y, p: p["sigma"] * y, params)
    >>> for payoff in (Call(100.0), Digital(100.0)):
    ...     print(audit(Problem(gbm, payoff, torch.tensor([100.0]), (0.0, 1.0), 16), wrt="y0").kind)
    kink
    jump
    """
    if not isinstance(problem, Problem):
        raise ArgumentTypeError(f"`problem` must be a Problem, got {type(problem).__name__}.")
    if isinstance(n_paths, bool) or not isinstance(n_paths, int):
        raise ArgumentTypeError(f"`n_paths` must be an int, got {n_paths!r}: use int(...).")
    if n_paths < LEAST_ROWS:
        raise ArgumentError(f"`n_paths` must be at least {LEAST_ROWS}, got {n_paths}: fewer paths show nothing.")
    theta = problem.leaves(wrt)
    if not theta:
        raise ArgumentError("there is nothing to move: name parameters in `wrt`, or give the SDE some.")
    noise_dim = check_problem(problem, theta, differentiated=False, thorough=False)
    check_number(problem, noise_dim)
    return look(problem, theta, noise_dim, n_paths=n_paths, seed=seed)


def look(
    problem: Problem,
    theta: Theta,
    noise_dim: int,
    *,
    n_paths: int = 20_000,
    seed: int = 0,
    vectorised: bool = True,
    evaluate: Evaluate | None = None,
) -> Audit:
    """`audit` for a caller that has checked the problem.

    Parameters
    ----------
    theta : mapping of str to Tensor
        What moves.
    vectorised : bool
        Whether the user's functions survive `torch.func.vmap`; found out where True.
    evaluate : callable (ys, ys0, theta) -> (B,), optional
        Looked at in place of the functional: ys (T, B, *event) are the states at theta, ys0 those of the same paths where
        nothing is moved.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to warn of, the run itself warns of
        rows = min(n_paths, COPIED // sum(v.numel() for v in theta.values()))
        asked = _Asked(problem, theta, Philox(seed, STREAM), noise_dim, evaluate)
        found, refused = None, ""
        if vectorised and rows >= LEAST_ROWS:
            try:
                found = _zoomed(asked, rows)
            except USER as error:  # not to be vectorised, or moved to where it does not like to be
                refused = str(error)
        if found is None:
            try:
                found = _surveyed(asked, PASSES * n_paths // (SURVEYED + 2))
            except USER as error:
                found = _refused(str(error) or refused)
    return _with_declared(found, problem) if evaluate is None else found


def rows_function(
    problem: Problem,
    theta: Theta,
    direction: Theta,
    noise: Noise,
    noise_dim: int,
    *,
    evaluate: Evaluate | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """F(e (R,), paths (R,)) -> (R,): equation (1), each row its own place and path.

    Parameters
    ----------
    direction : mapping of str to Tensor, shapes (G, *shape), float64
        Path i moves along direction i mod G.
    evaluate : callable, optional
        See `look`.
    """

    def F(e: Tensor, paths: Tensor) -> Tensor:
        return torch.cat([values(e[at], paths[at]) for at in _tiles(problem, theta, noise_dim, len(e))])

    def values(e: Tensor, paths: Tensor) -> Tensor:
        there = moved(theta, direction, e, paths)
        ys = states(problem, there, noise, noise_dim, paths)
        if evaluate is None:
            plain = vmap(lambda th, y: problem.functional(y[:, None], problem.params(th)), in_dims=(0, 1))
            return plain(there, ys).flatten()
        each, of = paths.unique(return_inverse=True)
        still = moved(theta, direction, torch.zeros(len(each)), each)
        here = states(problem, still, noise, noise_dim, each)[:, of]
        return vmap(lambda th, y, x: evaluate(y[:, None], x[:, None], th), in_dims=(0, 1, 1))(there, ys, here).flatten()

    return F


def states(problem: Problem, rows: Theta, noise: Noise, noise_dim: int, paths: Tensor) -> Tensor:
    """States at the output times, shape (T, R, *event), of path paths[r] at parameters rows[...][r]."""
    y = vmap(lambda th: problem.initial(th)[None] + 0)(rows)  # (R, 1, *event)
    ys = [y] * len(problem.outputs)
    count = int(paths.max()) + 1
    for chunk in plan(problem.outputs, chunk_length(noise_dim)):

        def run(th: Theta, y: Tensor, z: Tensor, chunk=chunk) -> list[Tensor]:
            return advance(Dynamics(problem.sde, problem.params(th), problem.t0, problem.step_size(th)), chunk, y, z)

        z = noise.normals(0, count, chunk.start, chunk.count, noise_dim, dtype=y.dtype, device=y.device)
        reached = vmap(run, in_dims=(0, 0, 1))(rows, y, z[:, paths, None])
        for mark, output in chunk.outputs:
            ys[output] = reached[mark]
        y = reached[-1]
    return torch.stack(ys)[:, :, 0]


def moved(theta: Theta, direction: Theta, e: Tensor, paths: Tensor) -> dict[str, Tensor]:
    """theta + e[r] * direction of path paths[r], a copy a row: shapes (R, *shape)."""

    def copies(v: Tensor, u: Tensor) -> Tensor:
        step = e.to(v.device, torch.float64).view(-1, *[1] * v.dim()) * u[paths.to(v.device) % len(u)]
        return (v.double() + step).to(v.dtype)

    return {k: copies(v.detach(), direction[k]) for k, v in theta.items()}


def _tiles(problem: Problem, theta: Theta, noise_dim: int, rows: int) -> list[slice]:
    state = problem.initial(theta).numel()
    numbers = max(len(problem.outputs) * state, state * noise_dim, *(v.numel() for v in theta.values()))
    size = max(NUMBERS // numbers, 64)
    return [slice(i, i + size) for i in range(0, rows, size)]


@dataclass(frozen=True)
class _Asked:
    """What is looked at."""

    problem: Problem
    theta: Theta
    noise: Philox
    noise_dim: int
    evaluate: Evaluate | None

    @property
    def unit(self) -> float:
        """Unit of rounding of what the functional is computed from."""
        return max(torch.finfo(v.dtype).eps for v in (self.problem.initial(self.theta), *self.theta.values()))

    def directions(self) -> dict[str, Tensor]:
        """Made-up moves of each parameter, half to all of its own size: shapes (TURNS, *shape), float64.

        Several, for on the paths that come near a jump the moves of two parameters may cancel; the first makes all larger. A
        symmetric matrix stays one.
        """
        source = Philox(self.noise.seed, DIRECTIONS)
        return {k: _moves(v.detach(), source, i) for i, (k, v) in enumerate(self.theta.items())}

    def held(self, count: int) -> Noise:
        """The noise of so many paths, drawn once if it is not much: each pass takes it again."""
        y, n_steps = self.problem.initial(self.theta), self.problem.n_steps
        if count * n_steps * self.noise_dim * y.element_size() > HELD_BYTES:
            return self.noise
        z = self.noise.normals(0, count, 0, n_steps, self.noise_dim, dtype=y.dtype, device=y.device)
        return Held(self.noise, z, 0)

    def finest(self, reach: "_Reach") -> float:
        """The least part of a direction that is not lost in rounding: of the parameters, and of the states step by step."""
        return self.unit * (8 + 4 * math.sqrt(self.problem.n_steps)) / min(reach.scale, reach.relative)


def _moves(v: Tensor, source: Noise, i: int) -> Tensor:
    z = source.normals(i, 1, 0, TURNS * v.numel(), 1, dtype=torch.float64, device=v.device).reshape(TURNS, *v.shape)
    size = (v.abs() + v.abs().mean()).double() / 2
    size = torch.where(size > 0, size, 0.1)
    move = z.sign() * size * (0.5 + 0.5 * torch.special.erf(z.abs()))
    move[0] = torch.where(v == 0, move[0], v.sign() * move[0].abs())  # many numbers moved at random move nothing
    symmetric = v.dim() > 1 and v.shape[-1] == v.shape[-2] and torch.equal(v, v.mT)
    return (move + move.mT) / 2 if symmetric else move


@dataclass(frozen=True)
class _Reach:
    """How far a direction goes.

    Attributes
    ----------
    scale : float
        What to multiply the direction by.
    speed : float
        By how many of their spreads over paths the states then move.
    relative : float
        By which part of themselves the states then move.
    """

    scale: float
    speed: float
    relative: float

    @classmethod
    def of(cls, here: Tensor, there: Tensor) -> "_Reach":
        """From the states (T, n, *event) at two places, TRIAL apart: what moves most counts, and moves by MOVE."""
        here, there = here.double().flatten(2), there.double().flatten(2)  # (T, n, D)
        ordered = here.sort(1).values
        low, high = ordered[:, here.shape[1] // 4], ordered[:, 3 * here.shape[1] // 4]
        spread, size = (high - low) / 1.35, torch.maximum(low.abs(), high.abs())
        movement = (there - here).abs().nanmedian(1).values / TRIAL
        speeds = torch.where(spread > 1e-9 * size, movement / spread, 0.0).nan_to_num(0, 0, 0).flatten()  # (T D,)
        most = int(speeds.argmax())
        speed = float(speeds[most])
        if speed == 0:  # only the functional depends on what is moved
            return cls(LARGEST / 2, MOVE, math.inf)
        scale = min(MOVE / speed, LARGEST)
        return cls(scale, scale * speed, scale * float(movement.flatten()[most] / size.flatten()[most]))


def _zoomed(asked: _Asked, rows: int) -> Audit:
    """By `examine`: each row has parameters of its own."""
    q, n = asked, paths_looked_at(rows)
    noise, directions, tried = q.held(n), q.directions(), min(TRIED, n)
    paths = torch.arange(tried)
    at = [moved(q.theta, directions, torch.full((tried,), e), paths) for e in (0.0, TRIAL)]
    here, there = (states(q.problem, rows, noise, q.noise_dim, paths) for rows in at)
    reach = [_Reach.of(here[:, g::TURNS], there[:, g::TURNS]) for g in range(TURNS)]
    # a direction whose moves cancel would drown in rounding; the best takes its place
    best = min(range(TURNS), key=lambda g: q.finest(reach[g]))
    chosen = [g if q.finest(reach[g]) <= DROWNED * q.finest(reach[best]) else best for g in range(TURNS)]
    reach = [reach[g] for g in chosen]
    scale = torch.tensor([r.scale for r in reach], dtype=torch.float64)
    directions = {k: u[chosen] * scale.to(u.device).view(-1, *[1] * (u.dim() - 1)) for k, u in directions.items()}
    F = rows_function(q.problem, q.theta, directions, noise, q.noise_dim, evaluate=q.evaluate)
    speed = torch.tensor([r.speed for r in reach])[torch.arange(n) % TURNS]
    finest = max(q.finest(r) for r in reach)
    found = examine(F, rows=rows, unit=q.unit, finest=finest, speed=speed)
    seen = _audit(found, q.theta, 1, 2 * tried)
    if q.evaluate is not None or not isinstance(q.problem, Problem) or seen.kind == "jump":
        return seen
    there = states(q.problem, moved(q.theta, directions, torch.full((tried,), 0.1), paths), noise, q.noise_dim, paths)
    closer = look_closer(
        q.problem, q.theta, directions, moved, here, (there - here) / 0.1, unit=q.unit, finest=finest
    )  # fmt: skip
    if (
        closer is None
        or (seen.steep and closer[1].kind == "kink")
        or (seen.kind in KINDS and KINDS.index(closer[1].kind) <= KINDS.index(seen.kind))
    ):
        return replace(seen, rows=seen.rows + tried)
    what, near = closer
    return replace(
        _audit(near, q.theta, 1, 2 * tried), passes=seen.passes, rows=seen.rows + tried, steep=seen.steep,
        reason=f"{what} {'jumps' if near.kind == 'jump' else 'kinks'}, seen from close by, {_along(q.theta)}",
    )  # fmt: skip


def _surveyed(asked: _Asked, count: int) -> Audit:
    """By `survey`: all paths share their parameters, so there is no zooming in on each."""
    q = asked
    directions, tile = q.directions(), Tile(q.problem, q.held(count), 0, count, count, q.noise_dim)

    def at(e: float) -> dict[str, Tensor]:
        place, first = torch.tensor([e], dtype=torch.float64), torch.tensor([0])
        return {k: v[0] for k, v in moved(q.theta, directions, place, first).items()}

    def F(e: float) -> Tensor:
        theta = at(e * reach.scale)
        ys = tile.paths(theta)
        return tile.values(theta, ys) if q.evaluate is None else q.evaluate(ys, here, theta)

    here = tile.paths(at(0.0))
    reach = _Reach.of(here, tile.paths(at(TRIAL)))
    return _audit(survey(F, unit=q.unit, finest=q.finest(reach), speed=reach.speed), q.theta, 2, 2 * count)


def _audit(found: Finding, theta: Theta, passes: int, rows: int) -> Audit:
    """What is found, and what finding out how far to go has cost."""
    return Audit(
        found.kind,
        found.steep,
        found.exponent,
        found.passes + passes,
        found.rows + rows,
        found.share,
        _sentence(found, theta),
    )


def _sentence(found: Finding, theta: Theta) -> str:
    along = _along(theta)
    if found.still and found.spread > 0:  # many numbers that never change may be steps that no path takes
        return f"no path changes it {along}: it does not depend on that, or by jumps too rare to be seen"
    if found.still:
        return f"it is constant {along}"
    on = f"{along} on {found.share:.2g} of the paths"
    steep = ", so steeply that the pathwise derivative varies much from path to path" if found.steep else ""
    if found.kind == "unknown":
        return f"nothing can be seen {along}: it is not finite, or its changes drown in rounding"
    if found.kind == "jump":
        return f"it jumps {on}, by {found.size:.2g}: a pathwise derivative misses that"
    if found.kind == "kink" and found.exponent < SINGULAR:
        return f"it is singular {on}, like |x|^{found.exponent:.2g}: the pathwise derivative has infinite variance"
    if found.kind == "kink":
        return f"it kinks {on}: first pathwise derivatives are right, second ones are not{steep}"
    return f"it changes smoothly {along}{steep}"


def _refused(why: str) -> Audit:
    reason = (
        f"it could not be evaluated at moved parameters ({(why.strip() or 'no reason given').splitlines()[0]:.200})"
    )
    return Audit("unknown", False, math.nan, 0, 0, math.nan, reason)


def _with_declared(seen: Audit, problem: Problem) -> Audit:
    """The worse of what is seen and what the functional says of itself."""
    order, declared = ("smooth", "kink", "unknown", "jump"), getattr(problem.functional, "kind", None)
    if not isinstance(declared, str) or declared not in KINDS or order.index(seen.kind) >= order.index(declared):
        return seen
    return replace(seen, kind=declared, reason=f"it declares a {declared}; seen: {seen.kind}, {seen.reason}")


def _along(theta: Theta) -> str:
    names = tuple(theta)
    return "along " + ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
