"""One Euler-Maruyama step as a Gaussian law: its mean, its spread, its density.

    X_{n+1} = m_n + s_n Z_n,    m_n = X_n + b_n dt,    s_n = sigma_n sqrt(dt),                   (1)
    log q(x | X_n) = -1/2 |C^-1 (x - m_n)|^2 - log det C,    C C' = s_n s_n'.                    (2)

Only components with noise of their own have a density. The others move with the parameters along a given path of the noisy
ones: a running integral, a discount. What tells them apart is a row of the diffusion that is zero at every place looked at.
Where the noise of the noisy components spans fewer directions than they have, (2) is taken within that span: enough for
parameters of the drift that push along it, and for no others.

This file differentiates nothing, but says what the derivative of (2) is.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sdesens.errors import MethodError
from sdesens.integrate.checks import PROBE_STREAM
from sdesens.integrate.chunk import Dynamics
from sdesens.noise import Philox
from sdesens.problem import Problem, Theta
from sdesens.sde import Params, noise_product, require_euler
from sdesens.sensitivity.probe import probe_states
from sdesens.tensors import basis, jvp

PATHS = 32  # that are looked at
PIVOT = 1e-12  # share of a variance that a direction must have of its own
SPAN = 1e-8  # the same for a singular value, which is known to less


_PARTS: "WeakKeyDictionary[Problem, Parts]" = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Parts:
    """Which components of a state have noise of their own.

    Attributes
    ----------
    noisy : Tensor of bool, shape `event`
    spans : bool
        Whether the noise reaches every direction of the noisy components.
    diagonal : bool
        Whether the diffusion has the state's own shape.
    """

    noisy: Tensor
    spans: bool
    diagonal: bool

    @property
    def rows(self) -> Tensor:
        """Indices of the noisy components of a vector state."""
        return self.noisy.nonzero().flatten()


def increments(dynamics: Dynamics, n: int, y: Tensor) -> tuple[Tensor, Tensor]:
    """Equation (1): b dt (B, *event) and sigma sqrt(dt), shaped like the diffusion, (B, *event) or (B, d, m)."""
    sde, p = dynamics.sde, dynamics.p
    dt = dynamics.dt
    t = (dynamics.t0 + n * dt).to(y.dtype)
    g = sde.diffusion(t, y, p) * dt.sqrt().to(y.dtype)
    return sde.drift(t, y, p) * dt.to(y.dtype), g if sde.noise_type == "diagonal" else g.expand(*y.shape, g.shape[-1])


def parts_of(problem: Problem, noise_dim: int, where: str) -> Parts:
    """Which components have noise of their own, seen on whole paths; those that a parameter gives some are among them.

    Raises
    ------
    MethodError
        If the SDE brings a step of its own, whose law is unknown, or no component has noise.
    """
    require_euler(problem.sde, where)
    found = _PARTS.get(problem)
    if found is None:
        found = _PARTS[problem] = _look(problem, noise_dim)
    if not bool(found.noisy.any()):
        raise MethodError(f"{where} needs noise, but the diffusion is zero everywhere: use method='pathwise'.")
    return found


def _look(problem: Problem, noise_dim: int) -> Parts:
    sde, p, diagonal = problem.sde, dict(problem.sde.params), problem.sde.noise_type == "diagonal"
    y = problem.initial({}).detach()
    y, h = y.expand(PATHS, *y.shape), problem.step_size({}).detach()
    move = {k: 1.0 + v.detach().abs() for k, v in p.items()}
    noisy, spans = torch.zeros(y.shape[1:], dtype=torch.bool, device=y.device), diagonal

    def spread(q: Params) -> Tensor:
        return increments(Dynamics(sde, q, problem.t0, h), n, y)[1]

    with torch.no_grad():
        for n in range(problem.n_steps):
            s, *turned = jvp(spread, (p,), (move,)) if p else (spread(p),)
            for x in (s, *turned):
                noisy |= (x != 0).any(0) if diagonal else (x != 0).any(-1).any(0)
            if not spans and bool(noisy.any()):
                spans = _reaches(s[:, noisy])
            z = Philox(0, PROBE_STREAM).normals(0, PATHS, n, 1, noise_dim, dtype=y.dtype, device=y.device)[0]
            y = y + increments(Dynamics(sde, p, problem.t0, h), n, y)[0] + noise_product(sde, s, z)
    return Parts(noisy, spans, diagonal)


def _reaches(S: Tensor) -> bool:
    """Whether on some path the noise S (B, k, m) reaches every one of k directions."""
    size = S.norm(dim=-1, keepdim=True)
    sound = (size > 0).all(1).flatten() & torch.isfinite(size).all(1).flatten()
    S = S[sound] / size[sound]
    return S.shape[1] <= S.shape[2] and bool((torch.linalg.svdvals(S)[:, -1:] > SPAN).any())


def strays(parts: Parts, s: Tensor) -> Tensor:
    """Whether a component that was taken for one without noise has some here, shape (B,)."""
    moved = (s != 0) if parts.diagonal else (s != 0).any(-1)
    return (moved & ~parts.noisy).flatten(1).any(1)


def reached(problem: Problem, noise_dim: int, where: str) -> Parts:
    """The parts of the state, if the noise reaches every direction of the noisy components.

    Raises
    ------
    MethodError
    """
    parts = parts_of(problem, noise_dim, where)
    if not parts.spans:
        raise MethodError(
            f"{where} needs noise in every direction of the components that have some, and here it reaches fewer: use "
            "method='likelihood_ratio' for parameters of the drift that push along the noise, or method='pathwise'."
        )
    return parts


def check_span(problem: Problem, theta: Theta, noise_dim: int, where: str) -> Parts:
    """Raise MethodError if a parameter moves the noisy components of a step out of the span of their noise.

    Where the noise does not reach every direction, [sigma, m_theta] must have the rank of sigma, and sigma itself may not
    depend on theta: else the laws at two parameter values are mutually singular, and there is no likelihood ratio.
    """
    parts = parts_of(problem, noise_dim, where)
    if parts.spans:
        return parts
    rows = parts.rows
    for name, unit in ((next(k for k, v in u.items() if bool(v.any())), u) for u in basis(theta)):
        start = jvp(lambda th: problem.initial(th) + 0, (theta,), (unit,))[1]
        for n, y in probe_states(problem, theta, noise_dim):

            def law(th: Theta, y: Tensor, n: int = n) -> tuple[Tensor, Tensor]:
                dynamics = Dynamics(problem.sde, problem.params(th), problem.t0, problem.step_size(th))
                drift, s = increments(dynamics, n, y)
                return y + drift, s

            moved = start.expand_as(y) if n == 0 else torch.zeros_like(y)
            (_, s), (mean, turned) = jvp(law, (dict(theta), y), (unit, moved))
            if bool(mean[:, ~parts.noisy].any()):  # what it moves there would have to be followed from step to step
                raise MethodError(
                    f"{where} cannot be used for {name!r}: {len(rows)} components are driven by noise of fewer directions, and "
                    f"{name!r} moves a component without noise beside them. Use method='pathwise' if the functional does not jump."
                )
            S, mean, turned = s[:, rows], mean[:, rows], turned[:, rows]
            off = mean - (S @ (torch.linalg.pinv(S, rtol=SPAN) @ mean[..., None]))[..., 0]
            if bool(turned.any()) or bool((off.norm(dim=-1) > SPAN * mean.norm(dim=-1)).any()):
                raise MethodError(
                    f"{where} cannot be used for {name!r}: {len(rows)} components are driven by noise of fewer directions, and "
                    f"{name!r} moves a step out of their span, where it has no density. Use method='pathwise' if the functional "
                    "does not jump, or give the component noise of its own."
                )
    return parts


def log_density(parts: Parts, x: Tensor, mean: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Equation (2) for the noisy components, and where it exists.

    Parameters
    ----------
    x, mean : Tensor, shape (B, *event)
    s : Tensor, shape (B, *event) or (B, d, m)

    Returns
    -------
    log q : Tensor, shape (B,)
        Up to a constant; 0 where there is no density.
    alive : Tensor of bool, shape (B,)
        Whether every noisy component has noise at this place.
    """
    gap = x - mean
    if parts.diagonal:
        live = (s != 0) | ~parts.noisy
        safe = torch.where(parts.noisy & (s != 0), s, 1.0)
        terms = torch.where(parts.noisy & (s != 0), -0.5 * (gap / safe).square() - safe.abs().log(), 0.0)
        return terms.flatten(1).sum(1), live.flatten(1).all(1)
    rows = parts.rows
    gap, S = gap.index_select(1, rows), s.index_select(1, rows)
    if not parts.spans:
        inverse = torch.linalg.pinv(S.detach(), rtol=SPAN)
        return -0.5 * (inverse @ gap[..., None]).square().sum((1, 2)), (S != 0).flatten(1).any(1)
    if len(rows) == 1:
        variance = S.square().sum((1, 2))
        alive = variance > 0
        safe = torch.where(alive, variance, 1.0)
        return torch.where(alive, -0.5 * (gap[:, 0].square() / safe + safe.log()), 0.0), alive
    covariance = S @ S.mT
    alive = has_inverse(covariance)
    safe = torch.where(alive[:, None, None], covariance, torch.eye(len(rows), dtype=s.dtype, device=s.device))
    L = torch.linalg.cholesky(safe)
    r = torch.linalg.solve_triangular(L, gap[..., None], upper=False)[..., 0]
    logs = L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return torch.where(alive, -0.5 * r.square().sum(-1) - logs, 0.0), alive


def linear_log_density(parts: Parts, x: Tensor, mean: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """A number (B,) with the derivatives of equation (2) in mean and s, x held fixed, and where the density exists.

    d log q = w . dm + (w z' - s^+') . ds,  z = s^+ (x - m),  w = s^+' z: linear in m and s once z, w and s^+ are numbers. So no
    derivative of a Cholesky factor is taken, and only the first derivatives are right. Zero where there is no density.
    """
    s0 = s.detach()
    gap = (x - mean).detach()
    if parts.diagonal:
        inverse, alive = right_inverse(parts, s0)
        z = inverse * gap
        return (inverse * (z * mean + (z * z - 1) * s)).flatten(1).sum(1), alive
    if parts.spans:
        inverse, alive = right_inverse(parts, s0)  # (B, m, k)
    else:
        S = s0.index_select(1, parts.rows)
        inverse, alive = torch.linalg.pinv(S, rtol=SPAN), (S != 0).flatten(1).any(1)
    z = (inverse @ gap.index_select(1, parts.rows)[..., None])[..., 0]  # (B, m)
    w = (z[:, None] @ inverse)[:, 0]  # (B, k)
    along = (w * mean.index_select(1, parts.rows)).sum(1)
    if not parts.spans:  # then s does not depend on what is differentiated
        return along, alive
    turn = w[..., None] * z[:, None] - inverse.mT  # (B, k, m)
    return along + (turn * s.index_select(1, parts.rows)).sum((1, 2)), alive


def has_inverse(covariance: Tensor) -> Tensor:
    """Whether each of the matrices (B, d, d) has a variance of its own in every direction, shape (B,)."""
    with torch.no_grad():
        variances = covariance.diagonal(dim1=-2, dim2=-1)
        L, info = torch.linalg.cholesky_ex(covariance)
        own = L.diagonal(dim1=-2, dim2=-1).square()
        return (info == 0) & (variances > 0).all(-1) & (own > PIVOT * variances).all(-1)


def right_inverse(parts: Parts, s: Tensor) -> tuple[Tensor, Tensor]:
    """s^+ with s s^+ = 1 on the noisy components, and where it exists.

    Returns
    -------
    Tensor, shape (B, *event) for diagonal noise (zero on the others), else (B, m, number of noisy components)
        Zero where there is none.
    alive : Tensor of bool, shape (B,)
    """
    if parts.diagonal:
        there = parts.noisy & (s != 0)
        inverse = torch.where(there, 1.0 / torch.where(there, s, 1.0), 0.0)
        return inverse, ((s != 0) | ~parts.noisy).flatten(1).all(1)
    S = s.index_select(1, parts.rows)
    k = S.shape[1]
    if k == 1:
        variance = S.square().sum((1, 2))
        alive = variance > 0
        return torch.where(alive, 1.0 / torch.where(alive, variance, 1.0), 0.0)[:, None, None] * S.mT, alive
    covariance = S @ S.mT
    alive = has_inverse(covariance.detach())
    safe = torch.where(alive[:, None, None], covariance, torch.eye(k, dtype=s.dtype, device=s.device))
    return torch.where(alive[:, None, None], torch.linalg.solve(safe, S).mT, 0.0), alive
