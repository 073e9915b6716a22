"""Functionals of a path: what is averaged.

    F(X; p) = f(X at the output times; p),   one number a path.                                  (1)

Each is a small frozen object called as `functional(ys, p)`, with ys of shape (T, B, d) and a result of shape (B,); being
objects of a module they pickle, as a process pool needs. A plain function of the same form serves as well.

Money is discounted by another functional: a number, `Discount()` (the state carries the integral of the rate) or
`ConstantRate("r", maturity)` (a parameter of the SDE). Only `Discount` moves with the horizon when "t1" is differentiated.

A functional says how it depends on the path: its `kind` is "smooth", "kink" or "jump". A kink, as in a call, has a pathwise
derivative almost everywhere, and it is the right one. A jump, as in `Digital`, has not: its pathwise derivative is 0 almost
everywhere and misses the jump. Calling a functional does not smooth anything. Two methods do, where there is a formula:

    conditional(ys, covariance, p)  = E[F | all before the last step],                           (2)
    bridge(ys, covariance, p)       = E[F | all grid points],                                    (3)

(2) for a last step X_T ~ N(ys[-1], covariance), and (3), of `BarrierCall`, for a barrier watched between the grid points
too. Both have the mean of F (in (3) of F watched all the time) and no jump left.

    conditional   ys (T, B, d): the states at the output times, and in ys[-1] the mean of the last one;
                  covariance (B, d, d) of the last one; a component without noise has zeros in its row.
    bridge        ys (N + 1, B, d): all grid points; covariance (N, B, d, d) of each step.

Reference: P. Glasserman, Monte Carlo Methods in Financial Engineering, 2003, sections 6.4, 7.2.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sdesens.errors import ArgumentError, ArgumentTypeError, MethodError, ShapeError
from sdesens.last_step import (
    bridge_survival,
    lognormal_digital,
    lognormal_option,
    normal_digital,
    normal_exponential,
    normal_moment,
    normal_option,
)
from sdesens.sde import Params
from sdesens.tensors import concrete

Functional = Callable[[Tensor, Params], Tensor]


@dataclass(frozen=True)
class Moment:
    """X_T^power of one component.

    Example
    -------
    >>> ys = torch.tensor([1.0, 3.0]).reshape(2, 1, 1)            # (T, B, d)
    >>> Moment(power=2)(ys, {})
    tensor([9.])
    >>> Moment(power=2).conditional(ys, torch.full((1, 1, 1), 0.5), {})
    tensor([9.5000])
    """

    power: int = 1
    component: int = 0
    kind: ClassVar[str] = "smooth"

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        return ys[-1, :, self.component] ** self.power

    def conditional(self, ys: Tensor, covariance: Tensor, p: Params) -> Tensor:
        """Equation (2), exact for every power that a normal variable has a moment of.

        Raises
        ------
        MethodError
            If the power is not 0, 1, 2, ...
        """
        if self.power != int(self.power) or self.power < 0:
            raise MethodError(
                f"`Moment(power={self.power!r})` has no mean under a Gaussian last step, which needs a power 0, 1, 2, ...: "
                "choose one, or write the state in a form that stays positive (its logarithm) and use `Laplace`."
            )
        return normal_moment(*_last(ys, covariance, self.component), int(self.power))


@dataclass(frozen=True)
class SumOfSquares:
    """|X_T|^2, summed over all components."""

    kind: ClassVar[str] = "smooth"

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        return ys[-1].flatten(1).square().sum(-1)

    def conditional(self, ys: Tensor, covariance: Tensor, p: Params) -> Tensor:
        """Equation (2): the square of the mean, and the trace of the covariance."""
        return self(ys, p) + covariance.diagonal(dim1=-2, dim2=-1).sum(-1)


@dataclass(frozen=True)
class Laplace:
    """exp(-u X_T) of one component; its mean is the Laplace transform of X_T at u. u is in units of 1/X."""

    u: float = 1.0
    component: int = 0
    kind: ClassVar[str] = "smooth"

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        return torch.exp(-self.u * ys[-1, :, self.component])

    def conditional(self, ys: Tensor, covariance: Tensor, p: Params) -> Tensor:
        """Equation (2): exp(-u mean + u^2 variance / 2)."""
        return normal_exponential(*_last(ys, covariance, self.component), self.u)


@dataclass(frozen=True)
class Discount:
    """exp(-I_T), where the component holds I_t = int_0^t rate ds (`with_running_integral` appends it last).

    By itself it is the payoff of a zero-coupon bond; as `discount` of another payoff it discounts that.
    """

    component: int = -1
    kind: ClassVar[str] = "smooth"

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        return torch.exp(-ys[-1, :, self.component])

    def conditional(self, ys: Tensor, covariance: Tensor, p: Params) -> Tensor:
        """Equation (2) of the bond itself: exp(-mean + variance / 2)."""
        return normal_exponential(*_last(ys, covariance, self.component), 1.0)


@dataclass(frozen=True)
class ConstantRate:
    """exp(-p[rate] maturity): discounting by a parameter of the SDE, a rate per unit of time; 0-dim.

    The maturity is a number. Differentiated in "t1", the path moves and this does not: carry the integral of the rate as a
    state and use `Discount` where the horizon matters.
    """

    rate: str = "r"
    maturity: float = 1.0
    kind: ClassVar[str] = "smooth"

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        return torch.exp(-self.maturity * p[self.rate])


@dataclass(frozen=True)
class Call:
    """discount (S_T - strike)^+.

    Parameters
    ----------
    strike : float or str
        A number, or the name of a parameter of the SDE (0-dim), which can then be differentiated.
    component : int
    discount : float or functional
    log : bool
        The component holds log S.

    Example
    -------
    >>> ys = torch.tensor([[[100.0], [100.0]], [[90.0], [120.0]]])       # two paths from 100
    >>> Call(100.0, discount=ConstantRate("r", 1.0))(ys, {"r": torch.tensor(0.0)})
    tensor([ 0., 20.])
    """

    strike: float | str
    component: int = 0
    discount: float | Functional = 1.0
    log: bool = False
    kind: ClassVar[str] = "kink"

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        gain = _price(ys[-1], self.component, self.log) - _number(self.strike, p)
        return _discount(self.discount, ys, p) * gain.clamp(min=0)

    def conditional(self, ys: Tensor, covariance: Tensor, p: Params) -> Tensor:
        """Equation (2): the formula of Bachelier, or with `log` that of Black, of the last step.

        Raises
        ------
        MethodError
            If the last step moves the discount at random.
        """
        option = lognormal_option if self.log else normal_option
        mean = option(*_last(ys, covariance, self.component), _number(self.strike, p))
        return _known_discount(self.discount, ys, covariance, p) * mean


@dataclass(frozen=True)
class Put:
    """discount (strike - S_T)^+. Parameters as in `Call`.

    Example
    -------
    >>> ys = torch.tensor([[[100.0], [100.0]], [[90.0], [120.0]]])
    >>> Put(100.0)(ys, {})
    tensor([10.,  0.])
    """

    strike: float | str
    component: int = 0
    discount: float | Functional = 1.0
    log: bool = False
    kind: ClassVar[str] = "kink"

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        gain = _number(self.strike, p) - _price(ys[-1], self.component, self.log)
        return _discount(self.discount, ys, p) * gain.clamp(min=0)

    def conditional(self, ys: Tensor, covariance: Tensor, p: Params) -> Tensor:
        """Equation (2), as in `Call`, with its error."""
        option = lognormal_option if self.log else normal_option
        mean = option(*_last(ys, covariance, self.component), _number(self.strike, p), -1.0)
        return _known_discount(self.discount, ys, covariance, p) * mean


@dataclass(frozen=True)
class Digital:
    """discount 1{S_T > strike}: a jump. The pathwise derivative through S_T is 0 on every path, and wrong.

    Parameters as in `Call`. The value at the strike itself is 1/2. It stays in the graph, with derivative 0, so that a run
    warns (ZeroGradientWarning) instead of failing; the derivative through the discount alone is right.

    Example
    -------
    >>> ys = torch.tensor([[[100.0], [100.0]], [[90.0], [120.0]]])
    >>> Digital(100.0)(ys, {})
    tensor([0., 1.])
    """

    strike: float | str
    component: int = 0
    discount: float | Functional = 1.0
    log: bool = False
    kind: ClassVar[str] = "jump"

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        gain = _price(ys[-1], self.component, self.log) - _number(self.strike, p)
        return _discount(self.discount, ys, p) * (0.5 + 0.5 * torch.sign(gain))

    def conditional(self, ys: Tensor, covariance: Tensor, p: Params) -> Tensor:
        """Equation (2): a probability, smooth in the path. Without variance it is the jump itself. Errors as in `Call`."""
        digital = lognormal_digital if self.log else normal_digital
        mean = digital(*_last(ys, covariance, self.component), _number(self.strike, p))
        return _known_discount(self.discount, ys, covariance, p) * mean


@dataclass(frozen=True)
class AsianCall:
    """discount (mean of S over ts[1:] - strike)^+, the arithmetic mean over the output times after the first.

    Parameters as in `Call`. The output times `ts` of the problem are the fixing dates.

    Example
    -------
    >>> ys = torch.tensor([100.0, 104.0, 110.0]).reshape(3, 1, 1)
    >>> AsianCall(100.0)(ys, {})
    tensor([7.])
    """

    strike: float | str
    component: int = 0
    discount: float | Functional = 1.0
    log: bool = False
    kind: ClassVar[str] = "kink"

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        mean = _price(ys[1:], self.component, self.log).mean(0)
        return _discount(self.discount, ys, p) * (mean - _number(self.strike, p)).clamp(min=0)

    def conditional(self, ys: Tensor, covariance: Tensor, p: Params) -> Tensor:
        """Equation (2): a call on the last fixing, whose strike n K - (sum of the others) may be negative. Errors as in `Call`."""
        n, others = len(ys) - 1, _price(ys[1:-1], self.component, self.log).sum(0)
        option = lognormal_option if self.log else normal_option
        mean = option(*_last(ys, covariance, self.component), n * _number(self.strike, p) - others) / n
        return _known_discount(self.discount, ys, covariance, p) * mean


@dataclass(frozen=True)
class GeometricAsianCall:
    """discount (geometric mean of S over ts[1:] - strike)^+. Parameters as in `Call`; prices must be positive.

    Example
    -------
    >>> ys = torch.tensor([100.0, 50.0, 200.0]).log().reshape(3, 1, 1)
    >>> GeometricAsianCall(90.0, log=True)(ys, {})                # the square root of 50 times 200
    tensor([10.0000])
    """

    strike: float | str
    component: int = 0
    discount: float | Functional = 1.0
    log: bool = False
    kind: ClassVar[str] = "kink"

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        mean = _log_price(ys[1:], self.component, self.log).mean(0).exp()
        return _discount(self.discount, ys, p) * (mean - _number(self.strike, p)).clamp(min=0)

    def conditional(self, ys: Tensor, covariance: Tensor, p: Params) -> Tensor:
        """Equation (2), for a state that holds log S: the mean of the logarithms is Gaussian.

        Raises
        ------
        MethodError
            Without `log`, or if the last step moves the discount at random.
        """
        if not self.log:
            raise _no_formula(
                "GeometricAsianCall(log=False)", "the geometric mean of prices", "write the SDE for log S"
            )
        n, (_, variance) = len(ys) - 1, _last(ys, covariance, self.component)
        mean = lognormal_option(ys[1:, :, self.component].mean(0), variance / n**2, _number(self.strike, p))
        return _known_discount(self.discount, ys, covariance, p) * mean


@dataclass(frozen=True)
class LookbackCall:
    """discount (max of S over ts - strike)^+, the maximum over all output times, the first among them.

    Parameters as in `Call`.

    Example
    -------
    >>> ys = torch.tensor([100.0, 120.0, 90.0]).reshape(3, 1, 1)
    >>> LookbackCall(105.0)(ys, {})
    tensor([15.])
    """

    strike: float | str
    component: int = 0
    discount: float | Functional = 1.0
    log: bool = False
    kind: ClassVar[str] = "kink"

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        gain = _price(ys, self.component, self.log).amax(0) - _number(self.strike, p)
        return _discount(self.discount, ys, p) * gain.clamp(min=0)

    def conditional(self, ys: Tensor, covariance: Tensor, p: Params) -> Tensor:
        """Equation (2): with M the maximum so far, (M - K)^+ and a call with strike max(M, K). Errors as in `Call`."""
        gain = (_price(ys[:-1], self.component, self.log).amax(0) - _number(self.strike, p)).clamp(min=0)
        option = lognormal_option if self.log else normal_option
        more = option(*_last(ys, covariance, self.component), _number(self.strike, p) + gain)
        return _known_discount(self.discount, ys, covariance, p) * (gain + more)


@dataclass(frozen=True)
class FloatingLookback:
    """discount (S_T - min of S over ts), the minimum over all output times, the first and the last among them.

    Parameters as in `Call`, without a strike.

    Example
    -------
    >>> ys = torch.tensor([100.0, 80.0, 90.0]).reshape(3, 1, 1)
    >>> FloatingLookback()(ys, {})
    tensor([10.])
    """

    component: int = 0
    discount: float | Functional = 1.0
    log: bool = False
    kind: ClassVar[str] = "kink"

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        price = _price(ys, self.component, self.log)
        return _discount(self.discount, ys, p) * (price[-1] - price.amin(0))

    def conditional(self, ys: Tensor, covariance: Tensor, p: Params) -> Tensor:
        """Equation (2): a call whose strike is the minimum so far. Errors as in `Call`."""
        option = lognormal_option if self.log else normal_option
        lowest = _price(ys[:-1], self.component, self.log).amin(0)
        mean = option(*_last(ys, covariance, self.component), lowest)
        return _known_discount(self.discount, ys, covariance, p) * mean


@dataclass(frozen=True)
class BasketCall:
    """discount (sum_i w_i S_i - strike)^+ at the last time, or with prod_i S_i^{w_i} for the sum.

    Parameters
    ----------
    strike, discount, log
        As in `Call`.
    weights : sequence of float
        One for each of the first components of the state.
    geometric : bool
        Weigh the logarithms; prices must be positive.

    Raises
    ------
    ArgumentError, ArgumentTypeError

    Example
    -------
    >>> ys = torch.tensor([[[100.0, 100.0]], [[90.0, 160.0]]])
    >>> BasketCall(100.0, (0.5, 0.5))(ys, {}), BasketCall(100.0, (0.5, 0.5), geometric=True)(ys, {})
    (tensor([25.]), tensor([20.0000]))
    """

    strike: float | str
    weights: Sequence[float]
    discount: float | Functional = 1.0
    log: bool = False
    geometric: bool = False
    kind: ClassVar[str] = "kink"

    def __post_init__(self):
        try:
            weights = tuple(float(w) for w in self.weights)
        except (TypeError, ValueError) as error:
            raise ArgumentTypeError(
                f"`weights` must be numbers, got {self.weights!r}: use one float for each component, such as (0.5, 0.5)."
            ) from error
        if not weights or not all(map(math.isfinite, weights)):
            raise ArgumentError(
                f"`weights` must be finite numbers, at least one, got {self.weights!r}: use one for each component."
            )
        object.__setattr__(self, "weights", weights)

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        weights = self._weights(ys)
        every = slice(len(weights))
        if self.geometric:
            basket = (_log_price(ys[-1], every, self.log) @ weights).exp()
        else:
            basket = _price(ys[-1], every, self.log) @ weights
        return _discount(self.discount, ys, p) * (basket - _number(self.strike, p)).clamp(min=0)

    def conditional(self, ys: Tensor, covariance: Tensor, p: Params) -> Tensor:
        """Equation (2): a weighted sum of Gaussian components is Gaussian.

        Raises
        ------
        MethodError
            For an arithmetic basket of logarithms or a geometric one of prices, which have no closed form; or if the last
            step moves the discount at random.
        """
        if self.log != self.geometric:
            remedy = (
                "geometric=True, or write the SDE for S itself"
                if self.log
                else "geometric=False, or write the SDE for log S"
            )
            options = f"log={self.log}, geometric={self.geometric}"
            raise _no_formula(f"BasketCall({options})", "the basket", f"use {remedy}")
        weights = self._weights(ys)
        n = len(weights)
        variance = (covariance[..., :n, :n] @ weights) @ weights
        option = lognormal_option if self.log else normal_option
        mean = option(ys[-1, :, :n] @ weights, variance, _number(self.strike, p))
        return _known_discount(self.discount, ys, covariance, p) * mean

    def _weights(self, ys: Tensor) -> Tensor:
        if ys.shape[-1] < len(self.weights):
            raise ShapeError(
                f"`weights` has {len(self.weights)} numbers, but the state has {ys.shape[-1]} components: give one for each."
            )
        return torch.tensor(self.weights, dtype=ys.dtype, device=ys.device)


@dataclass(frozen=True)
class BarrierCall:
    """A call that dies, or is born, when S at one of the output times, the first among them, is at a barrier or beyond.

        out   discount (S_T - strike)^+ 1{no S_n beyond},        in   the same with 1 - 1{no S_n beyond}.

    A jump: on the paths that cross, no derivative of theirs sees it. `bridge` watches the time between grid points too and has
    no jump.

    Parameters
    ----------
    strike, component, discount, log
        As in `Call`.
    barrier : float or str
        A price, also where the component holds log S: a number, or the name of a parameter of the SDE.
    direction : {"down", "up"}
        Beyond is S <= barrier, or S >= barrier.
    knock : {"out", "in"}

    Raises
    ------
    ArgumentError
        For an unknown direction or knock, or a barrier that is not positive where the component holds log S.

    Example
    -------
    >>> ys = torch.tensor([[[100.0], [100.0]], [[80.0], [95.0]], [[120.0], [120.0]]])
    >>> BarrierCall(100.0, barrier=90.0)(ys, {}), BarrierCall(100.0, barrier=90.0, knock="in")(ys, {})
    (tensor([ 0., 20.]), tensor([20.,  0.]))
    """

    strike: float | str
    barrier: float | str
    direction: str = "down"
    knock: str = "out"
    component: int = 0
    discount: float | Functional = 1.0
    log: bool = False
    kind: ClassVar[str] = "jump"

    def __post_init__(self):
        for name, choices in (("direction", ("down", "up")), ("knock", ("out", "in"))):
            if getattr(self, name) not in choices:
                raise ArgumentError(f"`{name}` must be {choices[0]!r} or {choices[1]!r}, got {getattr(self, name)!r}.")
        if self.log and not isinstance(self.barrier, str) and not self.barrier > 0:
            raise ArgumentError(
                f"`barrier` must be a positive price where the state holds log S, got {self.barrier!r}: give the price itself, "
                "not its logarithm."
            )

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        # the sign stays in the graph, with derivative 0, as in `Digital`
        alive = torch.sign(self._above(ys, p).amin(0)).clamp(min=0)
        return self._knocked(ys, p, alive)

    def bridge(self, ys: Tensor, covariance: Tensor, p: Params) -> Tensor:
        """Equation (3): the payoff, times the chance that a Brownian bridge between the grid points did not cross.

        Lipschitz in the path, so its pathwise derivative is the right one. Where the coefficients are constant, as those of
        log S on geometric Brownian motion, its mean is that of the payoff watched all the time, whatever the step.

        Parameters
        ----------
        ys : Tensor, shape (N + 1, B, d)
            All grid points.
        covariance : Tensor, shape (N, B, d, d)
            Of the increment of each step: diffusion times its transpose times dt.
        """
        c = self.component
        return self._knocked(ys, p, bridge_survival(self._above(ys, p), covariance[..., c, c]))

    def _above(self, ys: Tensor, p: Params) -> Tensor:
        """Distance from the barrier on the living side, in the coordinate of the state."""
        barrier = _number(self.barrier, p)
        if self.log:
            barrier = barrier.log() if isinstance(barrier, Tensor) else math.log(barrier)
        gap = ys[..., self.component] - barrier
        return gap if self.direction == "down" else -gap

    def _knocked(self, ys: Tensor, p: Params, alive: Tensor) -> Tensor:
        call = Call(self.strike, self.component, self.discount, self.log)(ys, p)
        return call * (alive if self.knock == "out" else 1 - alive)


def _price(y: Tensor, component: int | slice, log: bool) -> Tensor:
    s = y[..., component]
    return s.exp() if log else s


def _log_price(y: Tensor, component: int | slice, log: bool) -> Tensor:
    s = y[..., component]
    return s if log else s.log()


def _number(value: float | str, p: Params) -> float | Tensor:
    return p[value] if isinstance(value, str) else value


def _discount(discount: float | Functional, ys: Tensor, p: Params) -> float | Tensor:
    return discount(ys, p) if callable(discount) else discount


def _last(ys: Tensor, covariance: Tensor, component: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (B,) of a component of the last state."""
    return ys[-1, :, component], covariance[..., component, component]


def _known_discount(discount: float | Functional, ys: Tensor, covariance: Tensor, p: Params) -> float | Tensor:
    """The discount, if the last step does not move it at random: else its product with the payoff has no formula here."""
    if isinstance(discount, Discount):
        variance = covariance[..., discount.component, discount.component]
        if concrete(variance) and bool((variance != 0).any()):
            raise MethodError(
                f"`{discount!r}` discounts by a component that has noise of its own in the last step (variance up to "
                f"{float(variance.detach().max()):.6g}), so that the mean of its product with the payoff has no closed form: "
                "append the integral of the rate by with_running_integral, which has none, or take a method that does not "
                "average over the last step."
            )
    elif callable(discount) and not isinstance(discount, ConstantRate):
        raise MethodError(
            f"`discount` = {discount!r} may be random in the last step, so that the mean of its product with the payoff is not "
            "known: use a number, Discount() or ConstantRate(...), or take a method that does not average over the last step."
        )
    return _discount(discount, ys, p)


def _no_formula(what: str, which: str, remedy: str) -> MethodError:
    return MethodError(
        f"`{what}` has no closed form over the last step: {which} is neither Gaussian nor log-Gaussian there. To have one, "
        f"{remedy}; or take a method that does not average over the last step."
    )
