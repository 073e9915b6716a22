"""Options on a price at several times: Asian and lookback."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sdesens.functionals.common import Functional, discounted, last, log_price, no_formula, number, price
from sdesens.functionals.last_step import lognormal_option, normal_option
from sdesens.functionals.moments import known_discount
from sdesens.sde import Params


@dataclass(frozen=True)
class AsianCall:
    """discount (mean of S over ts[1:] - strike)^+, the arithmetic mean over the output times after the first.

    Parameters as in `Call`. The output times `ts` of the problem are the fixing dates.

    Example
    -------
    >>> import torch
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
        mean = price(ys[1:], self.component, self.log).mean(0)
        return discounted(self.discount, ys, p) * (mean - number(self.strike, p)).clamp(min=0)

    def conditional(self, ys: Tensor, covariance: Tensor, p: Params) -> Tensor:
        """Equation (2): a call on the last fixing, whose strike n K - (sum of the others) may be negative. Errors as in `Call`."""
        n, others = len(ys) - 1, price(ys[1:-1], self.component, self.log).sum(0)
        option = lognormal_option if self.log else normal_option
        mean = option(*last(ys, covariance, self.component), n * number(self.strike, p) - others) / n
        return known_discount(self.discount, ys, covariance, p) * mean


@dataclass(frozen=True)
class GeometricAsianCall:
    """discount (geometric mean of S over ts[1:] - strike)^+. Parameters as in `Call`; prices must be positive.

    Example
    -------
    >>> import torch
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
        mean = log_price(ys[1:], self.component, self.log).mean(0).exp()
        return discounted(self.discount, ys, p) * (mean - number(self.strike, p)).clamp(min=0)

    def conditional(self, ys: Tensor, covariance: Tensor, p: Params) -> Tensor:
        """Equation (2), for a state that holds log S: the mean of the logarithms is Gaussian.

        Raises
        ------
        MethodError
            Without `log`, or if the last step moves the discount at random.
        """
        if not self.log:
            raise no_formula("GeometricAsianCall(log=False)", "the geometric mean of prices", "write the SDE for log S")
        n, (_, variance) = len(ys) - 1, last(ys, covariance, self.component)
        mean = lognormal_option(ys[1:, :, self.component].mean(0), variance / n**2, number(self.strike, p))
        return known_discount(self.discount, ys, covariance, p) * mean


@dataclass(frozen=True)
class LookbackCall:
    """discount (max of S over ts - strike)^+, the maximum over all output times, the first among them.

    Parameters as in `Call`.

    Example
    -------
    >>> import torch
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
        gain = price(ys, self.component, self.log).amax(0) - number(self.strike, p)
        return discounted(self.discount, ys, p) * gain.clamp(min=0)

    def conditional(self, ys: Tensor, covariance: Tensor, p: Params) -> Tensor:
        """Equation (2): with M the maximum so far, (M - K)^+ and a call with strike max(M, K). Errors as in `Call`."""
        gain = (price(ys[:-1], self.component, self.log).amax(0) - number(self.strike, p)).clamp(min=0)
        option = lognormal_option if self.log else normal_option
        more = option(*last(ys, covariance, self.component), number(self.strike, p) + gain)
        return known_discount(self.discount, ys, covariance, p) * (gain + more)


@dataclass(frozen=True)
class FloatingLookback:
    """discount (S_T - min of S over ts), the minimum over all output times, the first and the last among them.

    Parameters as in `Call`, without a strike.

    Example
    -------
    >>> import torch
    >>> ys = torch.tensor([100.0, 80.0, 90.0]).reshape(3, 1, 1)
    >>> FloatingLookback()(ys, {})
    tensor([10.])
    """

    component: int = 0
    discount: float | Functional = 1.0
    log: bool = False
    kind: ClassVar[str] = "kink"

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        prices = price(ys, self.component, self.log)
        return discounted(self.discount, ys, p) * (prices[-1] - prices.amin(0))

    def conditional(self, ys: Tensor, covariance: Tensor, p: Params) -> Tensor:
        """Equation (2): a call whose strike is the minimum so far. Errors as in `Call`."""
        option = lognormal_option if self.log else normal_option
        lowest = price(ys[:-1], self.component, self.log).amin(0)
        mean = option(*last(ys, covariance, self.component), lowest)
        return known_discount(self.discount, ys, covariance, p) * mean
