"""A pure function compiled: once for each kind of coefficients, shapes and options, checked, and then called directly.

A kernel cannot always be compiled, for want of a C++ compiler or because a coefficient does what torch.compile cannot
trace; then it runs as the plain function that it is, with one warning. The numbers are the same to rounding: the first
result of a compiled kernel is compared with that of the plain function, for compilers err.
"""

import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from sdesens.errors import SlowPathWarning
from sdesens.integrate.chunk import Dynamics
from sdesens.sde import SDE, Params

OPTIONS: dict[str, Any] = {
    # Inductor inlines an expression into each of its uses unless it has more operations than this; at its default of 30
    # the generator and its transform took 14 to 30 s to compile, at 12 they take 5, for the same speed.
    "realize_opcount_threshold": 12,
    # and then it makes one loop of at most so many, 64 by default: a sweep and its transpose need more.
    "max_fusion_size": 512,
    # Vector instructions that the processor has, the compiler has too. Making sure of each took 8 s.
    "cpp.vec_isa_ok": True,
}


class Clock(NamedTuple):
    """A grid as 0-dim float64 tensors: t_n = t0 + n (t1 - t0) / n_steps."""

    t0: Tensor
    t1: Tensor
    n_steps: Tensor

    @classmethod
    def of(cls, t0: float, t1: float | Tensor, n_steps: int, device: torch.device) -> "Clock":
        """From numbers."""
        begin, end, steps = (
            x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=device)
            for x in (t0, t1, float(n_steps))
        )
        return cls(begin, end, steps)

    @property
    def dt(self) -> Tensor:
        """One step."""
        return (self.t1 - self.t0) / self.n_steps

    def at(self, theta: Params) -> "Clock":
        """This grid with the horizon of theta, if it has one."""
        return self._replace(t1=theta.get("t1", self.t1))

    def dynamics(self, sde: SDE, p: Params) -> Dynamics:
        """The SDE on this grid."""
        return Dynamics(sde, p, self.t0, self.dt)


class Stretch(NamedTuple):
    """Where a kernel works, as 0-dim int64 tensors: paths `first ... last`, `active` steps from `start`; and its noise.

    Paths beyond `last` are copies of it, to fill a batch up to its size.
    """

    noise: Any  # the key of noise made inside the kernel, or the normals (B, m) of each step, made outside
    first: Tensor
    last: Tensor
    start: Tensor
    active: Tensor


class Kernel:
    """A pure function, compiled at its first call; each result just compiled is compared with its own."""

    def __init__(self, function: Callable, static: dict[str, Any], coefficients: tuple, numbers: frozenset[str]):
        def run(sde, rest, theta, clock, where, noise, *args):
            rest, theta = ({k: v[0] if k in numbers else v for k, v in part.items()} for part in (rest, theta))
            return function(sde, rest, theta, Clock(*clock.unbind()), Stretch(noise, *where.unbind()), *args, **static)

        self.plain, self.coefficients, self.called = run, coefficients, False
        # torch.compile keeps what it compiled by code object and gives up after eight: every kernel has its own
        own = FunctionType(run.__code__.replace(), run.__globals__, function.__name__, None, run.__closure__)
        self.fast = torch.compile(own, fullgraph=True, dynamic=False, backend=_recorded)

    def __call__(self, sde, rest, theta, clock, where, noise, *args):
        if self.coefficients in _REFUSED:
            return self.plain(sde, rest, theta, clock, where, noise, *args)
        made = [noise] if isinstance(noise, list) else []
        for x in tensors_of((*made, *args)):  # another run has another number of paths, or of groups of them
            for axis, size in enumerate(x.shape):
                if size == args[0].shape[0] > 1:
                    torch._dynamo.maybe_mark_dynamic(x, axis)
        _LAST.new = False
        try:
            if self.called:
                result = self.fast(sde, rest, theta, clock, where, noise, *args)
            else:
                with _FIRST_CALLS, warnings.catch_warnings(action="ignore"):  # torch's own, about its own insides
                    result = self.fast(sde, rest, theta, clock, where, noise, *args)
                self.called = True
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            return self._refuse(_reason(error)).plain(sde, rest, theta, clock, where, noise, *args)
        if _LAST.new:
            with torch.no_grad():
                expected = self.plain(sde, rest, theta, clock, where, noise, *args)
            if not _alike(result, expected):
                return self._refuse("the compiled kernel computes something else").plain(
                    sde, rest, theta, clock, where, noise, *args
                )
        return result

    def _refuse(self, why: str) -> "Kernel":
        said = {coefficients[1:] for coefficients in _REFUSED}  # of another kernel of theirs
        _REFUSED.add(self.coefficients)
        _LAST.call = None
        if self.coefficients[1:] not in said:
            names = " and ".join(dict.fromkeys(_name(identity) for identity in self.coefficients[1:4] if identity))
            warnings.warn(
                f"torch.compile cannot make a kernel of {names}: {why}. They run uncompiled, which is slower, with the same "
                "numbers to rounding; compile=False asks for this without a warning.",
                SlowPathWarning,
                stacklevel=2,
            )
        return self


def _reason(error: Exception) -> str:
    """One sentence on what went wrong, and what to do."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "_recorded" not in line]
    what = f"{type(error).__name__}: {lines[0] if lines else '':.200}".rstrip(".: ")
    if any(sign in what for sign in ("Cpp", "Cxx", "C++")):
        return f"there is no working C++ compiler ({what}); install g++ or clang++"
    return f"it does what cannot be traced ({what}), such as a Python branch on values (use torch.where)"


def _name(identity: Any) -> str:
    """Coefficients for a message, from what `_identity` made of them."""
    first, *held = identity
    if isinstance(first, CodeType):
        return f"{first.co_name} ({Path(first.co_filename).name}, line {first.co_firstlineno})"
    modules = [x.__name__ for x in held if isinstance(x, type)]
    return ".".join([*(modules or [first.__name__]), *(x for x in held if isinstance(x, str))])


def _alike(result: Any, expected: Any) -> bool:
    """Whether two results of a kernel agree as far as rounding lets them: a compiler may be wrong, and has been.

    Rounding may carry single paths across a branch of the coefficients, so means over paths are compared; and what is zero
    but for rounding is measured against the largest of the results.
    """
    pairs = [(a.detach(), b) for a, b in zip(tree_leaves(result), tree_leaves(expected), strict=True) if b.numel()]
    finite = [(a.double(), b.double(), torch.isfinite(b)) for a, b in pairs]
    sizes = [float(b[ok].abs().mean()) if bool(ok.any()) else 0.0 for _, b, ok in finite]
    gaps = [float((a - b)[ok].abs().mean()) if bool(ok.any()) else 0.0 for a, b, ok in finite]
    floor = max(sizes, default=0.0) * max((torch.finfo(b.dtype).eps for _, b in pairs), default=0.0) ** 0.5
    return all(gap <= 1e-3 * size + floor for gap, size in zip(gaps, sizes, strict=True))


_FIRST_CALLS = threading.RLock()  # Python's filters of warnings belong to all threads
_LAST = threading.local()  # of each thread: the last call of a compiled graph, and whether it was compiled for it


def _recorded(graph, inputs):
    """Inductor as a backend of torch.compile; its function leaves word of what it was called with, see `Shortcut`."""
    _LAST.new = True
    _say_once()
    from torch._inductor.compile_fx import compile_fx  # two seconds of imports, for those who compile

    from sdesens.integrate.layout import PathsInside

    inner: Any = compile_fx(graph, inputs, config_patches=OPTIONS | {"post_grad_custom_pre_pass": PathsInside()})

    def run(*inputs):
        outputs = inner(*inputs)
        _LAST.call = inner, inputs, outputs
        return outputs

    return run


@cache
def _say_once() -> None:
    print("sdesens: compiling, 10 to 20 s for each new kind of problem; compile=False does not.", file=sys.stderr)


@dataclass(frozen=True, eq=False)
class Shortcut:
    """A compiled graph called directly, where all that torch.compile would check is known to be as it was before.

    Guards and bytecode take some 40 microseconds a call, as long as 10,000 normals. Inside a run only the tensors of the
    chunk change: the graph is called with these in the places where they went at the first, checked call.
    """

    inner: Callable
    inputs: list  # as they were
    changing: list[tuple[int, int]]  # which of them are which of the chunk's tensors
    places: list[int]  # of the result's tensors: in the outputs, or, if negative, from the end of the chunk's own
    structure: TreeSpec

    @classmethod
    def of(cls, changing: list[Tensor], result: Any) -> "Shortcut | None":
        """From the call just made in this thread; None if nothing compiled ran or tensors cannot be told apart."""
        last, _LAST.call = getattr(_LAST, "call", None), None
        own = {id(x): k for k, x in enumerate(changing)}
        if last is None or len(own) < len(changing):
            return None
        inner, inputs, outputs = last
        leaves, structure = tree_flatten(result)
        places = {id(x): k for k, x in enumerate(outputs)} | {k: v - len(changing) for k, v in own.items()}
        if not all(id(x) in places for x in leaves):
            return None
        moved = [(k, own[id(x)]) for k, x in enumerate(inputs) if id(x) in own]
        kept = [None if id(x) in own else x for x in inputs]
        return cls(inner, kept, moved, [places[id(x)] for x in leaves], structure)

    def __call__(self, changing: list[Tensor]):
        inputs = self.inputs.copy()
        for place, which in self.changing:
            inputs[place] = changing[which]
        outputs = self.inner(*inputs)
        return tree_unflatten([outputs[k] if k >= 0 else changing[k] for k in self.places], self.structure)


def tensors_of(arguments) -> list[Tensor]:
    """The tensors in tensors, lists and dicts, in order."""
    found: list[Tensor] = []
    for x in arguments:
        found += [x] if isinstance(x, Tensor) else x.values() if isinstance(x, dict) else x
    return found


_KERNELS: dict[tuple, Kernel] = {}
_REFUSED: set[tuple] = set()  # coefficients that did not compile


def kernel(
    function: Callable, sde: SDE, p: Params, numbers: frozenset[str], y: Tensor, static: dict[str, Any]
) -> Kernel:
    """The compiled form of a kernel function for this kind of SDE, parameters and state; made once."""
    shapes = tuple((k, v.shape, v.dtype) for k, v in p.items())
    coefficients = (_identity(sde.drift), _identity(sde.diffusion), _identity(sde.step), sde.noise_type)
    state = (y.shape[1:], y.dtype, y.device, y.requires_grad, torch.is_grad_enabled())
    key = (function, coefficients, shapes, numbers, state, tuple(static.items()))
    found = _KERNELS.get(key)
    return (
        _KERNELS.setdefault(key, Kernel(function, static, (function, *coefficients), numbers))
        if found is None
        else found
    )


def _identity(function: Any, depth: int = 4) -> Any:
    """What tells coefficients apart: their code, and the plain values and functions that they hold, down to a depth.

    Tensors are not among them: torch.compile hands those in. Modules of one class are alike.
    """
    if isinstance(function, str | int | float | None):
        return function
    if isinstance(function, nn.Module):
        return type(function)
    held: list[Any] = []
    code = getattr(function, "__code__", None)
    if code is not None:
        cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
        held = [*cells, *(function.__defaults__ or ())]
    elif isinstance(function, partial):
        held = [function.func, *function.args, *function.keywords.values()]
    elif isinstance(function, SDE) or (callable(function) and not isinstance(function, type)):
        held = list(getattr(function, "__dict__", {}).values())
    return code or type(function), *(_identity(x, depth - 1) for x in held if depth)
