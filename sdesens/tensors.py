"""Two questions about a tensor that every room asks before it raises, and forward mode that threads can share.

This file knows nothing of SDEs.
"""

import itertools
import threading
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_FORWARD_MODE = threading.RLock()


def jvp(function, primals: tuple, tangents: tuple):
    """`torch.func.jvp` of tensors or dicts of them, expanded ones too, and one thread at a time.

    torch keeps the levels of forward mode per process, not per thread: two threads inside would end each other's. And it
    refuses tensors that hold one number in several places.
    """
    primals, tangents = tuple(map(_dense, primals)), tuple(map(_dense, tangents))
    if torch.compiler.is_compiling():
        return _jvp_by_transposes(function, primals, tangents)
    with _FORWARD_MODE:
        out, moved = torch.func.jvp(function, primals, tangents)[:2]
    return out, tree_map(lambda x, t: t.to(x.dtype), out, moved)  # torch promotes tangents of 0-dim tensors


def _jvp_by_transposes(function, primals: tuple, tangents: tuple):
    """The same in reverse mode, as the transpose of the transpose: torch cannot trace forward mode over dynamic shapes."""
    out = function(*primals)

    def transposed(bars):
        return torch.func.vjp(function, *primals)[1](bars)

    push = torch.func.vjp(transposed, tree_map(torch.zeros_like, out))[1]
    return out, push(tangents)[0]


def _dense(x):
    return {k: v.contiguous() for k, v in x.items()} if isinstance(x, Mapping) else x.contiguous()


def basis(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The unit vectors of the space of these tensors, in the order of its components."""
    vectors = []
    for name, value in tensors.items():
        for i in range(value.numel()):
            unit = {k: v.new_zeros(v.shape) for k, v in tensors.items()}  # contiguous, whatever the layout of v
            unit[name].view(-1)[i] = 1.0
            vectors.append(unit)
    return vectors


def split(flat: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows (B, number of components) back to one entry a tensor, (B, *shape): components in the order of `basis`."""
    parts = flat.split([v.numel() for v in tensors.values()], dim=1)
    return {k: part.reshape(-1, *v.shape) for part, (k, v) in zip(parts, tensors.items(), strict=True)}


def concrete(x: Tensor) -> bool:
    """Whether the values of x can be looked at: not under vmap, jvp or grad of torch.func, nor while compiling; "meta" has none."""
    return not (torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x) or x.is_meta)


def writes(x: Tensor) -> int:
    """How often x was written into, as far as torch counts it: not in inference mode, nor under transforms."""
    return x._version if concrete(x) and not x.is_inference() else 0


def transforming() -> bool:
    """Whether a transform of torch.func, or torch's forward mode, is under way, even if not on the tensors at hand."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def describe(x) -> str:
    """What came, for an error message."""
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def coordinate_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """What the entries of a tensor are called, in order.

    Example
    -------
    >>> coordinate_names("a", (2, 1)), coordinate_names("b", ())
    (['a[0,0]', 'a[1,0]'], ['b'])
    """
    return [f"{name}[{','.join(map(str, i))}]" if i else name for i in itertools.product(*map(range, shape))]
