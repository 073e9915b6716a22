"""What functionals share: prices and their logarithms, numbers that may be parameters, discounts.

This file computes no expectation.
"""

from collections.abc import Callable

from torch import Tensor

from sdesens.errors import MethodError
from sdesens.sde import Params

Functional = Callable[[Tensor, Params], Tensor]


def price(y: Tensor, component: int | slice, log: bool) -> Tensor:
    """A component of states y (..., d) as a price: its exponential if it is the log-price."""
    s = y[..., component]
    return s.exp() if log else s


def log_price(y: Tensor, component: int | slice, log: bool) -> Tensor:
    """The same as a log-price."""
    s = y[..., component]
    return s if log else s.log()


def number(value: float | str, p: Params) -> float | Tensor:
    """A number, or the parameter of that name."""
    return p[value] if isinstance(value, str) else value


def discounted(discount: float | Functional, ys: Tensor, p: Params) -> float | Tensor:
    """The discount: a number, or a functional's, shape (B,)."""
    return discount(ys, p) if callable(discount) else discount


def last(ys: Tensor, covariance: Tensor, component: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (B,) of a component of the last state."""
    return ys[-1, :, component], covariance[..., component, component]


def no_formula(what: str, which: str, remedy: str) -> MethodError:
    """The error of a payoff whose expectation over the last step is not known."""
    return MethodError(
        f"`{what}` has no closed form over the last step: {which} is neither Gaussian nor log-Gaussian there. To have one, "
        f"{remedy}; or take a method that does not average over the last step."
    )
