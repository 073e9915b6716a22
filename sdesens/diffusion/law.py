"""What is known about a law of the data x_0: the marginals of x_t = alpha x_0 + sigma eps, the best denoiser, and its loss.

No denoiser has a smaller loss on eps than the posterior mean. Summed over the d dimensions that is

    L*(t) = E|eps - E[eps | x_t]|^2 = d - sigma^2 E|grad log p_t|^2.                              (1)

Reference: P. Vincent, Neural Computation 23 (2011) 1661. The laws themselves are in `oracles.py`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdesens.diffusion.conversions import above_zero
from sdesens.diffusion.losses import Weight, simple_weight
from sdesens.diffusion.predict import Predictor
from sdesens.diffusion.schedule import Schedule
from sdesens.diffusion.values import like
from sdesens.errors import ArgumentError, ArgumentTypeError, GridError, ShapeError
from sdesens.estimate import Estimate
from sdesens.noise import Noise, Philox, settle
from sdesens.tensors import concrete, describe

D = torch.float64
BLOCK = 1024  # rows at a time in Monte Carlo


class Law(ABC):
    """A law of x_0 in `dim` dimensions: its marginals, score, best denoiser and floor.

    Laws raise ArgumentTypeError, ShapeError or ArgumentError for tensors that are no law; ShapeError unless x is (B, d); GridError
    for a time outside the schedule, or without noise where the law has no density.
    """

    dim: int
    needs_noise: bool  # there is no density without

    @abstractmethod
    def sample(self, n: int, noise: int | Noise, first: int = 0) -> Tensor:
        """Draws of x_0, (n, d) float64 and detached; draw i is path first + i of the noise, or of the seed."""

    @abstractmethod
    def _at(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`at` for float64 x, and alpha and sigma of shape () or (B, 1)."""

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
        """The smallest loss on eps that any denoiser has, equation (1): divide by d for a mean over dimensions.

        Parameters
        ----------
        schedule : Schedule
        t : number, or a pair of them, optional
            A time, or a range over which to average uniformly. Left out, the whole schedule.
        weight : callable (log_snr, rate) -> Tensor
            As in `dsm_loss`. On x_0 the loss has weight exp(-log_snr), on v 1 + exp(-log_snr).
        n_samples, seed : int
            Monte Carlo draws of (t, x_0, eps), at least 2. A Gaussian needs none.

        Returns
        -------
        Estimate, 0-dim
            For a Gaussian exact, by quadrature in t, with standard error 0.
        """
        low, high = span(schedule, t)
        losses, beside = [], Philox(seed, stream=1)
        with torch.no_grad():
            for first in range(0, count("n_samples", n_samples, 2), BLOCK):
                x0 = self.sample(min(BLOCK, n_samples - first), seed, first)
                z = beside.normals(first, len(x0), 0, 1, 1 + self.dim, dtype=D, device=x0.device)[0]
                s, eps = low + (high - low) * torch.special.ndtr(z[:, 0]), z[:, 1:]
                error = eps - self.denoiser(schedule).eps(schedule.reparameterise(x0, s, eps), s)
                losses.append(weigh(weight, schedule, s) * error.square().sum(1))
        return Estimate.from_samples(torch.cat(losses))


@dataclass(frozen=True, eq=False)
class Exact(Predictor):
    """The best denoiser of a law. Its parameters are the schedule's; gradients flow to the law's tensors, too."""

    law: Law
    schedule: Schedule

    def __post_init__(self):
        if not isinstance(self.law, Law) or not isinstance(self.schedule, Schedule):
            got = f"{type(self.law).__name__} and {type(self.schedule).__name__}"
            raise ArgumentTypeError(f"Exact(law, schedule) needs a law and a Schedule such as VP(), got {got}.")

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
    """x (B, d) in float64; raise ShapeError if it is not."""
    if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != d:
        raise ShapeError(f"`x` must have shape (B, {d}), one vector a row, got {describe(x)}: use x.flatten(1).")
    return x.to(D)


def normals(noise: int | Noise, first: int, n: int, dim: int, beside: Tensor) -> Tensor:
    """Standard normals (n, dim) of paths first ... first + n - 1, on the device of a tensor."""
    source = Philox(noise) if isinstance(noise, int) else settle(None, noise)
    return source.normals(first, count("n", n, 1), 0, 1, dim, dtype=D, device=beside.device)[0]


def count(name: str, n, least: int) -> int:
    """n, if it is an int and no fewer than the least."""
    if isinstance(n, bool) or not isinstance(n, int) or n < least:
        raise ArgumentError(f"`{name}` must be an int, at least {least}, got {n!r}: it is a number of draws.")
    return n


def span(schedule: Schedule, t) -> tuple[float, float]:
    """The times to average over."""
    ends = [0.0, schedule.t_max] if t is None else torch.as_tensor(t, dtype=D).reshape(-1).tolist()
    low, high = (float(schedule.time(s)) for s in (ends[0], ends[-1]))
    if len(ends) > 2 or (len(ends) == 2 and not low < high):
        raise GridError(f"`t` must be one time, or a range (low, high) with low < high, got {t!r}.")
    return low, high


def weigh(weight: Weight, schedule: Schedule, t: Tensor) -> Tensor:
    """The weight at times t."""
    return weight(schedule.log_snr(t), -schedule.t_max * schedule.log_snr_rate(t))


def keep(law: Law, name: str, *shapes: tuple) -> Tensor:
    """Make a field float64, if it is finite and of one of the shapes; a letter stands for any length."""
    given = getattr(law, name)
    try:
        value = torch.as_tensor(given, dtype=D)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(f"`{name}` must be a tensor, got {given!r:.60}: use torch.tensor(...).") from error
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
