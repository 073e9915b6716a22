"""How a path is differentiated: one file a method, one signature.

method(tile, theta) -> Contributions
"""

from collections.abc import Callable
from typing import Any

from sdesens.sensitivity import likelihood_ratio as _likelihood_ratio
from sdesens.sensitivity import malliavin as _malliavin
from sdesens.sensitivity.adjoint import adjoint
from sdesens.sensitivity.conditional import conditional
from sdesens.sensitivity.finite_difference import finite_difference
from sdesens.sensitivity.forward import forward
from sdesens.sensitivity.likelihood_ratio import likelihood_ratio
from sdesens.sensitivity.malliavin import malliavin
from sdesens.sensitivity.pathwise import pathwise
from sdesens.sensitivity.tile import Contributions
from sdesens.sensitivity.torchsde_adjoint import torchsde_adjoint
from sdesens.sensitivity.vibrato import vibrato

METHODS: dict[str, Callable[..., Contributions]] = {
    "pathwise": pathwise,
    "forward": forward,
    "adjoint": adjoint,
    "torchsde_adjoint": torchsde_adjoint,
    "finite_difference": finite_difference,
    "likelihood_ratio": likelihood_ratio,
    "malliavin": malliavin,
    "vibrato": vibrato,
    "conditional": conditional,
}

# What these differentiate along the path is not the functional itself, so it may be cut off from the graph, and jump.
SMOOTHED = ("likelihood_ratio", "malliavin", "vibrato", "conditional")
# Those whose chunks are compiled kernels.
COMPILED = ("pathwise", "forward", "adjoint", "finite_difference", "vibrato", "conditional")
# settle(tile, theta, options) -> options, on a pilot tile of other noise, before a run.
SETTLE: dict[str, Callable[..., dict[str, Any]]] = {
    "likelihood_ratio": _likelihood_ratio.settle,
    "malliavin": _malliavin.settle,
}

__all__ = ["COMPILED", "METHODS", "SETTLE", "SMOOTHED", *METHODS]
