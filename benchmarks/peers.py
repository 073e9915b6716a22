"""The contestants: sdesens and its peers on one question, each as its own documentation recommends for a fixed step.

Each function returns {(work, who): function of no arguments}; work is "forward", E[F(X)] alone, or "gradient", its
derivative in every parameter. The function returns its estimate, so that nobody is fast by being wrong. All take the same
Euler-Maruyama steps on the same number of paths, and each makes its own normals.

- torchsde runs `sdeint(method="euler")` with its default Brownian interval, and both of its gradients.
- The scan is one jitted `jax.lax.scan` with its normals drawn inside the step: on CPUs faster than drawing them all first.
- diffrax carries all paths as one state, which is several times faster than `vmap` over them, and `UnsafeBrownianPath`,
  its fastest noise. That cannot be differentiated in reverse: the gradient in reverse takes `VirtualBrownianTree` with
  `DirectAdjoint`, and the one in forward mode, good for two parameters, keeps the fast noise.
- numba loops over paths in parallel, in double precision whatever the dtype; its gradient is a tangent derived by hand.
- The torch loop is what one writes by hand: in place without gradients, plain autograd with them.
"""

import inspect
import math
import os

import numpy as np
import torch
from torch import Tensor

import sdesens as ss

UNCHECKED = {"check": False} if "check" in inspect.signature(ss.sensitivity).parameters else {}


def differentiate(problem, paths, **options):
    """`sdesens.sensitivity` as one vector."""
    result = ss.sensitivity(problem, n_paths=paths, seed=1, compile=True, progress=False, **UNCHECKED, **options)
    return torch.cat([g.mean.flatten() for g in result.gradient.values()])


def sdesens(problem, paths):
    y0 = problem.y0.repeat(paths, 1)

    def forward():
        with torch.no_grad():
            ys = ss.sdeint(problem.sde, y0, (0.0, 1.0), n_steps=problem.n_steps, seed=1, check=False, compile=True)
            return problem.functional(ys, problem.sde.params).mean()

    return {("forward", "sdesens"): forward, ("gradient", "sdesens"): lambda: differentiate(problem, paths)}


class Module(torch.nn.Module):
    """A problem's SDE as torchsde takes it."""

    sde_type = "ito"

    def __init__(self, sde):
        super().__init__()
        self.sde, self.noise_type = sde, sde.noise_type
        self.p = {k: torch.nn.Parameter(v.clone()) for k, v in sde.params.items()}
        for name, value in self.p.items():
            self.register_parameter(name, value)

    def f(self, t, y):
        return self.sde.drift(t, y, self.p)

    def g(self, t, y):
        g = self.sde.diffusion(t, y, self.p)
        return g if g.dim() == 3 or self.noise_type == "diagonal" else g.expand(len(y), *g.shape)


def torchsde(problem, paths, adjoint=False):
    import torchsde

    module = Module(problem.sde)
    y0, ts = problem.y0.repeat(paths, 1), torch.tensor([0.0, 1.0], dtype=problem.y0.dtype)

    def value(solve):
        return problem.functional(solve(module, y0, ts, method="euler", dt=1 / problem.n_steps), module.p).mean()

    def forward():
        with torch.no_grad():
            return value(torchsde.sdeint)

    found = {
        ("forward", "torchsde"): forward,
        ("gradient", "torchsde backprop"): lambda: flat_gradient(value(torchsde.sdeint), module.p),
    }
    if adjoint:
        found["gradient", "torchsde adjoint"] = lambda: flat_gradient(value(torchsde.sdeint_adjoint), module.p)
    return found


def flat_gradient(value: Tensor, p):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(p.values()))])


def loop(problem, paths):
    """A plain Euler loop, any noise type."""
    sde, y0, steps = problem.sde, problem.y0.repeat(paths, 1), problem.n_steps
    p = {k: v.clone().requires_grad_() for k, v in sde.params.items()}
    dt = 1 / steps

    def value():
        y = y0
        for n in range(steps):
            g = sde.diffusion(n * dt, y, p)
            dW = torch.randn(paths, g.shape[-1], dtype=y.dtype).mul_(math.sqrt(dt))
            noise = (
                g * dW if sde.noise_type == "diagonal" else dW @ g.T if g.dim() == 2 else (g @ dW[:, :, None])[..., 0]
            )
            y = y + sde.drift(n * dt, y, p) * dt + noise
        return problem.functional(y[None], p).mean()

    def forward():
        with torch.no_grad():
            return value()

    return {("forward", "torch loop"): forward, ("gradient", "torch loop"): lambda: flat_gradient(value(), p)}


def gbm_loop(problem, paths):
    """Geometric Brownian motion in place, with one buffer for the normals."""
    mu, sigma = (float(v) for v in problem.sde.params.values())
    steps, dt = problem.n_steps, 1 / problem.n_steps

    @torch.no_grad()
    def forward():
        y = problem.y0.repeat(paths)
        dW = torch.empty_like(y)
        for _ in range(steps):
            y.mul_(dW.normal_().mul_(sigma * math.sqrt(dt)).add_(1 + mu * dt))
        return y.mean()

    return {**loop(problem, paths), ("forward", "torch loop"): forward}


def scan(problem, paths, drift, noise, functional, dim):
    """Coefficients in jax: drift(y, p), noise(y, p, dW), functional(y), with y (paths, dim), or (paths,) if dim is 0."""
    import jax

    jax.config.update("jax_enable_x64", True)
    theta = {k: v.numpy() for k, v in problem.sde.params.items()}
    dtype, steps = problem.y0.numpy().dtype, problem.n_steps
    dt = np.asarray(1 / steps, dtype)
    start = np.broadcast_to(problem.y0.numpy(), (paths, dim)) if dim else np.full(paths, problem.y0.item(), dtype)

    def value(p, key):
        def step(y, key):
            dW = np.sqrt(dt) * jax.random.normal(key, y.shape, dtype)
            return y + drift(y, p) * dt + noise(y, p, dW), None

        return functional(jax.lax.scan(step, start, jax.random.split(key, steps))[0]).mean()

    forward, gradient, key = jax.jit(value), jax.jit(jax.grad(value)), jax.random.key(1)
    return {
        ("forward", "jax scan"): lambda: np.asarray(forward(theta, key)),
        ("gradient", "jax scan"): lambda: flat_jax(gradient(theta, key), theta),
    }


def flat_jax(gradient, order):
    return np.concatenate([np.ravel(gradient[k]) for k in order])


def gbm_scan(problem, paths):
    return scan(
        problem, paths, lambda y, p: p["mu"] * y, lambda y, p, dW: p["sigma"] * y * dW, functional=lambda y: y, dim=0
    )


def heston_scan(problem, paths):
    import jax.numpy as jnp

    def drift(y, p):
        v = jnp.maximum(y[:, 1], 0)
        return jnp.stack((p["r"] - 0.5 * v, p["kappa"] * (p["theta"] - v)), 1)

    def noise(y, p, dW):
        root = jnp.sqrt(jnp.maximum(y[:, 1], 1e-12))
        other = p["rho"] * dW[:, 0] + jnp.sqrt(1 - p["rho"] ** 2) * dW[:, 1]
        return jnp.stack((root * dW[:, 0], p["xi"] * root * other), 1)

    return scan(problem, paths, drift, noise, lambda y: jnp.maximum(jnp.exp(y[:, 0]) - 1, 0), dim=2)


def ou_scan(problem, paths):
    return scan(
        problem, paths, lambda y, p: y @ p["A"].T, lambda y, p, dW: dW @ p["L"].T, lambda y: (y**2).sum(1), dim=10
    )


def gbm_diffrax(problem, paths):
    import diffrax
    import jax
    import jax.numpy as jnp
    import lineax

    jax.config.update("jax_enable_x64", True)
    theta = {k: v.numpy() for k, v in problem.sde.params.items()}
    dtype, steps = problem.y0.numpy().dtype, problem.n_steps
    t0, t1, dt = (np.asarray(x, dtype) for x in (0, 1, 1 / steps))
    shape = jax.ShapeDtypeStruct((paths,), dtype)

    def value(p, key, bm, adjoint):
        volatility = diffrax.ControlTerm(lambda t, y, _: lineax.DiagonalLinearOperator(p["sigma"] * y), bm(key))
        terms = diffrax.MultiTerm(diffrax.ODETerm(lambda t, y, _: p["mu"] * y), volatility)
        y0 = jnp.ones(paths, dtype)
        fixed = {"stepsize_controller": diffrax.ConstantStepSize(), "max_steps": steps, "adjoint": adjoint}
        return diffrax.diffeqsolve(terms, diffrax.Euler(), t0, t1, dt, y0, **fixed).ys[0].mean()

    def unsafe(key):
        return diffrax.UnsafeBrownianPath(shape, key)

    def tree(key):
        return diffrax.VirtualBrownianTree(t0, t1, tol=1 / (2 * steps), shape=shape, key=key)

    key = jax.random.key(1)
    forward = jax.jit(lambda p, key: value(p, key, unsafe, diffrax.DirectAdjoint()))
    reverse = jax.jit(jax.grad(lambda p, key: value(p, key, tree, diffrax.DirectAdjoint())))
    ahead = jax.jit(jax.jacfwd(lambda p, key: value(p, key, unsafe, diffrax.ForwardMode())))
    return {
        ("forward", "diffrax"): lambda: np.asarray(forward(theta, key)),
        ("gradient", "diffrax reverse"): lambda: flat_jax(reverse(theta, key), theta),
        ("gradient", "diffrax forward mode"): lambda: flat_jax(ahead(theta, key), theta),
    }


def gbm_numba(problem, paths):
    os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")  # its OpenMP layer sets the threads of torch's too
    import numba

    mu, sigma = (float(v) for v in problem.sde.params.values())
    steps = problem.n_steps

    @numba.njit(parallel=True)
    def forward(mu, sigma, paths, steps):
        dt = 1 / steps
        total = 0.0
        for _path in numba.prange(paths):
            y = 1.0
            for _step in range(steps):
                y += y * (mu * dt + sigma * math.sqrt(dt) * np.random.standard_normal())  # noqa: NPY002
            total += y
        return total / paths

    @numba.njit(parallel=True)
    def gradient(mu, sigma, paths, steps):
        dt = 1 / steps
        by_mu, by_sigma = 0.0, 0.0
        for _path in numba.prange(paths):
            y, a, b = 1.0, 0.0, 0.0
            for _step in range(steps):
                dW = math.sqrt(dt) * np.random.standard_normal()  # noqa: NPY002
                growth = 1 + mu * dt + sigma * dW
                a = a * growth + y * dt
                b = b * growth + y * dW
                y *= growth
            by_mu += a
            by_sigma += b
        return by_mu / paths, by_sigma / paths

    return {
        ("forward", "numba"): lambda: forward(mu, sigma, paths, steps),
        ("gradient", "numba tangent"): lambda: gradient(mu, sigma, paths, steps),
    }
