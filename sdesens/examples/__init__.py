"""Short programs on top of the library, kept importable so that notebooks and tests can use them."""
