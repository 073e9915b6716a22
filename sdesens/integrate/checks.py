"""Claims about an SDE that can be checked cheaply, are: once per call, on a few paths, never per step.

    shapes and dtypes       of drift and diffusion
    a function              the same input gives the same output, and path i's row does not look at path j
    diagonal                J = ds/dy is diagonal: for cotangents u, v, (J'u) v = (J'v) u entry by entry
    additive                J = 0
    step                    a scheme of the equation's own: shape, dtype, and a function path by path

Those of J take two vector-Jacobian products whatever the number of components. Nothing here draws from a global
random stream or changes any state.
"""

import torch
from torch import Tensor

from sdesens.errors import (
    DtypeError,
    NoiseStructureError,
    NonFiniteError,
    NotAFunctionError,
    ShapeError,
    UnknownParameterError,
)
from sdesens.integrate import scheme
from sdesens.noise import Philox
from sdesens.sde import SDE, Coefficient, Params
from sdesens.tensors import concrete, writes

PROBE_PATHS = 4
PROBE_STREAM = 0xFFFFFFFF  # away from any stream that a run uses
AXIS_HINT = {
    "diagonal": "(B, *event), entry i for component i",
    "scalar": "(B, d, 1)",
    "additive": "(B, d, m) or (d, m)",
    "general": "(B, d, m)",
}


def check_finite_params(p: Params) -> None:
    """Raise NonFiniteError if a parameter holds NaN or infinity."""
    for name, value in p.items():
        if concrete(value) and not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"parameter `{name}` holds NaN or infinite values: {value.detach().flatten()[:8].tolist()}; every entry must "
                "be finite."
            )


def check_shapes(sde: SDE, p: Params, t: Tensor, y: Tensor) -> int:
    """Check one evaluation of drift and diffusion at y (B, *event); returns the noise dimension m."""
    batch, event = y.shape[0], tuple(y.shape[1:])
    y = y.clone()  # a coefficient that writes into y must not reach the caller's tensor
    b = _evaluate("drift", sde.drift, t, y, p)
    _check_tensor("drift(t, y, p)", b, y)
    if b.shape != y.shape:
        raise ShapeError(
            f"`drift(t, y, p)` returned shape {tuple(b.shape)} for y of shape {tuple(y.shape)}: it must have the shape of y. "
            "Keep the state axis (y[:, :1], not y[:, 0]) and let no parameter broadcast over it."
        )
    g = _evaluate("diffusion", sde.diffusion, t, y, p)
    _check_tensor("diffusion(t, y, p)", g, y)
    shape, kind = tuple(g.shape), sde.noise_type
    vector = len(event) == 1
    wanted = {
        "diagonal": shape == (batch, *event),
        "scalar": vector and shape == (batch, *event, 1),
        "additive": vector and (shape[:-1] == (batch, *event) or (len(shape) == 2 and shape[:1] == event)),
        "general": vector and len(shape) == 3 and shape[:-1] == (batch, *event),
    }[kind]
    if not wanted:
        hint = (
            f"noise_type={kind!r} needs states of shape (d,); diagonal noise takes any event shape"
            if not vector
            else f"noise_type={kind!r} needs {AXIS_HINT[kind]}: {_remedy(kind, shape, batch, event)}"
        )
        raise ShapeError(f"`diffusion(t, y, p)` returned shape {shape} for y of shape {tuple(y.shape)}, but {hint}.")
    if kind == "additive" and g.dim() == 2:  # with as many paths as components, (B, d) looks like (d, m)
        other = tuple(sde.diffusion(t, torch.cat((y, y[:1])), p).shape)
        if other != shape:
            raise ShapeError(
                f"`diffusion(t, y, p)` returned shape {shape} for {batch} paths and {other} for {batch + 1}, but "
                f"noise_type='additive' needs {AXIS_HINT[kind]}: {_remedy(kind, (batch, *event), batch, event)}."
            )
    m = g[0].numel() if kind == "diagonal" else shape[-1]
    if sde.noise_dim not in (None, m):
        raise ShapeError(
            f"`noise_dim` is {sde.noise_dim}, but `diffusion(t, y, p)` of shape {shape} has {m} components: leave it out."
        )
    return m


def check_structure(sde: SDE, p: Params, t: Tensor, y: Tensor) -> None:
    """Check that drift and diffusion are functions path by path, and that `noise_type` tells the truth, at states y."""
    for name in ("drift", "diffusion"):
        function, written = getattr(sde, name), writes(y)
        once, again = function(t, y, p), function(t, y, p)
        _check_repeatable(f"{name}(t, y, p)", once, again, writes(y) != written)
        if once.dim() == 2 and sde.noise_type == "additive" and name == "diffusion":
            continue
        _check_rows(f"{name}(t, y, p)", once, [function(t, y[i : i + 1], p) for i in range(y.shape[0])])
    if sde.noise_type in ("diagonal", "additive"):
        _check_jacobian(sde, p, t, y)


def check_step(sde: SDE, p: Params, t: Tensor, dt: Tensor, y: Tensor, dW: Tensor) -> None:
    """Check one step by the SDE's own scheme from y (B, *event): what it returns, and that it is a function path by path."""
    name, written = "step(sde, p, t, dt, y, dW)", writes(y)
    once, again = (scheme.step(sde, p, t, dt, y, dW) for _ in range(2))
    _check_tensor(name, once, y)
    if once.shape != y.shape:
        raise ShapeError(
            f"`{name}` returned shape {tuple(once.shape)} for y of shape {tuple(y.shape)}: it must return the next state, in the "
            "shape of y."
        )
    _check_repeatable(name, once, again, writes(y) != written)
    rows = [slice(i, i + 1) for i in range(y.shape[0])]
    _check_rows(name, once, [scheme.step(sde, p, t, dt, y[i], dW[i]) for i in rows])


def check_sde(sde: SDE, p: Params, t0: float, dt: Tensor, y0: Tensor, noise_dim: int, seed: int) -> None:
    """Structural checks at the initial state and at states a few steps on, where the paths have separated."""
    with torch.no_grad():
        y = y0.detach().expand(PROBE_PATHS, *y0.shape).clone()
        p = {k: v.detach() for k, v in p.items()}
        check_shapes(sde, p, torch.tensor(t0, dtype=y.dtype, device=y.device), y)  # for this number of paths too
        dt = dt.detach().to(y.dtype)
        z = Philox(seed, PROBE_STREAM).normals(0, PROBE_PATHS, 0, 2, noise_dim, dtype=y.dtype, device=y.device)
        for k in range(2):
            t = torch.tensor(t0 + k * float(dt), dtype=y.dtype, device=y.device)
            if sde.step is not None:
                check_step(sde, p, t, dt, y, z[k] * dt.sqrt())
            y = scheme.step(sde, p, t, dt, y, z[k] * dt.sqrt())
        if concrete(y) and bool(torch.isfinite(y).all()):  # a path that blows up is reported by the run, with its step
            check_structure(sde, p, t, y)


def _check_repeatable(name: str, once: Tensor, again: Tensor, wrote: bool) -> None:
    if wrote:
        raise NotAFunctionError(f"`{name}` writes into y: work on a copy, y.clone().")
    if not torch.equal(torch.nan_to_num(once), torch.nan_to_num(again)):
        raise NotAFunctionError(
            f"`{name}` returned two different results for the same arguments: it draws random numbers or keeps "
            "state (dropout, batch statistics). Call module.eval(), or move the randomness into the noise."
        )


def _check_rows(name: str, once: Tensor, rows: list[Tensor]) -> None:
    """Raise unless each path alone gives what it gives in a batch."""
    if any(row.shape != once[:1].shape for row in rows):
        raise ShapeError(
            f"`{name}` returned shape {tuple(rows[0].shape)} for one path, but {tuple(once.shape)} for "
            f"{len(rows)}: it must keep axis 0 whatever the number of paths. Do not squeeze() it, and give parameters "
            "no axis of paths."
        )
    scale = torch.finfo(once.dtype).eps ** 0.5 * (1 + once.abs().nan_to_num())
    if bool(((once - torch.cat(rows)).abs().nan_to_num() > scale).any()):
        raise NotAFunctionError(
            f"`{name}` mixes paths: a path alone gives another result than the same path in a batch. Row i of "
            "the result may depend on row i of y only (reduce over dim=1, not over dim=0)."
        )


def _check_jacobian(sde: SDE, p: Params, t: Tensor, y: Tensor) -> None:
    with torch.enable_grad():
        x = y.detach().requires_grad_()
        g = sde.diffusion(t, x, p)
        if not g.requires_grad:
            return
        u, v = (
            Philox(0, PROBE_STREAM)
            .normals(0, g.numel(), 0, 1, 2, dtype=g.dtype, device=g.device)[0]
            .T.reshape(2, *g.shape)
        )
        Ju, Jv = (torch.autograd.grad(g, x, w, retain_graph=True, allow_unused=True)[0] for w in (u, v))
    if Ju is None:
        return
    if sde.noise_type == "additive":
        if bool((Ju.nan_to_num() != 0).any()):
            raise NoiseStructureError(
                "noise_type='additive' says that the diffusion does not depend on y, but it does: declare 'general' (or "
                "'diagonal', 'scalar' if it has that shape)."
            )
        return
    error = (Ju * v - Jv * u).nan_to_num().abs()
    scale = (Ju * v).abs().nan_to_num().amax() * torch.finfo(y.dtype).eps ** 0.5
    if bool((error > scale).any()):
        i = int(error.flatten(1).amax(0).argmax())
        raise NoiseStructureError(
            "noise_type='diagonal' says that entry i of the diffusion depends on y_i alone, but entry-by-entry derivatives "
            f"show that component {i} enters the entry of another component: return (B, d, d) with "
            "torch.diag_embed(g) and declare noise_type='general'."
        )


def _evaluate(name: str, function: Coefficient, t: Tensor, y: Tensor, p: Params):
    try:
        return function(t, y, p)
    except KeyError as error:
        raise UnknownParameterError(
            f"`{name}(t, y, p)` asks for p[{error}], but `params` has {', '.join(map(repr, p)) or 'none'}: name it there."
        ) from error
    except RuntimeError as error:
        raise ShapeError(
            f"`{name}(t, y, p)` failed on y of shape {tuple(y.shape)}: {error}. It must work for any number of paths (axis 0 "
            "of y); give parameters no axis of paths."
        ) from error


def _check_tensor(name: str, value, y: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ShapeError(
            f"`{name}` must return a tensor, got {type(value).__name__}: use torch.ones_like(y) for constants."
        )
    if value.dtype != y.dtype:
        raise DtypeError(
            f"`{name}` returned {value.dtype}, but the state is {y.dtype}: give `y0` and the parameters one dtype, float64 "
            "unless you need speed."
        )
    if value.device != y.device:
        raise DtypeError(
            f"`{name}` returned a tensor on {value.device}, but the state is on {y.device}: use one device."
        )


def _remedy(kind: str, shape: tuple[int, ...], batch: int, event: tuple[int, ...]) -> str:
    if kind != "diagonal" and shape == (batch, *event):
        return "add the noise axis, g.unsqueeze(-1), or declare noise_type='diagonal' if entry i depends on y_i alone"
    if kind == "diagonal" and len(shape) == 3:
        return "declare noise_type='general' (or 'scalar', 'additive'), or drop the last axis"
    if kind == "scalar" and len(shape) == 3:
        return "declare noise_type='general' for several Brownian motions"
    return "use torch.ones_like(y) or new_full to give constants the shape they need"
