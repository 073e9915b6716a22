"""An `nn.Module` as a function of its parameters.

It is one module for all threads, and lending it other parameters changes it for the length of a call: they take turns.
"""

import operator
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sdesens.errors import ArgumentTypeError

_MODULES = threading.RLock()


@dataclass(frozen=True, eq=False)
class Lent:
    """A method of an object as a function of (parameters, *args).

    Parameters
    ----------
    module : object
        An `nn.Module`, or any other object if there are no names.
    names : tuple of str
        Which parameters are lent; the rest stay the module's own.
    method : str

    Raises
    ------
    ArgumentTypeError
        If there are names, and no module to lend them to.

    Example
    -------
    >>> line = Lent(nn.Linear(1, 1), ("weight", "bias"))
    >>> line({"weight": torch.tensor([[2.0]]), "bias": torch.tensor([1.0])}, torch.tensor([3.0]))
    tensor([7.])
    """

    module: object
    names: tuple[str, ...]
    method: str = "__call__"

    def __post_init__(self):
        if self.names and not isinstance(self.module, nn.Module):
            raise ArgumentTypeError(
                f"`module` must be an nn.Module where parameters are lent, got {type(self.module).__name__}: make it one, or lend none."
            )

    def __call__(self, params: Mapping[str, Tensor], *args):
        if torch.compiler.is_compiling():
            return self._evaluate(params, *args)
        with _MODULES:
            return self._evaluate(params, *args)

    def _evaluate(self, params: Mapping[str, Tensor], *args):
        if all(params[name] is self._held(name) for name in self.names):  # the module's own: nothing to lend
            return getattr(self.module, self.method)(*args)
        lent = {f"module.{name}": params[name] for name in self.names}
        return functional_call(_Dispatch(self.module), lent, (self.method, *args))

    def _held(self, name: str):
        """The parameter that the module holds at this moment."""
        return operator.attrgetter(name)(self.module)


class _Dispatch(nn.Module):
    """`functional_call` reaches `forward` only; this hands the call on to another method."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, method, *args):
        return getattr(self.module, method)(*args)
