"""The Philox streams of this room, one a purpose, so that one seed may serve them all.

Samplers use the core's own, stream 0 of the seed, whose step 0 is the start. The core goes on to the next stream (`independent`)
and to the other half of them (`apart`); it keeps 0xFFFFFFFB ... 0xFFFFFFFF for probes and pilots. These are away from all of that,
and 16 from each other.
"""

TIMES = 0x64736D10  # training: the place of an item's time in its stratum
TURN = 0x64736D20  # training: how far strata are turned, one number a step
NOISE = 0x64736D30  # training: eps
DROP = 0x64736D40  # training: whether an item loses its condition
ORDER = 0x64736DB0  # training: the order of the data, one permutation an epoch
LAW = 0x64736DC0  # training: x_0, where it is drawn from a law
PROBES = 0x64736D50  # likelihood: signs of an estimated divergence
CELLS = 0x64736D60  # dequantisation: the place in a cell
DATA = 0x64736D70  # laws: draws of x_0 by a seed
FLOOR_DATA = 0x64736D80  # floors of laws by Monte Carlo: x_0
FLOOR_NOISE = 0x64736D90  # and (t, eps)
SLICES = 0x64736DD0  # metrics: the directions of sliced distances
