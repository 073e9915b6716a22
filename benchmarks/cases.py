"""The questions of the speed measurement, and what is wanted of each.

A case is a set of contestants on one problem. `wanted` are ratios of times between two of them. `spread` is the standard
deviation of one path's estimate: means over as many paths as the case has must agree within six standard errors of their
difference, plus `allowed` for a contestant whose gradient is not that of the scheme.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import peers
import torch
import torchsde
from torch import nn

import sdesens as ss

Contestant = tuple[str, str]  # work, who


@dataclass(frozen=True)
class Wanted:
    """Time of `over` in times of `under`, at least or at most so much."""

    over: Contestant
    under: Contestant
    least: float = 0.0
    most: float = math.inf


@dataclass(frozen=True)
class Case:
    name: str
    title: str
    paths: int
    steps: int
    contestants: dict[Contestant, Callable | None]  # None: not installed
    wanted: list[Wanted] = field(default_factory=list)
    spread: dict[str, torch.Tensor] = field(default_factory=dict)
    allowed: dict[str, float] = field(default_factory=dict)


def contestants(problem, paths, *makers):
    found = {}
    for make in makers:
        try:
            found |= make(problem, paths)
        except ImportError as error:
            found["forward", error.name] = None
    return found


def spread(problem, paths=20_000):
    """{work: standard deviation of one path}, from the standard errors of a run of its own."""
    result = ss.sensitivity(problem, n_paths=paths, seed=2, compile=False, progress=False)
    gradient = torch.cat([g.standard_error.flatten() for g in result.gradient.values()])
    return {
        "forward": result.value.standard_error.reshape(1) * paths**0.5,
        "gradient": gradient * paths**0.5,
    }


def faster(least, who, work="forward"):
    """Wanted: sdesens so many times faster than `who`."""
    return Wanted((work, who), (work, "sdesens"), least=least)


def gbm_problem(dtype, steps):
    params = {"mu": torch.tensor(0.1, dtype=dtype), "sigma": torch.tensor(0.2, dtype=dtype)}
    sde = ss.SDE(lambda t, y, p: p["mu"] * y, lambda t, y, p: p["sigma"] * y, params)
    return ss.Problem(sde, lambda ys, p: ys[-1, :, 0], torch.ones(1, dtype=dtype), (0.0, 1.0), steps)


def short(dtype):
    return str(dtype).removeprefix("torch.")


def gbm(dtype, small):
    paths, steps = 100_000 // small, 128
    problem = gbm_problem(dtype, steps)
    both = functools.partial(peers.torchsde, adjoint=True)
    makers = (peers.sdesens, both, peers.gbm_scan, peers.gbm_diffrax, peers.gbm_numba, peers.gbm_loop)
    bars = {torch.float32: (100, 4, 4, 45, 200, 3.5), torch.float64: (25, 5, 12, 12, 70, 4.5)}[dtype]
    names = ("torchsde", "jax scan", "torch loop", "torchsde backprop", "torchsde adjoint", "jax scan")
    works = ("forward",) * 3 + ("gradient",) * 3
    return Case(
        f"gbm-{short(dtype)}",
        f"Geometric Brownian motion, {short(dtype)}",
        paths,
        steps,
        contestants(problem, paths, *makers),
        [
            *(faster(*bar) for bar in zip(bars, names, works, strict=True)),
            Wanted(("gradient", "sdesens"), ("forward", "sdesens"), most=2.8),
        ],
        spread(problem),
        {"torchsde adjoint": 2 / steps},  # consistent with the SDE, not with the scheme: off by O(dt)
    )


def gbm_100(dtype, small):
    paths, steps = 100_000 // small, 100
    problem = gbm_problem(dtype, steps)
    found = contestants(problem, paths, peers.sdesens, peers.torchsde, peers.gbm_loop)
    return Case(
        f"gbm-100-{short(dtype)}",
        f"The same on 100 steps, {short(dtype)}: dt = 0.01 is not a binary fraction, which torchsde's interval tree feels",
        paths,
        steps,
        {k: v for k, v in found.items() if k[0] == "forward"},
        [],
        spread(problem),
    )


def throughput(paths):
    problem = gbm_problem(torch.float64, 128)
    makers = (peers.sdesens, peers.torchsde, peers.gbm_scan, peers.gbm_diffrax, peers.gbm_numba, peers.gbm_loop)
    found = contestants(problem, paths, *(m for m in makers if m is not peers.torchsde or paths <= 100_000))
    forward = {k: v for k, v in found.items() if k[0] == "forward"}
    title = f"Geometric Brownian motion, float64, {paths:,} paths"
    return Case(f"throughput-{paths}", title, paths, 128, forward, [], spread(problem))


def forward_mode(name, title, problem, small, most):
    paths = 40_000 // small
    return Case(
        name,
        title,
        paths,
        problem.n_steps,
        {
            ("forward", "sdesens"): peers.sdesens(problem, paths)["forward", "sdesens"],
            ("gradient", "sdesens"): lambda: peers.differentiate(problem, paths, method="forward"),
        },
        [Wanted(("gradient", "sdesens"), ("forward", "sdesens"), most=most)] if most else [],
    )


def cosine(n_params, small, most=None):
    def drift(t, y, p):
        k = torch.arange(1, 1 + len(p["a"]), dtype=y.dtype, device=y.device)
        return (p["a"] * torch.cos(k * y)).sum(1, keepdim=True)

    params = {"a": 1.0 / torch.arange(1, 1 + n_params, dtype=torch.float64)}
    sde = ss.SDE(drift, lambda t, y, p: torch.full_like(y, 0.3), params)
    problem = ss.Problem(sde, lambda ys, p: ys[-1, :, 0], torch.zeros(1, dtype=torch.float64), (0.0, 1.0), 128)
    title = f"Forward sensitivity: drift sum_k a_k cos(k y), {n_params} parameters"
    return forward_mode(f"cosine-{n_params}", title, problem, small, most)


def heston(small):
    def drift(t, y, p):
        v = y[:, 1].clamp(min=0)
        return torch.stack((p["r"] - 0.5 * v, p["kappa"] * (p["theta"] - v)), 1)

    def diffusion(t, y, p):
        root = y[:, 1].clamp(min=1e-12).sqrt()
        scaled = p["xi"] * root
        rows = (root, torch.zeros_like(root), p["rho"] * scaled, (1 - p["rho"] ** 2).sqrt() * scaled)
        return torch.stack(rows, 1).reshape(-1, 2, 2)

    values = {"r": 0.05, "kappa": 2.0, "theta": 0.04, "xi": 0.2, "rho": -0.5}
    params = {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
    sde = ss.SDE(drift, diffusion, params, noise_type="general")
    y0 = torch.tensor([0.0, 0.04], dtype=torch.float64)
    problem = ss.Problem(sde, lambda ys, p: (ys[-1, :, 0].exp() - 1).clamp(min=0), y0, (0.0, 1.0), 100)
    return beside_torchsde(
        "heston", "Heston call, general noise (B, 2, 2)", problem, 50_000 // small, 10, 6, peers.heston_scan
    )


def ou(noise_type, small, forward, gradient):
    generator = torch.Generator().manual_seed(1)
    A = 0.2 * torch.randn(10, 10, generator=generator, dtype=torch.float64) - torch.eye(10, dtype=torch.float64)
    L = 0.1 * torch.randn(10, 10, generator=generator, dtype=torch.float64) + 0.3 * torch.eye(10, dtype=torch.float64)
    diffusion = {
        "additive": lambda t, y, p: p["L"],
        "general": lambda t, y, p: p["L"].expand(len(y), 10, 10),
    }[noise_type]
    sde = ss.SDE(lambda t, y, p: y @ p["A"].T, diffusion, {"A": A, "L": L}, noise_type=noise_type)
    y0 = torch.ones(10, dtype=torch.float64)
    problem = ss.Problem(sde, lambda ys, p: ys[-1].square().sum(1), y0, (0.0, 1.0), 100)
    title = f"Ornstein-Uhlenbeck in 10 dimensions, one matrix, declared {noise_type}"
    return beside_torchsde(f"ou-{noise_type}", title, problem, 20_000 // small, forward, gradient, peers.ou_scan)


def beside_torchsde(name, title, problem, paths, forward, gradient, scan):
    return Case(
        name,
        f"{title}, float64",
        paths,
        problem.n_steps,
        contestants(problem, paths, peers.sdesens, peers.torchsde, scan, peers.loop),
        [faster(forward, "torchsde"), faster(gradient, "torchsde backprop", "gradient")],
        spread(problem),
    )


class Neural(nn.Module):
    """Drift and diagonal diffusion by one hidden layer each."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, d=8, hidden=64):
        super().__init__()
        self.drift = nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, d))
        self.diffusion = nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, d))

    def f(self, t, y):
        return self.drift(y)

    def g(self, t, y):
        return torch.sigmoid(self.diffusion(y))


def neural(batch, torchsde_least=0.0, loop_least=0.0, steps=100):
    dt, d = 1 / steps, 8
    torch.manual_seed(1)
    origin = Neural(d)
    y0, ts = torch.zeros(batch, d), torch.tensor([0.0, 1.0])

    def ours(module, k):
        return ss.sdeint(module, y0, (0.0, 1.0), n_steps=steps, seed=k, check=False, compile=True)[-1]

    def theirs(module, k):
        return torchsde.sdeint(module, y0, ts, method="euler", dt=dt)[-1]

    def loop(module, k):
        y = y0
        for n in range(steps):
            y = y + module.f(n * dt, y) * dt + module.g(n * dt, y) * (torch.randn_like(y) * math.sqrt(dt))
        return y

    def training(solve, rate=1e-3):
        """A step of training; its estimate is that of the loss and of the gradient in the drift's last bias."""
        module = copy.deepcopy(origin)
        optimizer = torch.optim.Adam(module.parameters(), rate)
        count = itertools.count()

        def step():
            optimizer.zero_grad()
            loss = (solve(module, next(count)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            return torch.cat((loss.detach()[None], module.drift[2].bias.grad))

        return step

    def batches(step, count=40):
        return torch.stack([step() for _ in range(count)])

    makers = {"sdesens": ours, "torchsde": theirs, "torch loop": loop}
    return Case(
        f"neural-{batch}-{steps}",
        f"Neural SDE, one step of training with Adam, batch {batch}, float32",
        batch,
        steps,
        {("training", who): training(solve) for who, solve in makers.items()},
        [faster(torchsde_least, "torchsde", "training"), faster(loop_least, "torch loop", "training")]
        if loop_least
        else [],
        {"training": batches(training(loop, rate=0.0)).std(0) * batch**0.5},
    )


def normals(dtype, small):
    paths, steps = 100_000 // small, 128
    bare = ss.SDE(lambda t, y, p: torch.zeros_like(y), lambda t, y, p: torch.ones_like(y))
    y0 = torch.zeros(1, dtype=dtype)
    summed = ss.Problem(bare, lambda ys, p: ys[-1, :, 0], y0, (0.0, 1.0), steps)
    works = {"Euler, fused": gbm_problem(dtype, steps), "the same normals, summed (y + dW)": summed}
    return Case(
        f"normals-{short(dtype)}",
        f"Cost of the steps over that of the normals alone, {short(dtype)}",
        paths,
        steps,
        {(work, "sdesens"): peers.sdesens(problem, paths)["forward", "sdesens"] for work, problem in works.items()},
        [Wanted(*((work, "sdesens") for work in works), most=1.3)],
    )


def all_cases(small):
    """{name: function of no arguments that sets the case up}; everything `small` times smaller."""
    cases = {}
    for dtype in (torch.float32, torch.float64):
        cases[f"gbm-{short(dtype)}"] = functools.partial(gbm, dtype, small)
        cases[f"gbm-100-{short(dtype)}"] = functools.partial(gbm_100, dtype, small)
    for n_params, most in ((1, None), (2, 2.5), (5, None), (10, 3), (20, None), (50, 4)):
        cases[f"cosine-{n_params}"] = functools.partial(cosine, n_params, small, most)
    title = "Forward sensitivity: geometric Brownian motion, 2 parameters"
    problem = gbm_problem(torch.float64, 128)
    cases["gbm-forward-mode"] = functools.partial(forward_mode, "gbm-forward-mode", title, problem, small, 1.4)
    cases["heston"] = functools.partial(heston, small)
    cases["ou-additive"] = functools.partial(ou, "additive", small, 8, 5)
    cases["ou-general"] = functools.partial(ou, "general", small, 4, 3)
    cases["neural-256"] = functools.partial(neural, max(256 // small, 32), 20, 1.0)
    cases["neural-4096"] = functools.partial(neural, 4096 // small, 5, 0.9)
    cases["neural-256-128"] = functools.partial(neural, max(256 // small, 32), steps=128)  # a dt exact in float32
    for dtype in (torch.float32, torch.float64):
        cases[f"normals-{short(dtype)}"] = functools.partial(normals, dtype, small)
    for paths in (100, 1000, 10_000, 100_000, 1_000_000):
        cases[f"throughput-{max(paths // small, 10)}"] = functools.partial(throughput, max(paths // small, 10))
    return cases
