"""Options on several prices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sdesens.errors import ArgumentError, ArgumentTypeError, ShapeError
from sdesens.functionals.common import Functional, discounted, log_price, no_formula, number, price
from sdesens.functionals.last_step import (
    lognormal_option,
    normal_option,
)
from sdesens.functionals.moments import known_discount
from sdesens.sde import Params


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
            basket = (log_price(ys[-1], every, self.log) @ weights).exp()
        else:
            basket = price(ys[-1], every, self.log) @ weights
        return discounted(self.discount, ys, p) * (basket - number(self.strike, p)).clamp(min=0)

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
            raise no_formula(f"BasketCall({options})", "the basket", f"use {remedy}")
        weights = self._weights(ys)
        n = len(weights)
        variance = (covariance[..., :n, :n] @ weights) @ weights
        option = lognormal_option if self.log else normal_option
        mean = option(ys[-1, :, :n] @ weights, variance, number(self.strike, p))
        return known_discount(self.discount, ys, covariance, p) * mean

    def _weights(self, ys: Tensor) -> Tensor:
        if ys.shape[-1] < len(self.weights):
            raise ShapeError(
                f"`weights` has {len(self.weights)} numbers, but the state has {ys.shape[-1]} components: give one for each."
            )
        return torch.tensor(self.weights, dtype=ys.dtype, device=ys.device)
