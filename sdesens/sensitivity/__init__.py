"""How a path is differentiated: one file a method, one signature.

method(tile, theta) -> Contributions
"""

from collections.abc import Callable

from sdesens.sensitivity.adjoint import adjoint
from sdesens.sensitivity.finite_difference import finite_difference
from sdesens.sensitivity.forward import forward
from sdesens.sensitivity.pathwise import pathwise
from sdesens.sensitivity.tile import Contributions
from sdesens.sensitivity.torchsde_adjoint import torchsde_adjoint

METHODS: dict[str, Callable[..., Contributions]] = {
    "pathwise": pathwise,
    "forward": forward,
    "adjoint": adjoint,
    "torchsde_adjoint": torchsde_adjoint,
    "finite_difference": finite_difference,
}

__all__ = ["METHODS", "adjoint", "finite_difference", "forward", "pathwise", "torchsde_adjoint"]
