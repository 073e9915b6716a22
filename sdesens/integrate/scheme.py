"""Which scheme an equation moves by: Euler-Maruyama, or the `step` that it brings.

Everything that runs or differentiates a path goes through this one function, so that a scheme is chosen in one place.
"""

from torch import Tensor

from sdesens.integrate import euler
from sdesens.sde import SDE, Params


def step(sde: SDE, p: Params, t: Tensor, dt: Tensor, y: Tensor, dW: Tensor) -> Tensor:
    """One step of the SDE's own scheme; arguments and result as in `euler.step`."""
    return (euler.step if sde.step is None else sde.step)(sde, p, t, dt, y, dW)
