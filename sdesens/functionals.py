"""Functionals of a path: what is averaged.

    F(X; p) = f(X at the output times; p),   one number a path.                                  (1)

Each is a small frozen object called as `functional(ys, p)`, with ys of shape (T, B, d) and a result of shape (B,); being
objects of a module they pickle, as a process pool needs. A plain function of the same form serves as well.

Money is discounted by another functional: a number, `Discount()` (the state carries the integral of the rate) or
`ConstantRate("r", maturity)` (a parameter of the SDE). Only `Discount` moves with the horizon when "t1" is differentiated.

A kink, as in a call, has a pathwise derivative almost everywhere, and it is the right one. A jump, as in `Digital`, has
not: its pathwise derivative is 0 almost everywhere and misses the jump. This file does not smooth anything.

Reference: P. Glasserman, Monte Carlo Methods in Financial Engineering, 2003, section 7.2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdesens.sde import Params

Functional = Callable[[Tensor, Params], Tensor]


@dataclass(frozen=True)
class Moment:
    """X_T^power of one component.

    Example
    -------
    >>> ys = torch.tensor([1.0, 3.0]).reshape(2, 1, 1)            # (T, B, d)
    >>> Moment(power=2)(ys, {})
    tensor([9.])
    """

    power: int = 1
    component: int = 0

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        return ys[-1, :, self.component] ** self.power


@dataclass(frozen=True)
class SumOfSquares:
    """|X_T|^2, summed over all components."""

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        return ys[-1].flatten(1).square().sum(-1)


@dataclass(frozen=True)
class Laplace:
    """exp(-u X_T) of one component; its mean is the Laplace transform of X_T at u. u is in units of 1/X."""

    u: float = 1.0
    component: int = 0

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        return torch.exp(-self.u * ys[-1, :, self.component])


@dataclass(frozen=True)
class Discount:
    """exp(-I_T), where the component holds I_t = int_0^t rate ds (`with_running_integral` appends it last).

    By itself it is the payoff of a zero-coupon bond; as `discount` of another payoff it discounts that.
    """

    component: int = -1

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        return torch.exp(-ys[-1, :, self.component])


@dataclass(frozen=True)
class ConstantRate:
    """exp(-p[rate] maturity): discounting by a parameter of the SDE, a rate per unit of time; 0-dim.

    The maturity is a number. Differentiated in "t1", the path moves and this does not: carry the integral of the rate as a
    state and use `Discount` where the horizon matters.
    """

    rate: str = "r"
    maturity: float = 1.0

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

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        gain = _price(ys[-1], self.component, self.log) - _number(self.strike, p)
        return _discount(self.discount, ys, p) * gain.clamp(min=0)


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

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        gain = _price(ys[-1], self.component, self.log) - _number(self.strike, p)
        return _discount(self.discount, ys, p) * (0.5 + 0.5 * torch.sign(gain))


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

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        mean = _price(ys[1:], self.component, self.log).mean(0)
        return _discount(self.discount, ys, p) * (mean - _number(self.strike, p)).clamp(min=0)


def _price(y: Tensor, component: int, log: bool) -> Tensor:
    s = y[..., component]
    return s.exp() if log else s


def _number(value: float | str, p: Params) -> float | Tensor:
    return p[value] if isinstance(value, str) else value


def _discount(discount: float | Functional, ys: Tensor, p: Params) -> float | Tensor:
    return discount(ys, p) if callable(discount) else discount
