"""Two questions about a tensor that every room asks before it raises. This file knows nothing of SDEs."""

import torch
from torch import Tensor


def concrete(x: Tensor) -> bool:
    """Whether the values of x can be looked at: not under vmap, jvp or grad of torch.func, nor while compiling."""
    return not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def describe(x) -> str:
    """What came, for an error message."""
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
