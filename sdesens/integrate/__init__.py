"""How a path is made: schemes as pure steps, chunks of steps, and `sdeint` over them."""

from sdesens.integrate.solve import sdeint

__all__ = ["sdeint"]
