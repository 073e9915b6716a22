"""What steering did, beside what it should do: moments of samples, those of p e^r, and derivatives of the mean reward.

Samples that remember their start x_T do not get p* ~ p e^r. The best that a control can do leaves the law of x_T as it is and tilts what
comes of it: with P(dx_0 | x_T) the base's samples from that start,

    P*(dx_0, dx_T) = P(dx_T) P(dx_0 | x_T) e^r(x_0) / E[e^r | x_T].                               (1)

`predicted` takes moments of (1) from M samples of the base from each of some starts, weighted by e^r. A mean by weights v_j ~ e^r_j of
sum 1 is biased by -sum_j v_j^2 (f_j - mean) in the order 1/M; the weights used are

    v_j + v_j^2 - v_j sum_i v_i^2,                                                                (2)

which leaves the order 1/M^2. If the start is forgotten, (1) is p e^r, and any samples of the base will do (`reweighted`). For Gaussian data of variance s^2 all along the shift is that of
p e^r less the share that `remembered` computes.

Reference: C. Domingo-Enrich et al., 2409.08861, section 4, for (1).
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from sdesens.diffusion.checks import whole
from sdesens.diffusion.oracles import Gaussian, GaussianMixture
from sdesens.diffusion.predict import NET, Predictor
from sdesens.diffusion.sensitivity import sampler_problem
from sdesens.errors import ArgumentTypeError, HighVarianceWarning, NonFiniteError
from sdesens.estimate import Estimate, Moments, total
from sdesens.montecarlo import Sensitivity, sensitivity
from sdesens.noise import Philox
from sdesens.training.steer_objective import LinearReward, Reward, Sampling, rewarded

FEWEST, FEWEST_OF_ALL = 30, 100  # effective samples a start, and in all
MOST_WITH_COV = 64  # dimensions of which the whole covariance is kept
AT_ONCE = 2**22  # numbers of samples, or of their squares, worked on together
STARTS = 0x64736DF0  # the stream of the starts of `predicted`


@dataclass(frozen=True, eq=False)
class Steered:
    """Mean reward, mean and covariance of samples.

    Attributes
    ----------
    reward : Estimate, 0-dim
    mean : Estimate, shape (d,)
    cov : Estimate, shape (d, d)
        Of the flattened samples; their variances alone, (d,), if d is above 64. Its standard error leaves out that the mean is estimated too,
        a share of order 1/n.
    """

    reward: Estimate
    mean: Estimate
    cov: Estimate

    @property
    def variance(self) -> Estimate:
        """Of each entry, (d,)."""
        if self.cov.mean.dim() == 1:
            return self.cov
        return replace(self.cov, mean=self.cov.mean.diagonal(), standard_error=self.cov.standard_error.diagonal())

    def deviation(self, exact: "Steered") -> dict[str, Estimate]:
        """How far from others, whatever the units: the reward as it is; the mean in their standard deviations, root mean square over
        entries; the covariance in products of their standard deviations, as a share of their correlation matrix's norm."""
        std = exact.variance.mean.sqrt()
        per = torch.where(std > 0, 1 / std, 0)
        both = torch.outer(per, per) if exact.cov.mean.dim() == 2 else per.square()
        norm = float((both * exact.cov.mean).norm())
        return {
            "reward": _between(self.reward, exact.reward, torch.ones(())),
            "mean": _between(self.mean, exact.mean, per / math.sqrt(len(per))),
            "cov": _between(self.cov, exact.cov, both / norm),
        }

    def to_dict(self) -> dict:
        """Plain numbers."""
        return {"reward": self.reward.to_dict(), "mean": self.mean.to_dict(), "cov": self.cov.to_dict()}


def _between(a: Estimate, b: Estimate, weight: Tensor) -> Estimate:
    """Norm of weight (a - b), with the root mean square of what sampling alone would make of it as its standard error."""
    noise = (weight.square() * (a.standard_error.square() + b.standard_error.square())).sum().sqrt()
    dof = min((e.dof for e in (a, b) if e.n), default=1)
    return Estimate((weight * (a.mean - b.mean)).norm(), noise, max(a.n, b.n), dof)


def moments(denoiser: Predictor, sampling: Sampling, reward: Reward, *, n: int = 20_000, seed: int = 0) -> Steered:
    """Moments of a model's samples.

    Parameters
    ----------
    denoiser : Predictor
    sampling : Sampling
    reward : callable x (B, *event) -> (B,)
    n, seed : int
        Samples, at least 2, and their noise, which is not that of steering with the same seed.

    Raises
    ------
    ArgumentTypeError, ArgumentError, ShapeError, NonFiniteError

    Example
    -------
    >>> from sdesens.diffusion import VP, uniform_grid
    >>> base = Gaussian(torch.zeros(2), torch.ones(2)).denoiser(VP())
    >>> found = moments(base, Sampling(uniform_grid(VP(), 20), (2,)), LinearReward([1.0, 0.0]), n=100)
    >>> found.mean.mean.shape, found.cov.mean.shape
    (torch.Size([2]), torch.Size([2, 2]))
    """
    return moments_of(many(denoiser, sampling, n, seed), reward)


def many(denoiser: Predictor, sampling: Sampling, n: int, seed: int = 0) -> Tensor:
    """Samples (n, *event) that are not drawn all at once; the numbers are those of one draw."""
    whole("n", n, 2, hint="it is a number of samples")
    size, noise = _block(sampling), Philox(seed)
    return torch.cat([sampling.draw(denoiser, min(size, n - k), noise, k) for k in range(0, n, size)])


def _block(sampling: Sampling) -> int:
    """How many samples are drawn together."""
    return max(1, AT_ONCE // (256 * math.prod(sampling.event)))


def moments_of(x: Tensor, reward: Reward) -> Steered:
    """Moments of samples x (n, *event)."""
    one = torch.ones(1, dtype=torch.float64, device=x.device)
    return _weighted(_finite(rewarded(reward, x))[:, None], x.flatten(1).double()[:, None], one.expand(len(x), 1))


def reweighted(x: Tensor, reward: Reward) -> Steered:
    """Moments of p e^r from samples x (n, *event) of p, weighted by v ~ e^r of sum 1.

    The bias is of order 1/M, M = 1/sum v^2 being the effective number of samples; the standard error of a mean m of f is
    sqrt(sum v^2 (f - m)^2) (J. Liu, Monte Carlo Strategies in Scientific Computing, 2001, section 2.5).

    Warns
    -----
    HighVarianceWarning
        If M is below 100, or a quarter of n.

    Example
    -------
    >>> found = reweighted(Gaussian([0.0], [1.0]).sample(20_000, 1), LinearReward([1.0]))
    >>> bool((found.mean.mean - 1).abs() < 0.1)  # that of N(1, 1)
    True
    """
    rewards = _finite(rewarded(reward, x))
    v = torch.softmax(rewards, 0)
    if (count := float(1 / v.square().sum())) < min(FEWEST_OF_ALL, len(x) / 4):
        _warn_of_few(count, f"{len(x)} samples")
    rows = x.flatten(1).double()
    mean = v @ rows
    off = rows - mean
    reward_of, mean_of = _pooled(v, rewards), _pooled(v, rows)
    if rows.shape[1] > MOST_WITH_COV:
        return Steered(reward_of, mean_of, _pooled(v, off.square()))
    w, cov = v.square()[:, None], (v[:, None] * off).mT @ off
    second = (w * off.square()).mT @ off.square() - 2 * cov * ((w * off).mT @ off) + cov.square() * w.sum()
    return Steered(reward_of, mean_of, Estimate(cov.cpu(), second.clamp(min=0).sqrt().cpu(), len(x), len(x) - 1))


def _pooled(v: Tensor, f: Tensor) -> Estimate:
    """The mean of f (n, ...) by weights v (n,) of sum 1."""
    mean = torch.tensordot(v, f, 1)
    error = torch.tensordot(v.square(), (f - mean).square(), 1).sqrt()
    return Estimate(mean.cpu(), error.cpu(), len(v), len(v) - 1)


def _finite(rewards: Tensor) -> Tensor:
    bad = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(
            f"`reward` is infinite or NaN for {len(bad)} of {len(rewards)} samples, the first is sample {bad[0]}: look at it there.",
            paths=tuple(bad[:5]),
        )
    return rewards


def _warn_of_few(count: float, of: str) -> None:
    warnings.warn(
        f"the target rests on {count:.1f} of {of}, and its error bars say too little: take a smaller reward.",
        HighVarianceWarning,
        stacklevel=4,
    )


def picked(x: Tensor, reward: Reward, n: int) -> Tensor:
    """n of the samples x, in proportion to e^r: those at equal distances along the sum of their weights (systematic resampling)."""
    ends = torch.softmax(rewarded(reward, x), 0).cumsum(0)
    places = (torch.arange(n, dtype=torch.float64, device=x.device) + 0.5) / n * ends[-1]
    return x[torch.searchsorted(ends, places)]


def predicted(
    base: Predictor, sampling: Sampling, reward: Reward, *, n_starts: int = 1000, n_each: int = 64, seed: int = 0
) -> Steered:
    """Moments of the law that steering aims at, equation (1), whatever is remembered of the start; by samples of the base alone.

    Parameters
    ----------
    base : Predictor
        The model before steering.
    sampling : Sampling
    reward : callable x (B, *event) -> (B,)
    n_starts, n_each : int
        Pairs of a start and its mirror image, and samples from each start, at least 2. Standard errors come from the spread over pairs.
        Few samples carry the weight if n_each is not large beside the mean of e^(2r) over the squared mean of e^r.
    seed : int

    Example
    -------
    >>> from sdesens.diffusion import VP, uniform_grid
    >>> base = Gaussian(torch.zeros(1), torch.ones(1)).denoiser(VP())
    >>> sampling = Sampling(uniform_grid(VP(), 20), (1,))
    >>> found = predicted(base, sampling, LinearReward([1.0]), n_starts=100, n_each=20)
    >>> bool((found.mean.mean - 1).abs() < 0.3)  # that of N(1, 1)
    True
    """
    whole("n_starts", n_starts, 2, hint="it is a number of starts")
    whole("n_each", n_each, 2, hint="it is a number of samples")
    noise = Philox(seed)
    starts = sampling.begin(base, n_starts, Philox(seed, STARTS))
    starts = torch.stack((starts, -starts), 1).flatten(0, 1).repeat_interleave(n_each, 0)
    size = _block(sampling)
    x = torch.cat([sampling.go_on(base, starts[k : k + size], noise, k) for k in range(0, len(starts), size)])
    rewards = _finite(rewarded(reward, x)).reshape(n_starts, 2, n_each)
    v = torch.softmax(rewards, 2)
    if (count := float((1 / v.square().sum(2)).median())) < min(FEWEST, n_each / 4):
        _warn_of_few(count, f"{n_each} samples a start")
    v = (v + v.square() - v * v.square().sum(2, keepdim=True)) / 2
    return _weighted(rewards.flatten(1), x.flatten(1).double().unflatten(0, (n_starts, 2 * n_each)), v.flatten(1))


def tilted(law: Gaussian | GaussianMixture, reward: LinearReward) -> Steered:
    """The exact moments of p e^r.

    Raises
    ------
    ArgumentTypeError
        For another reward than a linear one.

    Example
    -------
    >>> tilted(Gaussian(torch.zeros(2), torch.ones(2)), LinearReward([1.0, -1.0])).mean.mean
    tensor([ 1., -1.], dtype=torch.float64)
    """
    if not isinstance(reward, LinearReward):
        raise ArgumentTypeError(f"`reward` must be a LinearReward, got {reward!r:.60}: p e^r is not known for others.")
    found = law.tilt(reward.slopes)
    cov = torch.diag(found.cov) if found.cov.dim() == 1 else found.cov
    return Steered(*(Estimate(v, torch.zeros_like(v), 0, 1) for v in (found.mean @ reward.slopes, found.mean, cov)))


def _weighted(rewards: Tensor, x: Tensor, v: Tensor) -> Steered:
    """Moments of units of weighted samples: rewards and weights v (units, each), x (units, each, d)."""
    mean = torch.einsum("ue,ued->ud", v, x)
    off = x - mean.mean(0)
    if x.shape[2] > MOST_WITH_COV:
        return Steered(
            _estimate([(v * rewards).sum(1)]),
            _estimate([mean]),
            _estimate([torch.einsum("ue,ued->ud", v, off.square())]),
        )
    size = max(1, AT_ONCE // x.shape[2] ** 2)
    squares = (
        torch.einsum("ue,ued,uef->udf", v[k : k + size], off[k : k + size], off[k : k + size])
        for k in range(0, len(x), size)
    )
    return Steered(_estimate([(v * rewards).sum(1)]), _estimate([mean]), _estimate(squares))


def _estimate(parts: Iterable[Tensor]) -> Estimate:
    return total(Moments.of_units(part.cpu(), 1) for part in parts).estimate()


@dataclass(frozen=True)
class Derivatives:
    """d E[r(x_0)] / d parameter by several methods on the same noise; prints as a table.

    Attributes
    ----------
    results : dict of Sensitivity
        By method; `results[method].gradient[parameter]` has a standard error.
    """

    results: dict[str, Sensitivity]

    def to_dict(self) -> dict:
        """Plain numbers, by method."""
        return {k: v.to_dict() for k, v in self.results.items()}

    def table(self) -> Table:
        """One row a parameter, one column a method: the derivative and its 95 % interval."""
        first = next(iter(self.results.values()))
        value = f"{first.value!r}".split(" (95%")[0]
        table = Table(title=f"before steering: E[r] = {value}", title_justify="left")
        for head in ("parameter", *self.results):
            table.add_column(head)
        for name in first.gradient:
            marks = ["" if name not in r.unreliable else " (tail too heavy)" for r in self.results.values()]
            cells = [f"{r.gradient[name]!r}".split(" (95%")[0] for r in self.results.values()]
            table.add_row(f"d/d {name}", *(c + m for c, m in zip(cells, marks, strict=True)))
        return table


def derivatives(
    denoiser: Predictor,
    sampling: Sampling,
    reward: Reward,
    *,
    wrt: Sequence[str] | None = None,
    methods: Sequence[str] = ("pathwise", "finite_difference"),
    n_paths: int = 10_000,
    seed: int = 0,
) -> Derivatives:
    """How the mean reward of a sampler moves with its parameters.

    Parameters
    ----------
    denoiser : Predictor
        A `Guided` one has the parameter "guidance".
    sampling : Sampling
        With `start` left out.
    reward : callable x (B, *event) -> (B,)
    wrt : names, optional
        "eta", "guidance", those of the schedule, patterns; all but the network's weights if left out.
    methods : names
        Of `sdesens.METHODS`. Central differences see only what moves smoothly with the noise held, as pathwise derivatives do.
    n_paths, seed : int

    Raises
    ------
    ArgumentTypeError, ArgumentError, GridError, UnknownParameterError
        See `sdesens.sensitivity`.

    Example
    -------
    >>> from sdesens.diffusion import VP, Guided, uniform_grid
    >>> c, u = (Gaussian([m], [1.0]).denoiser(VP()) for m in (1.0, 0.0))
    >>> found = derivatives(Guided(c, u, 2.0), Sampling(uniform_grid(VP(), 20), (1,)), LinearReward([1.0]), wrt=("guidance",), n_paths=200)
    >>> [round(float(r.gradient["guidance"].mean), 6) for r in found.results.values()]
    [1.032487, 1.032487]
    """
    if sampling.start is not None:
        raise ArgumentTypeError("`sampling` must start from the prior for derivatives: leave `start` out.")
    problem = sampler_problem(denoiser, sampling.grid, reward, event=sampling.event, eta=sampling.eta)
    names = [k for k in problem.sde.params if NET not in k] if wrt is None else wrt
    how: dict[str, Any] = {"n_paths": n_paths, "seed": seed, "audit": False, "progress": False}
    return Derivatives({m: sensitivity(problem, method=m, wrt=tuple(names), **how) for m in methods})
