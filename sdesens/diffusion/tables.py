"""Schedules made of something else: any falling log-SNR, or the table of a discrete-time model.

    LogSNR   alpha^2 = 1/(1 + exp(-lambda)),  sigma^2 = 1/(1 + exp(lambda)),  g^2 = -sigma^2 lambda', f = -g^2/2,        (1)
    Table    B = -log alphas_cumprod at t = (i + 1)/T, B = 0 at t = 0, straight lines between.                          (2)

With (2) the rate beta is constant within a step, and the discrete chain with these betas is the exact solution of the SDE seen at
t = (i + 1)/T. A table of T steps is a view of a schedule in continuous time (`Discrete`), never the other way round.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sdesens.diffusion.checks import whole
from sdesens.diffusion.preserving import ByRate
from sdesens.diffusion.schedule import Schedule, check_schedule
from sdesens.diffusion.values import reals, rebound
from sdesens.errors import ArgumentError, ArgumentTypeError, GridError, ShapeError
from sdesens.sde import check_function, check_parameter
from sdesens.tensors import concrete, describe

NOTHING = 1e-30  # stands for alphas_cumprod = 0: zero to every precision, with a finite logarithm
HALVINGS = 60
TAKEN = ("eta", "guidance")


@dataclass(frozen=True, eq=False, repr=False)
class LogSNR(Schedule):
    """The variance-preserving schedule of any log-SNR that falls in t, equation (1).

    Parameters
    ----------
    function : callable (t, p) -> Tensor
        The log-SNR at times t (float64, any shape), element by element, in torch. It may be infinite at t = 0.
    parameters : mapping of str to Tensor
        What `function` sees as p; parameters of the schedule.

    Raises
    ------
    ArgumentError
        If the function does not fall, looked at on 257 times.

    Example
    -------
    >>> line = LogSNR(lambda t, p: p["top"] - 20 * t, {"top": torch.tensor(10.0)})
    >>> float(line.log_snr(0.5)), float(line.t_of_log_snr(0.0))
    (0.0, 0.5)
    """

    function: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    parameters: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        check_function("function", self.function, ("t", "p"))
        if not isinstance(self.parameters, Mapping):
            raise ArgumentTypeError(
                f"`parameters` must map names to tensors, got {type(self.parameters).__name__}: use a dict."
            )
        for name, value in self.parameters.items():
            check_parameter(name, value)
            if name in TAKEN:
                raise ArgumentError(f"a parameter may not be called {name!r}: that name is a sampler's own; rename it.")
        t = torch.linspace(0, 1, 257, dtype=torch.float64)
        with torch.no_grad():
            found = self.function(t, self.parameters)
        if not isinstance(found, Tensor) or found.shape != t.shape:
            raise ShapeError(
                f"`function(t, p)` must return the log-SNR in the shape of t, (257,), got {describe(found)}."
            )
        if concrete(found) and not bool((found.diff() < 0).all()):
            i = int((~(found.diff() < 0)).nonzero()[0])
            raise ArgumentError(
                f"`function` must fall in t, but gives {float(found[i]):.6g} at t = {float(t[i]):.4g} and {float(found[i + 1]):.6g} at "
                f"{float(t[i + 1]):.4g}: t = 0 is the data, where the SNR is highest."
            )

    @property
    def params(self):
        return dict(self.parameters)

    def with_params(self, p):
        found = {k: p[k] for k, v in self.parameters.items() if k in p and p[k] is not v}
        return rebound(self, parameters={**self.parameters, **found}) if found else self

    def _log_snr(self, t):
        return self.function(t, self.parameters).to(torch.float64)

    def _alpha(self, t):
        return self._squashed(t, 1.0)

    def _sigma(self, t):
        return self._squashed(t, -1.0)

    def _squashed(self, t: Tensor, sign: float) -> Tensor:
        """The root of sigmoid(+-lambda); where lambda is infinite, 0 or 1 with no derivative, for the function has none."""
        found = self._log_snr(t)
        if concrete(found) and bool(torch.isfinite(found.detach()).all()):
            return torch.exp(0.5 * logsigmoid(sign * found))
        finite = torch.isfinite(found.detach())
        safe = self._log_snr(torch.where(finite, t, 0.5))
        return torch.where(
            finite, torch.exp(0.5 * logsigmoid(sign * safe)), (sign * found.detach() > 0).to(found.dtype)
        )

    def _t_of_log_snr(self, log_snr):
        with torch.no_grad():
            low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                above = self._log_snr(middle) > log_snr
                low, high = torch.where(above, middle, low), torch.where(above, high, middle)
            t = (low + high) / 2
        # one Newton step, nothing to the value, gives the derivative of the inverse
        rate = self._slope(t)
        inside = (t > 0) & (t < 1) & (rate < 0)
        step = (self._log_snr(t) - log_snr) / torch.where(inside, rate, -1.0)
        return torch.where(inside & torch.isfinite(step), t - step, t)

    def _g2(self, t):
        slope = self._slope(t)
        if concrete(slope) and not bool(torch.isfinite(slope).all()):
            raise GridError(
                "`function` has an infinite derivative at a time in `t`, so that f and g are unknown there: start at 1e-5, or stop before the end."
            )
        return -torch.sigmoid(-self._log_snr(t)) * slope

    def _f(self, t):
        return -self._g2(t) / 2

    def _slope(self, t: Tensor) -> Tensor:
        """lambda' by autograd; differentiable."""
        return torch.func.grad(lambda s: self._log_snr(s).sum())(t)


@dataclass(frozen=True, eq=False, repr=False)
class Table(ByRate):
    """The schedule in continuous time behind a discrete table, equation (2).

    Parameters
    ----------
    alphas_cumprod : Tensor, shape (T,)
        alpha^2 at t = (i + 1)/T: in (0, 1), falling. The last may be 0: no signal is left at the end, and the derivative in that
        entry, which is infinite, is given as 0.

    Example
    -------
    >>> ddpm = Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    >>> ddpm.t_max, round(float(ddpm.log_snr(1.0)), 3)
    (1.0, -10.118)
    """

    alphas_cumprod: Tensor
    smooth: ClassVar[bool] = False
    learnable: ClassVar[tuple[str, ...]] = ("alphas_cumprod",)

    def __post_init__(self):
        a = self.alphas_cumprod
        if not isinstance(a, Tensor) or a.dim() != 1 or not a.numel() or not a.is_floating_point():
            raise ShapeError(f"`alphas_cumprod` must be a floating tensor of shape (T,), got {describe(a)}.")
        if not concrete(a):
            return
        padded = torch.cat((a.new_ones(1), a.detach()))
        if not bool((padded.diff() < 0).all() and a[-1] >= 0):
            raise ArgumentError(
                "`alphas_cumprod` must fall from below 1 to 0 or more: it is the product of 1 - beta, with each beta in (0, 1)."
            )

    @classmethod
    def from_betas(cls, betas: Tensor) -> "Table":
        """From the betas of a discrete-time model, shape (T,): alphas_cumprod is the product of 1 - beta, in float64."""
        betas = reals("betas", betas)
        if betas.dim() != 1 or not bool(((betas > 0) & (betas <= 1)).all()):
            raise ArgumentError(
                f"`betas` must have shape (T,) and values in (0, 1], got {describe(betas)}: each is the variance of a step."
            )
        return cls(torch.exp(torch.cumsum(torch.log1p(-betas), 0)))

    def B(self, t):
        at, i, knots = self._where(t)
        return knots[i] + (at - i) * (knots[i + 1] - knots[i])

    def beta(self, t):
        _, i, knots = self._where(t)
        return (knots[i + 1] - knots[i]) * len(self.alphas_cumprod)

    def t_of_B(self, B):
        knots = self._knots(B)
        i = torch.searchsorted(knots.detach(), B.detach().contiguous(), right=True).sub(1).clamp(0, len(knots) - 2)
        return (i + (B - knots[i]) / (knots[i + 1] - knots[i])) / len(self.alphas_cumprod)

    def _knots(self, beside: Tensor) -> Tensor:
        """B at t = 0, 1/T, ..., 1, on the device of another tensor."""
        a = self.alphas_cumprod.to(beside.device, torch.float64)
        return torch.cat((a.new_zeros(1), -torch.log(a.clamp_min(NOTHING))))

    def _where(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """T t, the step that it falls in (T t itself belongs to the step before it), and the knots."""
        at = t * len(self.alphas_cumprod)
        i = (at.detach() - 1e-9).floor().long().clamp(0, len(self.alphas_cumprod) - 1)
        return at, i, self._knots(t)


@dataclass(frozen=True, eq=False)
class Discrete:
    """A schedule seen at T times, in the words of discrete-time models. Index i is the time (i + 1)/T of the way to t_max.

    Attributes
    ----------
    schedule : Schedule
    T : int

    Example
    -------
    >>> from sdesens.diffusion import VP
    >>> Discrete(VP(), 4).times, int(Discrete(VP(), 4).index(0.5))
    (tensor([0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64), 1)
    """

    schedule: Schedule
    T: int

    def __post_init__(self):
        check_schedule("schedule", self.schedule)
        whole("T", self.T, hint="it is a number of steps")

    @property
    def times(self) -> Tensor:
        """The times of the T indices, shape (T,)."""
        return torch.arange(1, self.T + 1, dtype=torch.float64) / self.T * self.schedule.t_max

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha^2 / (alpha^2 + sigma^2): alpha^2, where the schedule preserves variance."""
        return torch.sigmoid(self.schedule.log_snr(self.times))

    @property
    def betas(self) -> Tensor:
        """beta_i = 1 - abar_i / abar_{i-1}, abar_{-1} = 1."""
        a = torch.cat((torch.ones(1, dtype=torch.float64), self.alphas_cumprod))
        return 1 - a[1:] / a[:-1]

    def index(self, t) -> Tensor:
        """The index nearest to t, as networks of discrete-time models want it: t T / t_max - 1, rounded, at least 0."""
        return (self.schedule.time(t) / self.schedule.t_max * self.T - 1).round().long().clamp(0, self.T - 1)
