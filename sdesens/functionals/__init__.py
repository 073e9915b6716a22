"""Functionals of a path: what is averaged.

    F(X; p) = f(X at the output times; p),   one number a path.                                  (1)

Each is a small frozen object called as `functional(ys, p)`, with ys of shape (T, B, d) and a result of shape (B,); being
objects of a module they pickle, as a process pool needs. A plain function of the same form serves as well.

Money is discounted by another functional: a number, `Discount()` (the state carries the integral of the rate) or
`ConstantRate("r", maturity)` (a parameter of the SDE). Only `Discount` moves with the horizon when "t1" is differentiated.

A functional says how it depends on the path: its `kind` is "smooth", "kink" or "jump". A kink, as in a call, has a pathwise
derivative almost everywhere, and it is the right one. A jump, as in `Digital`, has not: its pathwise derivative is 0 almost
everywhere and misses the jump. Calling a functional does not smooth anything. Two methods do, where there is a formula:

    conditional(ys, covariance, p)  = E[F | all before the last step],                           (2)
    bridge(ys, covariance, p)       = E[F | all grid points],                                    (3)

(2) for a last step X_T ~ N(ys[-1], covariance), and (3), of `BarrierCall`, for a barrier watched between the grid points
too. Both have the mean of F (in (3) of F watched all the time) and no jump left.

    conditional   ys (T, B, d): the states at the output times, and in ys[-1] the mean of the last one;
                  covariance (B, d, d) of the last one; a component without noise has zeros in its row.
    bridge        ys (N + 1, B, d): all grid points; covariance (N, B, d, d) of each step.

Reference: P. Glasserman, Monte Carlo Methods in Financial Engineering, 2003, sections 6.4, 7.2.
"""

from sdesens.functionals.barrier import BarrierCall
from sdesens.functionals.basket import BasketCall
from sdesens.functionals.common import Functional
from sdesens.functionals.moments import ConstantRate, Discount, Laplace, Moment, RunningReward, SumOfSquares
from sdesens.functionals.options import Call, Digital, Put
from sdesens.functionals.path_options import AsianCall, FloatingLookback, GeometricAsianCall, LookbackCall

__all__ = [
    "AsianCall",
    "BarrierCall",
    "BasketCall",
    "Call",
    "ConstantRate",
    "Digital",
    "Discount",
    "FloatingLookback",
    "Functional",
    "GeometricAsianCall",
    "Laplace",
    "LookbackCall",
    "Moment",
    "Put",
    "RunningReward",
    "SumOfSquares",
]
