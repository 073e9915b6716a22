"""sdesens: sensitivities of stochastic differential equations, d/dtheta E[F(X)], with honest error bars."""

from sdesens.audit import Audit, audit
from sdesens.crosscheck import CrossCheck, crosscheck
from sdesens.errors import (
    HeavyTailWarning,
    HighVarianceWarning,
    JumpError,
    JumpWarning,
    KinkError,
    SdesensError,
    ZeroGradientWarning,
)
from sdesens.estimate import Estimate
from sdesens.estimators import expectation_gradient
from sdesens.fit import Fit, fit_transitions
from sdesens.hessian import Hessian, hessian
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
    "Audit",
    "Coarsened",
    "CrossCheck",
    "Estimate",
    "Fit",
    "GivenNoise",
    "HeavyTailWarning",
    "Hessian",
    "HighVarianceWarning",
    "JumpError",
    "JumpWarning",
    "KinkError",
    "Noise",
    "Philox",
    "Problem",
    "SdesensError",
    "Sensitivity",
    "TangentPaths",
    "ZeroGradientWarning",
    "as_sde",
    "audit",
    "coarsen",
    "correlated_noise",
    "crosscheck",
    "expectation_gradient",
    "fit_transitions",
    "hessian",
    "merge",
    "sdeint",
    "sensitivity",
    "tangent_paths",
    "to_ito",
    "to_stratonovich",
    "with_running_integral",
]
