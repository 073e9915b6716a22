"""Calls, puts and digitals: payoffs of one price at the last time."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sdesens.functionals.common import Functional, discounted, last, number, price
from sdesens.functionals.last_step import lognormal_digital, lognormal_option, normal_digital, normal_option
from sdesens.functionals.moments import known_discount
from sdesens.sde import Params


@dataclass(frozen=True)
class Vanilla:
    """discount (sign (S_T - strike))^+, what `Call` and `Put` are; parameters in `Call`."""

    strike: float | str
    component: int = 0
    discount: float | Functional = 1.0
    log: bool = False
    kind: ClassVar[str] = "kink"
    sign: ClassVar[float] = 1.0

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        gain = self.sign * (price(ys[-1], self.component, self.log) - number(self.strike, p))
        return discounted(self.discount, ys, p) * gain.clamp(min=0)

    def conditional(self, ys: Tensor, covariance: Tensor, p: Params) -> Tensor:
        """Equation (2): the formula of Bachelier, or with `log` that of Black, of the last step.

        Raises
        ------
        MethodError
            If the last step moves the discount at random.
        """
        option = lognormal_option if self.log else normal_option
        mean = option(*last(ys, covariance, self.component), number(self.strike, p), self.sign)
        return known_discount(self.discount, ys, covariance, p) * mean


@dataclass(frozen=True)
class Call(Vanilla):
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
    >>> from sdesens.functionals import ConstantRate
    >>> ys = torch.tensor([[[100.0], [100.0]], [[90.0], [120.0]]])       # two paths from 100
    >>> Call(100.0, discount=ConstantRate("r", 1.0))(ys, {"r": torch.tensor(0.0)})
    tensor([ 0., 20.])
    """


@dataclass(frozen=True)
class Put(Vanilla):
    """discount (strike - S_T)^+. Parameters as in `Call`.

    Example
    -------
    >>> ys = torch.tensor([[[100.0], [100.0]], [[90.0], [120.0]]])
    >>> Put(100.0)(ys, {})
    tensor([10.,  0.])
    """

    sign: ClassVar[float] = -1.0


@dataclass(frozen=True)
class Digital:
    """discount 1{S_T > strike}: a jump. The pathwise derivative through S_T is 0 on every path, and wrong.

    Parameters as in `Call`. The value at the strike itself is 1/2. It stays in the graph, with derivative 0:
    `sensitivity` refuses to differentiate it along the path; the derivative through the discount alone is right.

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
        gain = price(ys[-1], self.component, self.log) - number(self.strike, p)
        return discounted(self.discount, ys, p) * (0.5 + 0.5 * torch.sign(gain))

    def conditional(self, ys: Tensor, covariance: Tensor, p: Params) -> Tensor:
        """Equation (2): a probability, smooth in the path. Without variance it is the jump itself. Errors as in `Call`."""
        digital = lognormal_digital if self.log else normal_digital
        mean = digital(*last(ys, covariance, self.component), number(self.strike, p))
        return known_discount(self.discount, ys, covariance, p) * mean
