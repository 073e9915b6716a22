"""Gradients of expectations without time: z = g(eps), one draw instead of a path."""

from sdesens.estimators.compare import Comparison, compare
from sdesens.estimators.decomposition import Decomposition, decompose
from sdesens.estimators.discrete import Bernoulli, Categorical
from sdesens.estimators.gaussian import LogNormal, MultivariateNormal, Normal
from sdesens.estimators.gradient import ExpectationGradient, expectation_gradient, surrogate
from sdesens.estimators.laws import Law
from sdesens.estimators.methods import METHODS
from sdesens.estimators.own import Reparameterised, Sampler
from sdesens.estimators.study import Study, variance_study
from sdesens.estimators.tangents import SampleTangents, sample_tangents

__all__ = [
    "METHODS",
    "Bernoulli",
    "Categorical",
    "Comparison",
    "Decomposition",
    "ExpectationGradient",
    "Law",
    "LogNormal",
    "MultivariateNormal",
    "Normal",
    "Reparameterised",
    "SampleTangents",
    "Sampler",
    "Study",
    "compare",
    "decompose",
    "expectation_gradient",
    "sample_tangents",
    "surrogate",
    "variance_study",
]
