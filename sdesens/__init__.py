"""sdesens: sensitivities of stochastic differential equations, d/dtheta E[F(X)], with honest error bars."""

from sdesens.crosscheck import CrossCheck, crosscheck
from sdesens.errors import SdesensError, ZeroGradientWarning
from sdesens.estimate import Estimate
from sdesens.estimators import expectation_gradient
from sdesens.integrate import sdeint
from sdesens.montecarlo import Sensitivity, merge, sensitivity
from sdesens.noise import Antithetic, Coarsened, GivenNoise, Noise, Philox, coarsen
from sdesens.problem import Problem
from sdesens.rewrite import correlated_noise, to_ito, to_stratonovich, with_running_integral
from sdesens.sde import SDE, as_sde
from sdesens.sensitivity import METHODS
from sdesens.sensitivity.tangent import TangentPaths, tangent_paths
from sdesens.verdict import Answer

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "SDE",
    "Answer",
    "Antithetic",
    "Coarsened",
    "CrossCheck",
    "Estimate",
    "GivenNoise",
    "Noise",
    "Philox",
    "Problem",
    "SdesensError",
    "Sensitivity",
    "TangentPaths",
    "ZeroGradientWarning",
    "as_sde",
    "coarsen",
    "correlated_noise",
    "crosscheck",
    "expectation_gradient",
    "merge",
    "sdeint",
    "sensitivity",
    "tangent_paths",
    "to_ito",
    "to_stratonovich",
    "with_running_integral",
]
