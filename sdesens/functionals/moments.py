"""Moments of the last state, its Laplace transform, discounts, and rewards along the way."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sdesens.errors import MethodError
from sdesens.functionals.common import Functional, discounted, last
from sdesens.functionals.last_step import normal_exponential, normal_moment
from sdesens.sde import Params
from sdesens.tensors import concrete


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
        return normal_moment(*last(ys, covariance, self.component), int(self.power))


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
        return normal_exponential(*last(ys, covariance, self.component), self.u)


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
        return normal_exponential(*last(ys, covariance, self.component), 1.0)


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


def known_discount(discount: float | Functional, ys: Tensor, covariance: Tensor, p: Params) -> float | Tensor:
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
    return discounted(discount, ys, p)


@dataclass(frozen=True)
class RunningReward:
    """I_T, and a functional of the last state if one is given: int_0^T reward dt + terminal(ys, p).

    The component holds I_t (`with_running_integral` appends it last). `method="likelihood_ratio"` multiplies what is gained between
    two output times with the scores of the steps before the later one alone: the more output times, the less variance.

    Parameters
    ----------
    terminal : functional, optional
        Counted at the last time.
    component : int

    Example
    -------
    >>> ys = torch.tensor([0.0, 1.0, 3.0]).reshape(3, 1, 1)           # I at three times, one path
    >>> RunningReward()(ys, {}), RunningReward().rewards(ys, {}).flatten()
    (tensor([3.]), tensor([0., 1., 2.]))
    """

    terminal: Functional | None = None
    component: int = -1

    @property
    def kind(self) -> str:
        """That of the terminal functional; smooth without one."""
        return getattr(self.terminal, "kind", "jump") if self.terminal is not None else "smooth"

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        return self.rewards(ys, p).sum(0)

    def rewards(self, ys: Tensor, p: Params) -> Tensor:
        """What is gained up to each output time since the one before, shape (T, B)."""
        integral = ys[..., self.component]
        gained = torch.cat((integral[:1], integral.diff(dim=0)))
        if self.terminal is None:
            return gained
        return torch.cat((gained[:-1], (gained[-1] + self.terminal(ys, p))[None]))
