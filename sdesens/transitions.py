"""The moments of an SDE's transitions over one interval, and how far a series is from them: equations (1) to (3) of `sdesens.fit`."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdesens.errors import ArgumentError, ArgumentTypeError, DtypeError, HighVarianceWarning, NonFiniteError, ShapeError
from sdesens.integrate import sdeint
from sdesens.noise import Antithetic, Philox
from sdesens.sde import SDE
from sdesens.tensors import describe

D = torch.float64
SINGULAR = 1e-10  # of an information matrix with ones on its diagonal
INSTANTS = (0.0, 0.36788, 0.70711)  # of an interval, where a dependence on time would show


@dataclass(frozen=True, eq=False)
class Transitions:
    """Equation (1) as a function of the parameters."""

    sde: SDE
    starts: Tensor
    ends: Tensor
    dt: float
    n_steps: int
    n_paths: int
    transform: Callable[[Tensor], Tensor]
    seed: int

    @property
    def inflated(self) -> float:
        """E[V_hat^-1] over V^-1, equation (2)."""
        half = self.n_paths / 2
        return half / (half - self.ends.shape[1] - 1)

    @property
    def log_det_bias(self) -> float:
        """E[log det V_hat] - log det V, equation (2)."""
        half, d = self.n_paths / 2, self.ends.shape[1]
        psi = torch.digamma((half - torch.arange(d, dtype=D)) / 2).sum()
        return float(psi) + d * math.log(2 / half)

    def moments(self, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """m (K, d) and V (K, d, d)."""
        start = self.starts.repeat_interleave(self.n_paths, 0)
        noise = Antithetic(Philox(self.seed))
        sde = self.sde.with_params(**params)
        ends = sdeint(sde, start, (0.0, self.dt), n_steps=self.n_steps, bm=noise, check=False)[-1]
        x = self.transform(ends).unflatten(0, (-1, self.n_paths))
        mean = x.mean(1)
        off = x - mean[:, None]
        return mean, off.mT @ off / self.n_paths

    def loss(self, params: dict[str, Tensor]) -> Tensor:
        """Equation (1), its first term freed of its inflation; infinite where some V is singular."""
        mean, V = self.moments(params)
        root, failed = torch.linalg.cholesky_ex(V)
        if bool(failed.any()):
            return torch.full((), math.inf, dtype=D)
        residual = (self.transform(self.ends) - mean)[..., None]
        w = torch.linalg.solve_triangular(root, residual, upper=False)
        return w.square().sum() / (2 * self.inflated) + root.diagonal(dim1=1, dim2=2).log().sum()

    def covariance(self, params: dict[str, Tensor]) -> Tensor | None:
        """The inverse of equation (3), or None, with a warning, where the information is singular."""
        flat = torch.cat([v.flatten() for v in params.values()])
        dm, dV = torch.autograd.functional.jacobian(lambda x: self.moments(split(x, params)), flat)
        inverse = torch.linalg.inv(self.moments(params)[1])
        half = torch.einsum("kij,kjlp->kilp", inverse, dV)
        first = torch.einsum("kip,kij,kjq->pq", dm, inverse, dm) / self.inflated
        information = first + torch.einsum("kijp,kjiq->pq", half, half) / 2
        unit = information.diagonal().sqrt()  # parameters have units of their own
        scaled = information / torch.outer(unit, unit)
        if not bool(torch.isfinite(scaled).all()) or not bool((torch.linalg.eigvalsh(scaled) > SINGULAR).all()):
            warnings.warn(
                "the series does not tell the parameters apart, their information is singular: no standard errors; fit fewer (`wrt`).",
                HighVarianceWarning,
                stacklevel=3,
            )
            return None
        return torch.linalg.inv(scaled) / torch.outer(unit, unit)


def split(x: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """A vector as tensors of the shapes of others."""
    parts = x.split([v.numel() for v in like.values()])
    return {k: part.reshape(v.shape) for (k, v), part in zip(like.items(), parts, strict=True)}


def transitions(sde: SDE, series, dt, n_steps, transform, n_paths, seed) -> Transitions:
    """What a series asks of an SDE; raise unless it can be asked."""
    several = [series] if isinstance(series, Tensor) else series
    if not isinstance(several, list | tuple) or not several:
        raise ArgumentTypeError(f"`series` must be a tensor (K + 1, d), or a list of them, got {describe(series)}.")
    if transform is not None and not callable(transform):
        raise ArgumentTypeError(
            f"`transform` must be a function (B, d) -> (B, d), got {transform!r}: torch.log is one."
        )
    h = transform or (lambda y: y)
    for one in several:
        _check_series(one, several[0], h)
    starts, ends = (torch.cat([one[part] for one in several]) for part in (slice(None, -1), slice(1, None)))
    if bool((h(ends) == h(starts)).all(0).any()):
        raise ArgumentError("`series` has a component that never changes: nothing can be fitted to it.")
    if isinstance(dt, bool) or not isinstance(dt, int | float) or not (0 < dt < math.inf):
        raise ArgumentError(f"`dt` must be a time above 0, got {dt!r}.")
    least = 20 * (ends.shape[1] + 1)
    if isinstance(n_paths, bool) or not isinstance(n_paths, int) or n_paths < least or n_paths % 2:
        raise ArgumentError(f"`n_paths` must be an even int, {least} or more, got {n_paths!r}: 400 is usual.")
    if low := [k for k, v in sde.params.items() if v.dtype != D]:
        raise DtypeError(
            f"`sde` must have float64 parameters, and {low[0]!r} is {sde.params[low[0]].dtype}: module.double()."
        )
    _check_time(sde, starts, float(dt))
    return Transitions(sde, starts, ends, float(dt), n_steps, n_paths, h, seed)


def _check_time(sde: SDE, y: Tensor, dt: float) -> None:
    """Raise if a coefficient depends on time, at the parameters given or near them."""
    near = {k: 1.1 * v.detach() + 0.01 for k, v in sde.params.items()}
    for p in (sde.params, near):
        for coefficient in (sde.drift, sde.diffusion):
            values = [coefficient(torch.tensor(s * dt, dtype=D), y, p) for s in INSTANTS]
            if (
                bad := (~torch.isfinite(values[0])).flatten(1).any(1).nonzero().flatten().tolist()
                if p is sde.params
                else []
            ):
                raise NonFiniteError(
                    f"the coefficients of `sde` are infinite or NaN at {len(bad)} of the {len(y)} starts, such as {y[bad[0]].tolist()}.",
                    step=0,
                )
            if not all(torch.allclose(values[0], v, rtol=1e-12, atol=0, equal_nan=True) for v in values[1:]):
                raise ArgumentError(
                    "`sde` must not depend on time, as every transition starts at t = 0: make time a state."
                )


def _check_series(series, first, transform: Callable[[Tensor], Tensor]) -> None:
    if not isinstance(series, Tensor) or series.dtype != D:
        raise ArgumentTypeError(
            f"`series` must be float64 tensors (K + 1, d), got {describe(series)}: torch.tensor(..., dtype=torch.float64)."
        )
    if series.dim() != 2 or len(series) < 2 or not series.shape[1] or series.shape[1] != first.shape[1]:
        raise ShapeError(
            f"`series` must have shape (K + 1, d), one transition or more and one d for all, got {tuple(series.shape)}: x[:, None] for one number a time."
        )
    seen = transform(series)
    if not isinstance(seen, Tensor) or seen.shape != series.shape or seen.dtype != D:
        raise ShapeError(
            f"`transform` must keep the shape and dtype of (B, d), got {describe(seen)} for {describe(series)}."
        )
    if bad := (~torch.isfinite(seen)).any(1).nonzero().flatten().tolist():
        raise ArgumentError(
            f"`series` is NaN, infinite, or beyond `transform` in {len(bad)} rows, the first is row {bad[0]}: {series[bad[0]].tolist()}."
        )
