"""A noise schedule: how much of the data is left at time t, and the SDE that has those marginals.

    x_t = alpha_t x_0 + sigma_t eps,      eps ~ N(0, I),      t = 0 data, t = t_max noise,              (1)
    dx  = f x dt + g dW,    f = alpha'/alpha,    g^2 = (sigma^2)' - 2 f sigma^2 = -sigma^2 lambda',     (2)
    x_t = alpha_t (x_0 + W(tau_t)),       tau_t = sigma_t^2 / alpha_t^2 = exp(-lambda_t).               (3)

lambda = log(alpha^2 / sigma^2), the log signal-to-noise ratio, is the coordinate that all schedules share; it falls in t.
(DPM-Solver and k-diffusion call half of it lambda.) (3) is the exact solution of (2): one Brownian path in noise-to-signal
time. A training draw is its one-time marginal, eps = W(tau_t) / sqrt(tau_t). Where sigma_0 > 0 (VE) that path starts at
x_0 + sigma_0 eps, as (1) has it; an SDE that is started at x_0 has sigma_t^2 less alpha_t^2 sigma_0^2.

(3) must not be differentiated in the schedule with W held fixed: W has no derivative in its time. Differentiate (1), or
the solution of (2).

References: Y. Song et al., ICLR 2021 (arXiv 2011.13456); D. Kingma et al., NeurIPS 2021 (2107.00630).
The schedules themselves are in `preserving.py`, `schedules.py` and `tables.py`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sdesens.diffusion.checks import parameter, whole
from sdesens.diffusion.summary import Summary, prior_gap, summarise
from sdesens.diffusion.values import like, reals, rebound, root, same, shown
from sdesens.errors import ArgumentTypeError, GridError, ShapeError
from sdesens.noise import Noise, settle
from sdesens.problem import check_state
from sdesens.sde import SDE, Params
from sdesens.tensors import concrete, describe

if TYPE_CHECKING:
    from sdesens.diffusion.predict import Predictor

ZERO_SNR = -30.0  # below this log-SNR no signal is left to recover, in any precision that networks compute in
SLACK = 1e-6  # a float32 time just past the end means the end


@dataclass(frozen=True, eq=False)
class Schedule(ABC):
    """A noise schedule, equations (1) and (2).

    A subclass gives the six functions of time below them. They take float64 tensors of any shape within [0, t_max]; the
    public methods take a number or a floating tensor, check it, compute in float64 and return float64.
    Fields named in `learnable` are parameters: numbers, or 0-dim tensors that gradients flow to.
    """

    learnable: ClassVar[tuple[str, ...]] = ()
    smooth: ClassVar[bool] = True  # whether the rates are: if not, smooth solvers had better run in log-SNR

    def __post_init__(self):
        for name in self.learnable:
            object.__setattr__(self, name, parameter(name, getattr(self, name)))

    @property
    def t_max(self) -> float:
        """The noisy end of time."""
        return 1.0

    @property
    def prior_std(self) -> Tensor:
        """Standard deviation of the law that sampling starts from, N(0, prior_std^2 I)."""
        return torch.ones((), dtype=torch.float64)

    @abstractmethod
    def _alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _log_snr(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _t_of_log_snr(self, log_snr: Tensor) -> Tensor: ...

    @abstractmethod
    def _f(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _g2(self, t: Tensor) -> Tensor: ...

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha' and sigma', from equation (2)."""
        f, sigma = self._f(t), self._sigma(t)
        return f * self._alpha(t), f * sigma + self._g2(t) / (2 * sigma)

    def alpha(self, t) -> Tensor:
        """Signal scale alpha_t."""
        return self._alpha(self.time(t))

    def sigma(self, t) -> Tensor:
        """Noise scale sigma_t."""
        return self._sigma(self.time(t))

    def log_snr(self, t) -> Tensor:
        """lambda_t = log(alpha_t^2 / sigma_t^2)."""
        return self._log_snr(self.time(t))

    def t_of_log_snr(self, log_snr) -> Tensor:
        """The time at which the log-SNR is this; beyond the schedule's ends, the end."""
        log_snr = reals("log_snr", log_snr).clamp_min(-1e3)  # exp(1000 / 2) is finite
        return self._t_of_log_snr(log_snr).clamp(0.0, self.t_max)

    def f(self, t) -> Tensor:
        """Drift coefficient f_t, per time."""
        return self._f(self.time(t))

    def g(self, t) -> Tensor:
        """Diffusion coefficient g_t, per square root of time."""
        return root(self._g2(self.time(t)))

    def g2(self, t) -> Tensor:
        """g_t^2, per time."""
        return self._g2(self.time(t))

    def rates(self, t) -> tuple[Tensor, Tensor]:
        """alpha'_t and sigma'_t, per time."""
        return self._rates(self.time(t))

    def ratio(self, t) -> Tensor:
        """The noise-to-signal ratio r = sigma_t / alpha_t, sigma in the words of Karras et al."""
        t = self.time(t)
        return self._sigma(t) / self._alpha(t)

    def log_snr_rate(self, t) -> Tensor:
        """lambda'_t = -g^2 / sigma^2, per time."""
        return self._log_snr_rate(self.time(t))

    def _log_snr_rate(self, t: Tensor) -> Tensor:
        sigma = self._sigma(t)
        return torch.where(sigma > 0, -self._g2(t) / sigma**2, -math.inf)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether nothing is left of the data at t_max, so that noise cannot tell x_0 there."""
        return bool(self._log_snr(torch.tensor(self.t_max, dtype=torch.float64)) < ZERO_SNR)

    @property
    def params(self) -> dict[str, Tensor]:
        """The schedule's parameters by name."""
        return {name: getattr(self, name) for name in self.learnable}

    def with_params(self, p: Params) -> "Schedule":
        """The same schedule at the values that p has for its parameters; other names are left alone."""
        found = {name: p[name] for name in self.learnable if name in p and p[name] is not getattr(self, name)}
        return rebound(self, **found) if found else self

    def same_as(self, other: "Schedule") -> bool:
        """Whether the other is the same kind of schedule with the same values."""
        return type(self) is type(other) and all(
            same(vars(self).get(name), vars(other).get(name)) for name in vars(self).keys() | vars(other).keys()
        )

    def time(self, t) -> Tensor:
        """t as a float64 tensor; raise GridError unless 0 <= t <= t_max.

        One time for all goes to the CPU, where coefficients are cheap and no branch waits for a device.
        """
        t = reals("t", t)
        t = t.cpu() if t.dim() == 0 else t
        if not concrete(t) or t.numel() == 0:
            return t
        low, high = (float(x) for x in torch.aminmax(t.detach()))
        slack = SLACK * self.t_max
        if not (low >= -slack and high <= self.t_max + slack):
            raise GridError(
                f"`t` holds {low if not low >= -slack else high!r}, outside [0, {self.t_max:.6g}] of {type(self).__name__}: time 0 is the data, "
                f"{self.t_max:.6g} the noise. An index i of T steps is t = (i + 1) / T; a flow's own clock is 1 - t."
            )
        return t if low >= 0 and high <= self.t_max else t.clamp(0.0, self.t_max)

    def reparameterise(self, x0: Tensor, t, eps: Tensor) -> Tensor:
        """x_t of equation (1), an ordinary function of x0, the noise and the schedule.

        Parameters
        ----------
        x0, eps : Tensor, shape (B, *event)
        t : number, or Tensor of shape () or (B,)

        Returns
        -------
        Tensor, shape (B, *event), of x0's dtype

        Example
        -------
        >>> from sdesens.diffusion import VP
        >>> x0, eps = torch.zeros(2, 3), torch.ones(2, 3)
        >>> VP().reparameterise(x0, 0.5, eps).shape
        torch.Size([2, 3])
        """
        if not (isinstance(x0, Tensor) and isinstance(eps, Tensor) and eps.shape == x0.shape):
            raise ShapeError(f"`x0` and `eps` must be tensors of one shape, got {describe(x0)} and {describe(eps)}.")
        t = self.time(t)
        return like(self._alpha(t), x0) * x0 + like(self._sigma(t), x0) * eps.to(x0)

    def sample_path(
        self, x0: Tensor, ts, noise: Noise | None = None, *, seed: int | None = None, first_path: int = 0
    ) -> Tensor:
        """The forward process at the times ts, exactly: equation (3) on the core's noise.

        Parameters
        ----------
        x0 : Tensor, shape (B, *event)
        ts : sequence of increasing times, or Tensor of shape (T,)
            Within [0, t_max], where some signal is left.
        noise, seed : Noise or int
            Give one, Philox(seed) or the seed; step k is the increment of W up to ts[k].
        first_path : int
            Index of the first row's path: row i has the noise of path first_path + i, whatever the batch.

        Returns
        -------
        Tensor, shape (T, B, *event)
            Not to be differentiated in the schedule's parameters, which enter through the time of W.

        Example
        -------
        >>> from sdesens import Philox
        >>> from sdesens.diffusion import VP
        >>> VP().sample_path(torch.zeros(5, 2), (0.1, 0.5, 1.0), Philox(1)).shape
        torch.Size([3, 5, 2])
        """
        check_state("x0", x0, batched=True)
        whole("first_path", first_path, 0, hint="it is the index of the first row")
        source, ts = settle(seed, noise), self.time(ts)
        if ts.dim() != 1 or not bool((ts.diff() > 0).all()):
            raise GridError(f"`ts` must increase strictly, shape (T,), got {ts.tolist()}: sort it and drop repeats.")
        with torch.no_grad():
            tau = torch.exp(-self._log_snr(ts))
        if not bool(torch.isfinite(tau).all()):
            raise GridError("`ts` reaches a time at which no signal is left: there x is sigma eps; stop before it.")
        steps = tau.diff(prepend=tau.new_zeros(1))
        z = source.normals(first_path, len(x0), 0, len(ts), x0[0].numel(), dtype=x0.dtype, device=x0.device)
        W = (z * steps.sqrt().to(z)[:, None, None]).cumsum(0).reshape(len(ts), *x0.shape)
        return torch.stack([like(a, x0) * (x0 + w) for a, w in zip(self._alpha(ts).detach(), W, strict=True)])

    def as_sde(self, denoiser: "Predictor | None" = None, eta=1.0, reverse: bool = False) -> SDE:
        """The forward process, the reverse SDE or the probability-flow ODE, as an SDE of the core.

            forwards    dx = [f x - (1 - eta^2)/2 g^2 s] dt + eta g dW                              (4)
            backwards   dx = [f x - (1 + eta^2)/2 g^2 s] dt + eta g dW_bar,    s = grad log p_t     (5)

        All eta share the marginals of equation (1); eta = 0 is the probability-flow ODE, eta = 1 the process itself and
        Anderson's reverse SDE (B. Anderson, Stoch. Proc. Appl. 12 (1982) 313).

        Parameters
        ----------
        denoiser : Predictor, optional
            Made for this schedule. Needed backwards, and forwards unless eta is 1.
        eta : number or 0-dim Tensor, >= 0
            A parameter of the SDE where a denoiser is given, called "eta".
        reverse : bool
            Then the SDE's time runs s = t_max - t: solve it from 0 to t_max - t_min, starting at noise.

        Returns
        -------
        SDE
            Diagonal noise, for states of any shape. Its parameters: the schedule's by name, "net.*" and "guidance" of the
            denoiser, "eta".

        Raises
        ------
        ArgumentError
            Without a denoiser where one is needed; where eta > 0 and the reverse SDE starts at zero signal, for there its
            coefficients are infinite.

        Example
        -------
        >>> from sdesens import sdeint
        >>> from sdesens.diffusion import VP
        >>> sdeint(VP().as_sde(), torch.ones(4, 2), (0.0, 1.0), n_steps=100, seed=1).shape
        torch.Size([2, 4, 2])
        """
        from sdesens.diffusion.equations import forward_sde, reverse_sde  # made of schedules, which come first

        if reverse:
            return reverse_sde(self, denoiser, eta)
        return forward_sde(self, denoiser, eta)

    def prior_gap(self, mean=None, cov=None) -> Tensor:
        """How far the law of x at t_max is from the prior, in nats a dimension: see `summary.prior_gap`."""
        return prior_gap(self, mean, cov)

    def summary(self, mean=None, cov=None) -> Summary:
        """Range of the log-SNR, terminal SNR and prior gap, with a warning if sampling would start from the wrong law."""
        return summarise(self, mean, cov)

    def __repr__(self) -> str:
        text = (f"{f.name}={shown(getattr(self, f.name))}" for f in fields(self))
        return f"{type(self).__name__}({', '.join(text)})"


def check_schedule(name: str, value) -> None:
    """Raise ArgumentTypeError unless this is a schedule."""
    if not isinstance(value, Schedule):
        raise ArgumentTypeError(f"`{name}` must be a Schedule such as VP(), got {value!r:.60}.")
