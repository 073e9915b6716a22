"""The forward process, the reverse SDE and the probability-flow ODE as SDEs of the core.

With u = f x - g^2 s / 2 the velocity of the probability-flow ODE and s = -eps / sigma,

    forwards    dx = [u + eta^2/2 g^2 s] dt + eta g dW                                            (1)
    backwards   dx = -[u - eta^2/2 g^2 s] dr + eta g dW,      dt = -dr                            (2)

(`Schedule.as_sde`). A sampler's grid is a clock for (2): with the step number k as time, t falls along straight lines
from grid[k] to grid[k + 1], and Euler-Maruyama with dk = 1 is Euler-Maruyama on that grid. This file integrates nothing.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sdesens.diffusion.checks import parameter
from sdesens.diffusion.conversions import combine
from sdesens.diffusion.predict import Predictor, check_predictor
from sdesens.diffusion.values import like
from sdesens.errors import ArgumentError
from sdesens.sde import SDE, Params
from sdesens.tensors import concrete

if TYPE_CHECKING:
    from sdesens.diffusion.schedule import Schedule


class Clock(Protocol):
    """The model's time as a function of an SDE's own."""

    def __call__(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """The time t, and the speed |dt/ds|, both float64."""
        ...


@dataclass(frozen=True)
class Reversed:
    """t = t_max - s."""

    t_max: float

    def __call__(self, s):
        s = s.to("cpu", torch.float64)  # see Schedule.time
        return (self.t_max - s).clamp(0.0, self.t_max), torch.ones_like(s)


@dataclass(frozen=True, eq=False)
class Backwards:
    """Coefficients of equation (2) on a clock."""

    denoiser: Predictor
    clock: Clock

    def drift(self, t: Tensor, x: Tensor, p: Params) -> Tensor:
        """-[u - eta^2/2 g^2 s], per unit of the clock."""
        denoiser = self.denoiser.with_params(p)
        time, speed = self.clock(t)
        return -like(speed, x) * velocity(denoiser, x, time, -(p["eta"] ** 2))

    def diffusion(self, t: Tensor, x: Tensor, p: Params) -> Tensor:
        """eta g, per square root of the clock's unit."""
        time, speed = self.clock(t)
        schedule = self.denoiser.schedule.with_params(p)
        return like(damped(p["eta"], schedule.g(time)) * speed.sqrt(), x).expand_as(x)


@dataclass(frozen=True, eq=False)
class Forwards:
    """Coefficients of equation (1)."""

    denoiser: Predictor

    def drift(self, t: Tensor, x: Tensor, p: Params) -> Tensor:
        """u + eta^2/2 g^2 s."""
        return velocity(self.denoiser.with_params(p), x, t, p["eta"] ** 2)

    def diffusion(self, t: Tensor, x: Tensor, p: Params) -> Tensor:
        """eta g."""
        return like(damped(p["eta"], self.denoiser.schedule.with_params(p).g(t)), x).expand_as(x)


@dataclass(frozen=True, eq=False)
class Plain:
    """Coefficients of the forward process itself."""

    schedule: "Schedule"

    def drift(self, t: Tensor, x: Tensor, p: Params) -> Tensor:
        """f x."""
        return like(self.schedule.with_params(p).f(t), x) * x

    def diffusion(self, t: Tensor, x: Tensor, p: Params) -> Tensor:
        """g."""
        return like(self.schedule.with_params(p).g(t), x).expand_as(x)


def velocity(denoiser: Predictor, x: Tensor, t: Tensor, eta2: Tensor) -> Tensor:
    """u + eta2 g^2 s / 2, (B, *event), from one evaluation of the denoiser."""
    schedule = denoiser.schedule
    t = schedule.time(t)
    a, b = schedule.rates(t)
    return combine(*denoiser.pair(x, t), (a, b - damped(eta2, schedule.g2(t)) / (2 * schedule.sigma(t))))


def damped(eta: Tensor, g: Tensor) -> Tensor:
    """eta g, and 0 where no noise meets an infinite coefficient; there the derivative in eta is NaN, as it does not exist."""
    return torch.where((g == math.inf) & (eta == 0), 0.0, eta * g)


def forward_sde(schedule: "Schedule", denoiser: Predictor | None, eta) -> SDE:
    """See `Schedule.as_sde`."""
    eta = check_eta(eta)
    if denoiser is None:
        if not (concrete(eta) and eta.item() == 1.0):
            raise ArgumentError(
                f"`eta` = {eta.item():g} needs the score: give `denoiser`; without one only eta = 1 is known."
            )
        plain = Plain(schedule)
        return SDE(plain.drift, plain.diffusion, schedule.params)
    check_denoiser(schedule, denoiser)
    forwards = Forwards(denoiser)
    return SDE(forwards.drift, forwards.diffusion, {**denoiser.params, "eta": eta})


def reverse_sde(schedule: "Schedule", denoiser: Predictor | None, eta) -> SDE:
    """See `Schedule.as_sde`."""
    eta = check_eta(eta)
    if denoiser is None:
        raise ArgumentError("`reverse=True` needs the score: give `denoiser`, a network or an exact law's.")
    check_denoiser(schedule, denoiser)
    require_finite(schedule, schedule.t_max, eta)
    backwards = Backwards(denoiser, Reversed(schedule.t_max))
    return SDE(backwards.drift, backwards.diffusion, {**denoiser.params, "eta": eta})


def require_finite(schedule: "Schedule", start: float, eta: Tensor) -> None:
    """Raise ArgumentError if the reverse SDE has infinite coefficients where it starts; for eta = 0 it has none."""
    if concrete(eta) and eta.item() == 0:
        return
    g2 = schedule.g2(start)
    if concrete(g2) and not g2.item() < 1e12:
        raise ArgumentError(
            f"at t = {start:g} no signal is left in {schedule!r}, and g is infinite: for the SDE start sooner (CondOT(end=0.999), "
            "Cosine(min_log_snr=-20)), or sample by ddim."
        )


def check_eta(eta) -> Tensor:
    """eta as a 0-dim tensor; raise ArgumentError unless it is >= 0."""
    eta = parameter("eta", eta)
    if concrete(eta) and not eta.item() >= 0:
        raise ArgumentError(f"`eta` must be >= 0, got {eta.item():g}: 0 is the ODE, 1 the reverse SDE.")
    return eta


def check_denoiser(schedule: "Schedule", denoiser) -> None:
    """Raise unless the denoiser is one, for this schedule."""
    check_predictor("denoiser", denoiser)
    if "eta" in denoiser.params:
        raise ArgumentError(
            "the denoiser has a parameter called 'eta', the name of the sampler's noise level: rename it."
        )
    if not denoiser.schedule.same_as(schedule):
        raise ArgumentError(
            f"`denoiser` was made for {denoiser.schedule!r}, not for {schedule!r}: use its own schedule."
        )
