"""Gradients of expectations without time: z = g(eps), one draw instead of a path."""

from sdesens.estimators.gradient import (
    ExpectationGradient,
    SampleTangents,
    expectation_gradient,
    sample_tangents,
    surrogate,
)
from sdesens.estimators.laws import Bernoulli, Categorical, Law, LogNormal, MultivariateNormal, Normal
from sdesens.estimators.methods import METHODS
from sdesens.estimators.own import Reparameterised, Sampler

__all__ = [
    "METHODS",
    "Bernoulli",
    "Categorical",
    "ExpectationGradient",
    "Law",
    "LogNormal",
    "MultivariateNormal",
    "Normal",
    "Reparameterised",
    "SampleTangents",
    "Sampler",
    "expectation_gradient",
    "sample_tangents",
    "surrogate",
]
