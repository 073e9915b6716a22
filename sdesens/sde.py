"""What is solved: one stochastic differential equation.

    dX = b(t, X; p) dt + sum_j s_j(t, X; p) dW^j            (Ito),                               (1)
    dX = b(t, X; p) dt + sum_j s_j(t, X; p) o dW^j          (Stratonovich).                      (2)

The interpretation belongs to the equation, not to a solver. (2) equals (1) with the drift

    b + 1/2 sum_j (ds_j/dx) s_j                                                                  (3)

(Kloeden & Platen, Numerical Solution of Stochastic Differential Equations, 1992, section 4.9). This file states
equations; `sdesens.rewrite` turns one into another. An equation moves by Euler-Maruyama unless it brings a scheme of its own,
its `step`: an equation whose solutions stay positive may need one that does, too.

Shapes: y is (B, *event), paths first. What `diffusion` returns depends on `noise_type`:

    diagonal   (B, *event)             component i is driven by W^i alone and s_ii depends on y_i alone
    scalar     (B, d, 1)               one Brownian motion for all components
    additive   (B, d, m) or (d, m)     does not depend on y
    general    (B, d, m)               anything
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from sdesens.errors import (
    ArgumentError,
    ArgumentTypeError,
    CalculusError,
    DtypeError,
    MethodError,
    ShapeError,
    UnknownParameterError,
)
from sdesens.modules import Lent

Params = Mapping[str, Tensor]
Coefficient = Callable[[Tensor, Tensor, Params], Tensor]
Step = Callable[["SDE", Params, Tensor, Tensor, Tensor, Tensor], Tensor]

NOISE_TYPES = ("diagonal", "scalar", "additive", "general")
SDE_TYPES = ("ito", "stratonovich")
RESERVED = ("y0", "t1")
LEFT = 1e-6  # of a step: how far from its end the limit from the left is taken
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False, repr=False)
class SDE:
    """An SDE, equation (1) or (2), with named parameters.

    Parameters
    ----------
    drift : callable (t, y, p) -> (B, *event)
        t is a 0-dim tensor, y is (B, *event), p the dict of parameters. Row i of the result depends on row i of y alone.
    diffusion : callable (t, y, p) -> Tensor
        Shapes in the module docstring. Its unit is that of y per square root of time: a volatility, not a variance.
    params : mapping of str to Tensor
        Floating tensors of any shape. The names "y0" and "t1" are taken: they mean the initial state and the horizon.
    noise_type : {"diagonal", "scalar", "additive", "general"}
    sde_type : {"ito", "stratonovich"}
    noise_dim : int, optional
        Number of Brownian motions m. Read off the diffusion where it is left out.
    step : callable (sde, p, t, dt, y, dW) -> (B, *event), optional
        A scheme of its own instead of Euler-Maruyama: the state after a step of length dt from y at t, with increments dW
        (B, m). A pure function like `sdesens.integrate.euler.step`; parameters come in p, not from `sde.params`. Drift and
        diffusion still state the equation, and the diffusion says how many Brownian motions there are. Methods that know
        Euler-Maruyama's step from inside (the continuous adjoints, likelihood ratios) refuse such an equation.
    piecewise : bool
        Whether the coefficients jump in time, at points of the grid, where they are continuous from the right. The continuous
        adjoints look at the end of a step, and take the limit from the left there.

    Raises
    ------
    ArgumentError, ArgumentTypeError, DtypeError

    Example
    -------
    >>> gbm = SDE(
    ...     drift=lambda t, y, p: p["mu"] * y,
    ...     diffusion=lambda t, y, p: p["sigma"] * y,
    ...     params={"mu": torch.tensor(0.05), "sigma": torch.tensor(0.2)},
    ... )
    >>> gbm.noise_type
    'diagonal'
    """

    drift: Coefficient
    diffusion: Coefficient
    params: Params = field(default_factory=dict)
    noise_type: str = "diagonal"
    sde_type: str = "ito"
    noise_dim: int | None = None
    step: Step | None = None
    piecewise: bool = False

    def __post_init__(self):
        for name in ("drift", "diffusion"):
            check_function(name, getattr(self, name), ("t", "y", "p"))
        if self.step is not None:
            check_function("step", self.step, ("sde", "p", "t", "dt", "y", "dW"))
        _check_choice("noise_type", self.noise_type, NOISE_TYPES)
        _check_choice("sde_type", self.sde_type, SDE_TYPES)
        m = self.noise_dim
        if m is not None and (isinstance(m, bool) or not isinstance(m, int) or m < 1):
            raise ArgumentError(
                f"`noise_dim` must be a positive int, got {m!r}: leave it out and it is read off the diffusion."
            )
        if not isinstance(self.params, Mapping):
            raise ArgumentTypeError(
                f"`params` must map names to tensors, got {type(self.params).__name__}: use {{'mu': torch.tensor(0.1)}}."
            )
        for name, value in self.params.items():
            check_parameter(name, value)
        object.__setattr__(self, "params", MappingProxyType(dict(self.params)))

    def __repr__(self) -> str:
        names = [f"{k} {tuple(v.shape)}" if v.dim() else k for k, v in self.params.items()]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return f"SDE({self.noise_type} noise, {self.sde_type}, parameters: {shown or 'none'})"

    def __reduce__(self):  # a mapping proxy does not pickle
        coefficients = (self.drift, self.diffusion, dict(self.params))
        return SDE, (*coefficients, self.noise_type, self.sde_type, self.noise_dim, self.step, self.piecewise)

    def with_params(self, **params: Tensor) -> "SDE":
        """The same equation at other parameter values; unknown names raise."""
        for name, value in params.items():
            if name not in self.params:
                raise UnknownParameterError(f"`{name}` is not a parameter of this SDE; it has {_names(self.params)}.")
            check_parameter(name, value)
            if value.shape != self.params[name].shape:
                raise ShapeError(
                    f"parameter `{name}` has shape {tuple(self.params[name].shape)}, got {tuple(value.shape)}: with_params "
                    "keeps shapes; make a new SDE to change them."
                )
        return replace(self, params={**self.params, **params})


def matching(name: str, known: Sequence[str]) -> list[str]:
    """The parameters that a name, or a pattern such as "net.*", means; only * stands for something else than itself."""
    if name in known:
        return [name]
    pattern = ".*".join(map(re.escape, name.split("*")))
    return [k for k in known if re.fullmatch(pattern, k)]


def noise_product(sde: SDE, g: Tensor, dW: Tensor) -> Tensor:
    """sum_j s_j dW^j from a diffusion g (shapes in the module docstring) and increments dW (B, m): (B, *event)."""
    if sde.noise_type == "diagonal":
        return g * dW.reshape(g.shape)
    if g.dim() == 3 and len(g) > 1 and g.stride(0) == 0:  # one matrix, expanded
        g = g[0]
    if g.dim() == 2:  # one matrix for every path
        return (g @ dW.mT).mT  # twice as fast as dW @ g.mT, whatever the layout: the long side inside
    if g.shape[-1] <= 4:  # a batched product of small matrices is slow, and does not fuse
        return sum(g[..., j] * dW[..., j, None] for j in range(1, g.shape[-1])) + g[..., 0] * dW[..., 0, None]
    return (g @ dW.unsqueeze(-1)).squeeze(-1)


def as_sde(module) -> SDE:
    """A torchsde-style object, unchanged, as an `SDE`.

    Parameters
    ----------
    module : object with `f(t, y)`, `g(t, y)` (or `f_and_g(t, y)`), `noise_type` and `sde_type`
        For an `nn.Module` the parameters are `dict(module.named_parameters())`; other objects have none, so only the
        initial state and the horizon of their solutions can be differentiated.

    Example
    -------
    >>> class OU(nn.Module):
    ...     noise_type, sde_type = "diagonal", "ito"
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.rate = nn.Parameter(torch.tensor(1.0))
    ...     def f(self, t, y):
    ...         return -self.rate * y
    ...     def g(self, t, y):
    ...         return torch.ones_like(y)
    >>> list(as_sde(OU()).params)
    ['rate']
    """
    separate = callable(getattr(module, "f", None)) and callable(getattr(module, "g", None))
    if not separate and not callable(getattr(module, "f_and_g", None)):
        raise ArgumentTypeError(
            f"`module` ({type(module).__name__}) needs methods f(t, y) and g(t, y), or f_and_g(t, y); for a pair of "
            "functions of (t, y, p) use SDE(drift, diffusion, params)."
        )
    for name in ("noise_type", "sde_type"):
        if not hasattr(module, name):
            raise ArgumentTypeError(f"`module` ({type(module).__name__}) needs an attribute `{name}`.")
    params = dict(module.named_parameters()) if isinstance(module, nn.Module) else {}
    if separate:
        drift, diffusion = _Method(module, params, "f"), _Method(module, params, "g")
    else:
        drift, diffusion = _Method(module, params, "f_and_g", 0), _Method(module, params, "f_and_g", 1)
    return SDE(drift, diffusion, params, noise_type=module.noise_type, sde_type=module.sde_type)


class _Method:
    """A method of a torchsde-style object as a function of (t, y, p)."""

    def __init__(self, module, params: Params, method: str, part: int | None = None):
        self.lent, self.part = Lent(module, tuple(params), method), part

    def __call__(self, t, y, p):
        out = self.lent(p, t, y)
        return out if self.part is None else out[self.part]


def require_ito(sde: SDE, where: str) -> None:
    """Raise CalculusError unless `sde` is an Ito equation."""
    if sde.sde_type != "ito":
        raise CalculusError(
            f"{where} solves Ito equations, but this SDE declares sde_type='stratonovich'. Its Ito drift is "
            "b + 1/2 sum_j (ds_j/dx) s_j: pass to_ito(sde), which adds the correction, or declare sde_type='ito' if the "
            "drift has it already."
        )


def require_euler(sde: SDE, where: str) -> None:
    """Raise MethodError if `sde` brings a scheme of its own."""
    if sde.step is not None:
        raise MethodError(
            f"{where} is made for Euler-Maruyama, but this SDE brings a `step` of its own: use method='pathwise', 'forward' or "
            "'finite_difference', which differentiate any scheme."
        )


def check_parameter(name: str, value) -> None:
    """Raise unless `value` can serve as the parameter `name`."""
    if name in RESERVED:
        raise ArgumentError(
            f"a parameter may not be called `{name}`: that name means the initial state or the horizon; rename it."
        )
    if isinstance(name, str) and (name == "value" or ", " in name):
        raise ArgumentError(
            f"a parameter may not be called {name!r}: results have a `value`, and name pairs of parameters with a comma; rename it."
        )
    if not isinstance(name, str):
        raise ArgumentTypeError(f"`params` must have strings for names, got {name!r}: use {str(name)!r}.")
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"parameter `{name}` must be a tensor, got {value!r}: use torch.tensor(...).")
    if value.numel() == 0:
        raise ShapeError(f"parameter `{name}` is empty, shape {tuple(value.shape)}: leave it out.")
    check_dtype(f"parameter `{name}`", value)


def check_dtype(what: str, value: Tensor) -> None:
    """Raise DtypeError unless `value` has a floating dtype that torch computes in."""
    if value.dtype not in DTYPES:
        raise DtypeError(
            f"{what} must be real and floating, got {value.dtype}: use torch.float64, or float32 for speed."
        )


def check_function(name: str, function, arguments: tuple[str, ...]) -> None:
    """Raise ArgumentTypeError unless `function` can be called with these positional arguments."""
    wanted = f"`{name}` must be a function of ({', '.join(arguments)})"
    if not callable(function):
        raise ArgumentTypeError(f"{wanted}, got {function!r}.")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ArgumentTypeError(f"{wanted}, but its arguments are {signature}: {error}.") from error


def _check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ArgumentError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _names(mapping: Mapping[str, Tensor]) -> str:
    return ", ".join(f"`{name}`" for name in mapping) or "none"
