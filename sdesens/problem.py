"""What is asked: an SDE, a functional of its path, where it starts, and the grid.

    J(theta) = E[ F(X; p) ],   X on t_n = t0 + n (t1 - t0) / n_steps.                            (1)

theta is a choice of parameters of the SDE, the initial state ("y0") and the horizon ("t1"). This file holds the
question and checks its form; it computes nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor

from sdesens.errors import (
    ArgumentError,
    ArgumentTypeError,
    DtypeError,
    GridError,
    NonFiniteError,
    NotAFunctionError,
    ShapeError,
    UnknownParameterError,
)
from sdesens.sde import RESERVED, SDE, Params, check_dtype, check_function, matching
from sdesens.tensors import concrete

Theta = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Problem:
    """An expectation of a functional of the solution of an SDE, equation (1).

    Parameters
    ----------
    sde : SDE
    functional : callable (ys, p) -> (B,)
        ys has shape (T, B, *event): the states at `ts`, ys[0] being the initial one. It may depend on the parameters.
        One number a path, and path i's number must not depend on other paths.
    y0 : Tensor of shape `event` (usually (d,)), or callable p -> such a tensor
        The same for all paths. Its dtype is the dtype of the computation.
    ts : sequence of T >= 2 increasing times, or Tensor of shape (T,)
        Where the functional looks. Each must lie on the grid of `n_steps` equal steps from ts[0] to ts[-1].
    n_steps : int
        Steps from ts[0] to ts[-1].

    Raises
    ------
    GridError, ShapeError, DtypeError, ArgumentError, ArgumentTypeError

    Example
    -------
    >>> one = torch.ones(1, dtype=torch.float64)
    >>> sde = SDE(lambda t, y, p: -p["k"] * y, lambda t, y, p: torch.ones_like(y), {"k": one[0]})
    >>> problem = Problem(sde, lambda ys, p: ys[-1, :, 0], y0=one, ts=(0.0, 1.0), n_steps=8)
    >>> problem.outputs
    (0, 8)
    """

    sde: SDE
    functional: Callable[[Tensor, Params], Tensor]
    y0: Tensor | Callable[[Params], Tensor]
    ts: Tensor | Sequence[float]
    n_steps: int

    def __post_init__(self):
        if not isinstance(self.sde, SDE):
            raise ArgumentTypeError(
                f"`sde` must be an SDE, got {type(self.sde).__name__}: use as_sde(module) for a torchsde-style object."
            )
        check_function("functional", self.functional, ("ys", "p"))
        object.__setattr__(self, "ts", check_times(self.ts))
        object.__setattr__(self, "outputs", grid_positions(self.times, self.n_steps))
        if isinstance(self.y0, Tensor):
            check_state("y0", self.y0)
        elif not callable(self.y0):
            raise ArgumentTypeError(
                f"`y0` must be a tensor or a function of p, got {type(self.y0).__name__}: use torch.tensor(...)."
            )
        else:
            check_function("y0", self.y0, ("p",))
            once, again = self.initial({}), self.initial({})
            if concrete(once) and not torch.equal(once, again):
                raise NotAFunctionError(
                    "`y0(p)` returned two different results for the same p: it may not draw random numbers. Make a random "
                    "initial state the first step's noise, or give a tensor."
                )

    outputs: ClassVar[tuple[int, ...]] = ()  # grid index of each time in ts; set on each instance

    def __repr__(self) -> str:
        return f"Problem({self.sde!r}, {self.n_steps} steps from {self.t0:g} to {self.t1:g})"

    @property
    def times(self) -> Tensor:
        """`ts` as a float64 tensor."""
        assert isinstance(self.ts, Tensor)  # made so when the problem was
        return self.ts

    @property
    def t0(self) -> float:
        return float(self.times[0])

    @property
    def t1(self) -> float:
        return float(self.times[-1])

    @property
    def dt(self) -> float:
        """Length of one step."""
        return (self.t1 - self.t0) / self.n_steps

    def with_steps(self, n_steps: int) -> "Problem":
        """The same question on a grid of `n_steps` steps."""
        return replace(self, n_steps=n_steps)

    def leaves(self, wrt: Sequence[str] | str | None = None) -> dict[str, Tensor]:
        """The tensors to differentiate in: parameters by name or pattern ("net.*"), "y0", "t1"; all parameters if `wrt` is None."""
        names = tuple(self.sde.params) if wrt is None else (wrt,) if isinstance(wrt, str) else wrt
        if not isinstance(names, tuple | list):
            raise ArgumentTypeError(f"`wrt` must be a name or a tuple of names, got {wrt!r}.")
        known = (*self.sde.params, *RESERVED)
        theta = {}
        for name in chain.from_iterable(map(self._named, names)):
            if name not in known:
                raise UnknownParameterError(f"`wrt` names {name!r}, which is none of {_some(known)}.")
            if name == "y0" and not isinstance(self.y0, Tensor):
                raise UnknownParameterError(
                    "`wrt` names 'y0', but `y0` is computed from the parameters: differentiate in those, or give a tensor."
                )
            if name in theta:
                raise ArgumentError(f"`wrt` names {name!r} twice: name each once.")
            if name == "t1":
                theta[name] = torch.tensor(self.t1, dtype=torch.float64, device=self.initial({}).device)
            else:
                theta[name] = (self.initial({}) if name == "y0" else self.sde.params[name]).detach()
        return theta

    def _named(self, name) -> list:
        """A name, or the parameters that a pattern names."""
        if not isinstance(name, str) or "*" not in name:
            return [name]
        found = matching(name, tuple(self.sde.params))
        if not found:
            raise UnknownParameterError(
                f"`wrt` has the pattern {name!r}, and no parameter fits: there are {_some(tuple(self.sde.params))}."
            )
        return found

    def params(self, theta: Theta) -> dict[str, Tensor]:
        """The dict p that user functions see at theta."""
        return {**self.sde.params, **{k: v for k, v in theta.items() if k not in RESERVED}}

    def initial(self, theta: Theta) -> Tensor:
        """Initial state at theta, shape `event`."""
        if callable(self.y0):
            y0 = self.y0(self.params(theta))
            check_state("y0(p)", y0)
            return y0
        return theta.get("y0", self.y0)

    def step_size(self, theta: Theta) -> Tensor:
        """dt = (t1 - t0) / n_steps at theta: 0-dim float64 tensor."""
        t1 = theta.get("t1", self.times[-1])
        return (t1 - self.t0) / self.n_steps


def check_state(name: str, y0, *, batched: bool = False) -> None:
    """Raise unless y0 can be an initial state: of one path, or of a batch with the paths along axis 0."""
    if not isinstance(y0, Tensor):
        raise ArgumentTypeError(f"`{name}` must be a tensor, got {type(y0).__name__}: use torch.tensor(...).")
    check_dtype(f"`{name}`", y0)
    if y0.dim() < 1 + batched or y0.numel() == 0:
        wanted, remedy = (
            ("(B, d), one row a path,", "y0.expand(B, -1)") if batched else ("(d,)", "y0[None] for a number")
        )
        raise ShapeError(f"`{name}` must have shape {wanted} with no empty axis, got {tuple(y0.shape)}: use {remedy}.")
    if concrete(y0) and not bool(torch.isfinite(y0).all()):
        raise NonFiniteError(
            f"`{name}` holds NaN or infinite values: {y0.detach().flatten()[:8].tolist()}; every entry must be finite."
        )


def check_times(ts) -> Tensor:
    """Times as a float64 tensor on the CPU; raise GridError unless they increase."""
    if isinstance(ts, tuple | list) and any(isinstance(t, Tensor) and t.requires_grad for t in ts):
        raise ArgumentTypeError(
            "`ts` is a sequence that holds a tensor which requires grad; its gradient would be lost: use torch.stack(...)."
        )
    given = ts
    try:
        ts = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(
            f"`ts` must be a sequence of times or a tensor, got {type(ts).__name__}: use (t0, t1)."
        ) from error
    if ts.is_complex() or ts.dtype == torch.bool:
        raise DtypeError(f"`ts` must hold real numbers, got {ts.dtype}: use torch.float64.")
    if not isinstance(given, Tensor):  # torch reads plain floats in its default dtype: 0.1 would be off by 1e-9
        ts = torch.as_tensor(given, dtype=torch.float64).detach()
    ts = ts.to("cpu", torch.float64)
    if ts.dim() != 1 or ts.numel() < 2:
        raise GridError(f"`ts` must hold at least two times, shape (T,), got shape {tuple(ts.shape)}: use (t0, t1).")
    if not bool(torch.isfinite(ts).all()):
        raise GridError(f"`ts` must be finite, got {ts.tolist()}: give each time as a number.")
    steps = ts.diff()
    if not bool((steps > 0).all()):
        i = int((steps <= 0).nonzero()[0])
        raise GridError(
            f"`ts` must increase strictly, but ts[{i}] = {float(ts[i])!r} is followed by "
            f"ts[{i + 1}] = {float(ts[i + 1])!r}: sort the times and drop repeats."
        )
    return ts


def grid_positions(ts: Tensor, n_steps: int) -> tuple[int, ...]:
    """Grid index of each time in ts on `n_steps` equal steps from ts[0] to ts[-1]; raise GridError if one is off it."""
    if isinstance(n_steps, bool) or not isinstance(n_steps, int):
        raise ArgumentTypeError(f"`n_steps` must be an int, got {n_steps!r}: use int(...).")
    if n_steps < 1:
        raise GridError(f"`n_steps` must be at least 1, got {n_steps}: choose enough steps for the accuracy you need.")
    exact = (ts - ts[0]) / (ts[-1] - ts[0]) * n_steps
    index = exact.round()
    # times given in float32 are good to 6e-8 of the span: 1.2e-7 n_steps steps, and a thousandth of a step of grace
    off = (exact - index).abs() > 1e-3 + 1.2e-7 * n_steps
    off |= torch.cat((torch.tensor([False]), index.diff() < 1))
    if bool(off.any()):
        i = int(off.nonzero()[0])
        raise GridError(
            f"ts[{i}] = {float(ts[i])!r} lies at step {float(exact[i]):.6g} of {n_steps}: every time in `ts` must lie on "
            "the grid, nothing is interpolated. Choose `n_steps` (or `dt`) so that each time is a whole number of steps."
        )
    return tuple(int(i) for i in index)


def _some(names: Sequence[str]) -> str:
    """A dozen names, for an error message."""
    return ", ".join(map(repr, names[:12])) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
