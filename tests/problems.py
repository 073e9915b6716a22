"""SDEs for the tests, each beside exact numbers for its Euler-Maruyama chain.

Every function is at module level, so that problems pickle and can be sent to another process.

    GBM   dX = mu X dt + sigma X dW            chain  X' = X (1 + mu h + sigma sqrt(h) Z)            (1)
    OU    dX = kappa (m - X) dt + sigma dW     chain  X' = p X + kappa h m + sigma sqrt(h) Z,  p = 1 - kappa h  (2)

The exact numbers belong to the chain, not to the SDE: a test against them sees the estimator alone. A third family,
`smooth`, is random, nonlinear and coupled, in every noise type; its authority is `plain_gradients`, a loop that can be
read in one glance.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from sdesens import SDE, GivenNoise, Problem

F64 = torch.float64
CPU = torch.device("cpu")


def scalar(x: float, dtype=F64) -> torch.Tensor:
    return torch.tensor(x, dtype=dtype)


def terminal(ys, p):
    return ys[-1, :, 0]


def terminal_square(ys, p):
    return ys[-1, :, 0] ** 2


FUNCTIONALS = {1: terminal, 2: terminal_square}


# Geometric Brownian motion


def gbm_drift(t, y, p):
    return p["mu"] * y


def gbm_diffusion(t, y, p):
    return p["sigma"] * y


@dataclass(frozen=True)
class GBM:
    """Equation (1): its problem, its exact moments on a grid, and its exact path derivative."""

    mu: float = 0.08
    sigma: float = 0.3
    x0: float = 1.3
    t1: float = 1.0
    n_steps: int = 50

    def problem(self, power: int = 1, dtype=F64) -> Problem:
        params = {"mu": scalar(self.mu, dtype), "sigma": scalar(self.sigma, dtype)}
        sde = SDE(gbm_drift, gbm_diffusion, params)
        return Problem(sde, FUNCTIONALS[power], scalar(self.x0, dtype)[None], (0.0, self.t1), self.n_steps)

    def scheme(self, power: int = 1) -> dict[str, float]:
        """E X_N^power and its derivatives, of the chain."""
        return _with_gradient(self._scheme_moment, power, self._point())

    def sde(self, power: int = 1) -> dict[str, float]:
        """The same of the SDE itself."""
        return _with_gradient(self._sde_moment, power, self._point())

    def variances(self) -> dict[str, float]:
        """Exact variance of one path's gradient of X_N on the chain."""
        h, N, x0, sigma = self.t1 / self.n_steps, self.n_steps, self.x0, self.sigma
        p = 1 + self.mu * h
        q = p * p + sigma**2 * h
        return {
            "value": x0**2 * (q**N - p ** (2 * N)),
            "mu": x0**2 * h**2 * (N * q ** (N - 1) + N * (N - 1) * p**2 * q ** (N - 2))
            - (x0 * N * h * p ** (N - 1)) ** 2,
            "sigma": x0**2 * (N * h * q ** (N - 1) + N * (N - 1) * sigma**2 * h**2 * q ** (N - 2)),
            "y0": q**N - p ** (2 * N),
        }

    def path_derivatives(self, W: torch.Tensor) -> dict[str, torch.Tensor]:
        """Exact X_T and its derivatives on Brownian paths that end at W."""
        T = self.t1
        x = self.x0 * torch.exp((self.mu - self.sigma**2 / 2) * T + self.sigma * W)
        return {"value": x, "mu": T * x, "sigma": x * (W - self.sigma * T)}

    def _point(self) -> dict[str, float]:
        return {"mu": self.mu, "sigma": self.sigma, "y0": self.x0, "t1": self.t1}

    def _scheme_moment(self, power, mu, sigma, y0, t1):
        h = t1 / self.n_steps
        p = 1 + mu * h
        return y0**power * (p if power == 1 else p * p + sigma**2 * h) ** self.n_steps + 0 * sigma

    def _sde_moment(self, power, mu, sigma, y0, t1):
        return y0**power * torch.exp(power * mu * t1 + 0.5 * power * (power - 1) * sigma**2 * t1)


def _with_gradient(moment, power: int, point: dict[str, float]) -> dict[str, float]:
    leaves = {k: scalar(v).requires_grad_() for k, v in point.items()}
    value = moment(power, **leaves)
    gradient = torch.autograd.grad(value, list(leaves.values()))
    return {"value": value.item(), **{k: float(g) for k, g in zip(leaves, gradient, strict=True)}}


# Ornstein-Uhlenbeck


def ou_drift(t, y, p):
    return p["kappa"] * (p["m"] - y)


def ou_diffusion(t, y, p):
    return p["sigma"] * torch.ones_like(y)


@dataclass(frozen=True)
class OU:
    """Equation (2). On the chain X and its tangents are jointly Gaussian, so means and variances are exact."""

    kappa: float = 1.3
    m: float = 0.4
    sigma: float = 0.5
    x0: float = 1.2
    t1: float = 2.0
    n_steps: int = 40

    def problem(self, power: int = 1) -> Problem:
        params = {"kappa": scalar(self.kappa), "m": scalar(self.m), "sigma": scalar(self.sigma)}
        return Problem(
            SDE(ou_drift, ou_diffusion, params), FUNCTIONALS[power], scalar(self.x0)[None], (0.0, self.t1), self.n_steps
        )

    def exact(self, power: int = 1) -> dict[str, tuple[float, float]]:
        """(mean, variance of one path) of X_N^power and of its gradient."""
        h, N, sigma = self.t1 / self.n_steps, self.n_steps, self.sigma
        p = 1 - self.kappa * h
        L = np.array([[p, 0.0], [-h, p]])
        z, C = np.array([self.x0, 0.0]), np.zeros((2, 2))  # of (X, dX/dkappa)
        for _ in range(N):
            z, C = L @ z + np.array([self.kappa * h * self.m, h * self.m]), L @ C @ L.T + np.diag([sigma**2 * h, 0.0])
        a, v = float(z[0]), float(C[0, 0])
        tangents = {  # mean, variance, covariance with X
            "kappa": (float(z[1]), float(C[1, 1]), float(C[0, 1])),
            "m": (1 - p**N, 0.0, 0.0),
            "sigma": (0.0, v / sigma**2, v / sigma),
            "y0": (p**N, 0.0, 0.0),
        }
        if power == 1:
            return {"value": (a, v), **{k: (b, v_s) for k, (b, v_s, _) in tangents.items()}}
        return {
            "value": (a * a + v, 2 * v * v + 4 * a * a * v),
            **{k: (2 * (a * b + c), _twice_product_variance(a, v, b, v_s, c)) for k, (b, v_s, c) in tangents.items()},
        }


def _twice_product_variance(a, v, b, v_s, c):
    """Var(2 X S) of Gaussian X ~ (a, v) and S ~ (b, v_s) with covariance c."""
    return 4 * ((a * a + v) * (b * b + v_s) + 2 * c * c + 4 * a * b * c - (a * b + c) ** 2)


# Random smooth coupled SDEs


D, M = 3, 2  # components, Brownian motions


def smooth_drift(t, y, p):
    """Coupled through an unsymmetric matrix, and different at every time."""
    return torch.tanh(y @ p["A"].mT + torch.sin(3 * t)) - 0.4 * y + p["c"] * torch.cos(y.roll(1, -1) - t)


def smooth_diagonal(t, y, p):
    return 0.3 * p["s"] * (1.5 + torch.sin(y + 2 * t) + 0.3 * p["c"] * torch.tanh(y * p["A"].diagonal()))


def smooth_scalar(t, y, p):
    return (0.4 * p["s"] * torch.cos(y @ p["G"].mT + t)).unsqueeze(-1)


def smooth_additive(t, y, p):
    """(d, m): one matrix for every path."""
    return (0.3 + torch.exp(-t)) * p["L"] * p["s"]


def smooth_additive_batch(t, y, p):
    return smooth_additive(t, y, p).expand(y.shape[0], D, M)


def smooth_general(t, y, p):
    """(B, d, m), columns that do not commute."""
    return 0.4 * p["s"] * torch.sin(torch.einsum("jik,bk->bij", p["K"], y) + p["L"] + t)


def smooth_functional(ys, p):
    """Looks at every output time, couples the components, and depends on the parameters itself."""
    T = ys.shape[0]
    weights = torch.linspace(0.3, 1.0, T, dtype=ys.dtype)
    path = (weights[:, None] * torch.sin(ys @ p["c"])).sum(0)
    return path + ys[-1, :, 0] * ys[T // 2, :, 1] * p["s"] + p["A"].square().sum() * ys[-1, :, 2]


def smooth_start(p):
    """An initial state that is computed from the parameters."""
    return torch.tanh(p["A"] @ p["c"]) + p["s"]


DIFFUSIONS = {
    "diagonal": smooth_diagonal,
    "scalar": smooth_scalar,
    "additive": smooth_additive,
    "general": smooth_general,
}
EXTRA = {"diagonal": (), "scalar": ("G",), "additive": ("L",), "general": ("L", "K")}
SHAPES = {"A": (D, D), "c": (D,), "s": (), "G": (D, D), "L": (D, M), "K": (M, D, D)}
NOISE_DIM = {"diagonal": D, "scalar": 1, "additive": M, "general": M}


def smooth(
    noise_type: str,
    seed: int,
    *,
    n_steps: int = 21,
    outputs=(0, 3, 10, 21),
    t0: float = 0.2,
    span: float = 1.3,
    y0=None,
) -> Problem:
    """A random problem; `outputs` are grid indices, the last is n_steps."""
    rng = np.random.default_rng(seed)
    names = ("A", "c", "s", *EXTRA[noise_type])
    params = {k: torch.tensor(rng.normal(size=SHAPES[k]) * 0.7, dtype=F64) for k in names}
    params["s"] = scalar(0.8 + 0.2 * seed)
    diffusion = DIFFUSIONS[noise_type]
    if noise_type == "additive" and seed % 2:
        diffusion = smooth_additive_batch
    start = torch.tensor(rng.normal(size=D) * 0.5, dtype=F64) if y0 is None else y0
    ts = [t0 + span * k / n_steps for k in outputs]
    return Problem(SDE(smooth_drift, diffusion, params, noise_type=noise_type), smooth_functional, start, ts, n_steps)


def wrt_all(problem: Problem) -> tuple[str, ...]:
    return (*problem.sde.params, *(() if callable(problem.y0) else ("y0",)), "t1")


def plain_paths(problem: Problem, theta, z):
    """States at the output times by a loop over steps and nothing else; z (N, B, m)."""
    p, y0, h = problem.params(theta), problem.initial(theta), problem.step_size(theta)
    y = y0.expand(z.shape[1], *y0.shape)
    states = [y]
    for n in range(problem.n_steps):
        t, dW = problem.t0 + n * h, h.sqrt() * z[n]
        b, g = problem.sde.drift(t, y, p), problem.sde.diffusion(t, y, p)
        if problem.sde.noise_type == "diagonal":
            y = y + b * h + g * dW.reshape(y.shape)
        else:
            y = y + b * h + torch.einsum("...ij,...j->...i", g, dW)
        states.append(y)
    return torch.stack([states[k] for k in problem.outputs])


def plain_gradients(problem: Problem, theta, z) -> dict[str, torch.Tensor]:
    """Every path's gradient by autograd through `plain_paths`, one path at a time."""
    rows = []
    for i in range(z.shape[1]):
        leaves = {k: v.detach().clone().requires_grad_() for k, v in theta.items()}
        value = problem.functional(plain_paths(problem, leaves, z[:, i : i + 1]), problem.params(leaves)).sum()
        rows.append(torch.autograd.grad(value, list(leaves.values())))
    return {k: torch.stack([row[j] for row in rows]) for j, k in enumerate(theta)}


# Noise that is not random


def gauss_hermite(nodes: int, n_steps: int) -> GivenNoise:
    """All nodes^n_steps paths of one Brownian motion, with product weights: exact for polynomials of degree 2 nodes - 1."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    paths = np.array(list(itertools.product(range(nodes), repeat=n_steps)))  # (B, N)
    weights = (w / w.sum())[paths].prod(1)
    return GivenNoise(torch.tensor(x[paths].T[:, :, None]), torch.tensor(weights))


def brownian_end(noise, count: int, n_steps: int, t1: float) -> torch.Tensor:
    """W at t1 of the first `count` paths."""
    z = noise.normals(0, count, 0, n_steps, 1, dtype=F64, device=CPU)
    return z[:, :, 0].sum(0) * math.sqrt(t1 / n_steps)


def by_path(z_source, problem: Problem, count: int, noise_dim: int) -> torch.Tensor:
    """Normals of paths 0 ... count - 1 on the problem's grid, shape (N, count, m)."""
    return z_source.normals(0, count, 0, problem.n_steps, noise_dim, dtype=F64, device=CPU)


def worst(found, reference) -> float:
    """Largest relative difference over parameters; rows of `reference` are averaged to as many as `found` has."""
    errors = []
    for name, g in found.items():
        r = reference[name].to(F64)
        r = r.unflatten(0, (g.shape[0], -1)).mean(1)
        errors.append(float((g - r).abs().max() / r.abs().max()))
    return max(errors)


def rms(found, reference) -> dict[str, float]:
    """Root mean square of the difference by parameter, relative to that of `reference`."""
    return {k: float((found[k] - g).square().mean().sqrt() / g.square().mean().sqrt()) for k, g in reference.items()}


def slope(steps, errors) -> float:
    """Least-squares slope of log(error) against log(1 / steps): the order of convergence."""
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])
