"""What the tests of diffusion models share."""

import torch

D = torch.float64


def scalar(x, dtype=D) -> torch.Tensor:
    return torch.tensor(x, dtype=dtype)


def call(function, *args, **kwargs):
    """A call to make later, in a table of bad input."""
    return lambda: function(*args, **kwargs)


def identity(x, t):
    return x
