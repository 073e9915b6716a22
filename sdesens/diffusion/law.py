"""What is known about a law of the data x_0: the marginals of x_t = alpha x_0 + sigma eps, the best denoiser, and its loss.

No denoiser has a smaller loss on eps than the posterior mean. A dimension, as `dsm_loss` has it, that is

    L*(t) = E|eps - E[eps | x_t]|^2 / d = 1 - sigma^2 E|grad log p_t|^2 / d.                      (1)

Reference: P. Vincent, Neural Computation 23 (2011) 1661. The laws themselves are in `oracles.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdesens.diffusion.checks import whole
from sdesens.diffusion.conversions import above_zero
from sdesens.diffusion.draws import check_items
from sdesens.diffusion.predict import Predictor
from sdesens.diffusion.schedule import Schedule, check_schedule
from sdesens.diffusion.streams import DATA, FLOOR_DATA, FLOOR_NOISE
from sdesens.diffusion.values import like, reals
from sdesens.diffusion.weights import Weight, simple_weight, weight_at
from sdesens.errors import ArgumentError, ArgumentTypeError, GridError, ShapeError
from sdesens.estimate import Estimate
from sdesens.noise import Noise, Philox, settle
from sdesens.tensors import concrete, describe

D = torch.float64
BLOCK = 1024  # rows at a time in Monte Carlo

Normals = Callable[[int, Tensor], Tensor]
"""(dim, beside) -> standard normals (n, dim), float64, on the device of a tensor."""


class Law(ABC):
    """A law of x_0 in `dim` dimensions: its marginals, score, best denoiser and floor.

    Laws raise ArgumentTypeError, ShapeError or ArgumentError for tensors that are no law; ShapeError or DtypeError unless x is
    (B, d) and floating; GridError for a time outside the schedule, or without noise where the law has no density.
    """

    dim: int
    needs_noise: bool  # there is no density without

    @abstractmethod
    def _draw(self, normals: Normals) -> Tensor:
        """Draws of x_0, detached, as a function of standard normals, one row a draw."""

    @abstractmethod
    def _at(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`at` for float64 x, and alpha and sigma of shape () or (B, 1)."""

    def sample(self, n: int, seed: int | None = None, *, noise: Noise | None = None, first_path: int = 0) -> Tensor:
        """Draws of x_0, (n, d) float64 and detached; draw i is that of path first_path + i, whatever n.

        Parameters
        ----------
        n : int
        seed, noise
            Give one, or none for seed 0. A seed has a stream of its own, independent of a sampler's that starts with the same
            seed; a source is taken as it is.
        first_path : int
            Index of the first draw's path.

        Raises
        ------
        ArgumentTypeError, ArgumentError
            If n, seed and index are no ints or out of range; if both seed and noise are given, or the noise is no source.

        Example
        -------
        >>> from sdesens.diffusion import GaussianMixture
        >>> ring = GaussianMixture.ring()
        >>> bool((ring.sample(2, seed=1, first_path=3) == ring.sample(5, seed=1)[3:]).all())
        True
        """
        source = Philox(0 if seed is None else seed, DATA) if noise is None else settle(seed, noise)
        whole("n", n, hint="it is a number of draws")
        whole("first_path", first_path, 0, hint="it is the index of the first draw")

        def normals(dim: int, beside: Tensor) -> Tensor:
            return source.normals(first_path, n, 0, 1, dim, dtype=D, device=beside.device)[0]

        return self._draw(normals)

    def at(self, x: Tensor, schedule: Schedule, t) -> tuple[Tensor, Tensor, Tensor]:
        """log p_t (B,), E[x_0 | x_t = x] and -grad log p_t (B, d) in float64, at x (B, d) and t of shape () or (B,)."""
        x, t = rows(x, self.dim), self.time(schedule, t)
        return self._at(x, like(schedule.alpha(t), x), like(schedule.sigma(t), x))

    def time(self, schedule: Schedule, t) -> Tensor:
        """t in float64; raise GridError if there is neither noise nor a density."""
        return above_zero(schedule, schedule.time(t)) if self.needs_noise else schedule.time(t)

    def log_density(self, x: Tensor, schedule: Schedule, t) -> Tensor:
        """log p_t(x) in nats, (B,), at x (B, d) and t of shape () or (B,)."""
        return self.at(x, schedule, t)[0].to(x.dtype)

    def score(self, x: Tensor, schedule: Schedule, t) -> Tensor:
        """grad log p_t(x), (B, d), at x (B, d) and t of shape () or (B,)."""
        return -self.at(x, schedule, t)[2].to(x.dtype)

    def denoiser(self, schedule: Schedule) -> "Exact":
        """The best denoiser there is: the posterior mean."""
        return Exact(self, schedule)

    def floor(self, schedule: Schedule, t=None, *, weight: Weight = simple_weight, n_samples=2**14, seed=0) -> Estimate:
        """The smallest mean of `dsm_loss` that any denoiser has, equation (1), a dimension.

        Parameters
        ----------
        schedule : Schedule
        t : number, pair of them, or Tensor of shape (n,) with n > 2, optional
            A time; a range over which to average uniformly; or the times to average over, such as a few thousand
            `lognormal_times`. Left out, the whole schedule.
        weight : callable (log_snr, rate) -> Tensor
            As in `dsm_loss`. On x_0 the loss has weight exp(-log_snr), on v 1 + exp(-log_snr).
        n_samples, seed : int
            Monte Carlo draws of (t, x_0, eps), at least 2. A Gaussian needs none.

        Returns
        -------
        Estimate, 0-dim
            For a Gaussian exact, by quadrature in t, with standard error 0.

        Raises
        ------
        GridError, ArgumentTypeError, ArgumentError
            For times outside the schedule, without noise or that do not rise; for fewer than 2 draws.

        Example
        -------
        >>> from sdesens.diffusion import VP, GaussianMixture
        >>> floor = GaussianMixture.ring().floor(VP(), 0.5, n_samples=1024)
        >>> bool(0 < floor.mean < 1)
        True
        """
        whole("n_samples", n_samples, 2, hint="it is a number of draws")
        at, source = times(schedule, t), Philox(seed, FLOOR_DATA)
        losses, beside = [], Philox(seed, FLOOR_NOISE)
        with torch.no_grad():
            for first in range(0, n_samples, BLOCK):
                x0 = self.sample(min(BLOCK, n_samples - first), noise=source, first_path=first)
                z = beside.normals(first, len(x0), 0, 1, 1 + self.dim, dtype=D, device=x0.device)[0]
                s, eps = at(torch.special.ndtr(z[:, 0])), z[:, 1:]
                error = eps - self.denoiser(schedule).eps(schedule.reparameterise(x0, s, eps), s)
                losses.append(weight_at(weight, schedule, s) * error.square().mean(1))
        return Estimate.from_samples(torch.cat(losses))


@dataclass(frozen=True, eq=False)
class Exact(Predictor):
    """The best denoiser of a law. Its parameters are the schedule's; gradients flow to the law's tensors, too.

    Example
    -------
    >>> from sdesens.diffusion import VP, Gaussian
    >>> x = torch.ones(1, 2, dtype=torch.float64)
    >>> Exact(Gaussian(torch.zeros(2), torch.ones(2)), VP()).score(x, 0.5)
    tensor([[-1.0000, -1.0000]], dtype=torch.float64)
    """

    law: Law
    schedule: Schedule

    def __post_init__(self):
        if not isinstance(self.law, Law):
            raise ArgumentTypeError(
                f"`law` must be a law such as GaussianMixture.ring(), got {type(self.law).__name__}: Exact(law, schedule)."
            )
        check_schedule("schedule", self.schedule)

    @property
    def params(self):
        return self.schedule.params

    def with_params(self, p):
        schedule = self.schedule.with_params(p)
        return self if schedule is self.schedule else replace(self, schedule=schedule)

    def pair(self, x, t):
        t = above_zero(self.schedule, self.schedule.time(t))
        _, x0, y = self.law.at(x, self.schedule, t)
        return x0.to(x.dtype), (like(self.schedule.sigma(t), y) * y).to(x.dtype)


def rows(x: Tensor, d: int) -> Tensor:
    """x (B, d) in float64; raise if it is not that."""
    if isinstance(x, Tensor) and (x.dim() != 2 or x.shape[1] != d):
        raise ShapeError(f"`x` must have shape (B, {d}), one vector a row, got {describe(x)}: use x.flatten(1).")
    check_items("x", x)
    return x.to(D)


def times(schedule: Schedule, t) -> Callable[[Tensor], Tensor]:
    """The times to average over, as a function of uniform numbers."""
    check_schedule("schedule", schedule)
    given = reals("t", (0.0, schedule.t_max) if t is None else t).reshape(-1)
    if not len(given) or (len(given) == 2 and not given[0] < given[1]):
        raise GridError(f"`t` must be one time, a range (low, high) with low < high, or more times, got {t!r:.60}.")
    given = schedule.time(given)
    if len(given) > 2:
        return lambda u: given[(u * len(given)).long().clamp_max(len(given) - 1)]
    return lambda u: given[0] + (given[-1] - given[0]) * u


def keep(law: Law, name: str, *shapes: tuple) -> Tensor:
    """Make a field float64, if it is finite and of one of the shapes; a letter stands for any length."""
    value = reals(name, getattr(law, name))
    n = value.shape
    fits = (len(s) == len(n) and all(a in ("n", "K", "d", m) for a, m in zip(s, n, strict=True)) for s in shapes)
    if not any(fits) or not value.numel():
        raise ShapeError(
            f"`{name}` must have shape {' or '.join(str(tuple(s)) for s in shapes)}, got {tuple(value.shape)}."
        )
    if concrete(value) and not bool(torch.isfinite(value).all()):
        raise ArgumentError(f"`{name}` holds infinite or NaN values: remove them.")
    object.__setattr__(law, name, value)
    return value


def singular(name: str, covs: Tensor) -> bool:
    """Whether some covariance is; raise unless variances are positive, covariances symmetric and positive semidefinite."""
    if not concrete(covs):
        return False
    covs = covs.detach()
    if covs.dim() < 3:
        if not bool((covs > 0).all()):
            raise ArgumentError(
                f"`{name}` must hold positive variances, got {float(covs.min()):g}: Empirical is for points."
            )
        return False
    least, largest = float(torch.linalg.eigvalsh(covs).min()), float(covs.abs().max())
    if float((covs - covs.mT).abs().max()) > 1e-10 * largest or least < -1e-10 * largest:
        raise ArgumentError(
            f"`{name}` must be symmetric and >= 0, got the least eigenvalue {least:g}: try (C + C.mT) / 2."
        )
    return least <= 1e-12 * largest


def slopes(mean: Tensor, a) -> Tensor:
    """The slopes a (d,) of a linear reward, beside a mean."""
    a = reals("a", a)
    if a.shape != mean.shape:
        raise ShapeError(f"`a` must have shape {tuple(mean.shape)}, one slope a dimension, got {tuple(a.shape)}.")
    return a.to(mean.device)
