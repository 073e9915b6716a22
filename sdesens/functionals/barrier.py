"""Options that die, or are born, at a barrier."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sdesens.errors import ArgumentError
from sdesens.functionals.common import Functional, number
from sdesens.functionals.last_step import bridge_survival
from sdesens.functionals.options import Call
from sdesens.sde import Params


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
        barrier = number(self.barrier, p)
        if self.log:
            barrier = barrier.log() if isinstance(barrier, Tensor) else math.log(barrier)
        gap = ys[..., self.component] - barrier
        return gap if self.direction == "down" else -gap

    def _knocked(self, ys: Tensor, p: Params, alive: Tensor) -> Tensor:
        call = Call(self.strike, self.component, self.discount, self.log)(ys, p)
        return call * (alive if self.knock == "out" else 1 - alive)
