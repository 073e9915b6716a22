"""Where randomness comes from: standard normals as addressable data."""

from sdesens.noise.source import (
    Antithetic,
    Coarsened,
    GivenNoise,
    Held,
    Noise,
    Philox,
    apart,
    coarsen,
    independent,
    settle,
)

__all__ = [
    "Antithetic",
    "Coarsened",
    "GivenNoise",
    "Held",
    "Noise",
    "Philox",
    "apart",
    "coarsen",
    "independent",
    "settle",
]
