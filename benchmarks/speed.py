"""Speed beside torchsde, on the same work in the same run: geometric Brownian motion, 100,000 paths by 100 steps.

    python benchmarks/speed.py [--repeats 5]

Forward: E[X_T] alone. Gradient: both parameters. torchsde runs as its documentation recommends for a fixed step:
`sdeint(method="euler")` with its default Brownian motion, and autograd through it. Repeats are paired, medians reported.
Exit status 1 if a stated ratio is missed.
"""

import argparse
import gc
import statistics
import sys
import time

import torch
import torchsde
from rich.console import Console
from rich.table import Table

import sdesens as ss

PATHS, STEPS = 100_000, 100
WANTED = {torch.float32: 3.0, torch.float64: 1.0}


class Peer(torch.nn.Module):
    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, dtype):
        super().__init__()
        self.mu = torch.nn.Parameter(torch.tensor(0.1, dtype=dtype))
        self.sigma = torch.nn.Parameter(torch.tensor(0.2, dtype=dtype))

    def f(self, t, y):
        return self.mu * y

    def g(self, t, y):
        return self.sigma * y


def contestants(dtype):
    """{work: (ours, theirs)}, each a function of no arguments that returns E[X_T], or the gradient in (mu, sigma)."""
    peer = Peer(dtype)
    y0 = torch.ones(PATHS, 1, dtype=dtype)
    ts = torch.tensor([0.0, 1.0], dtype=dtype)
    sde = ss.SDE(
        lambda t, y, p: p["mu"] * y,
        lambda t, y, p: p["sigma"] * y,
        {"mu": peer.mu.detach().clone(), "sigma": peer.sigma.detach().clone()},
    )
    problem = ss.Problem(sde, lambda ys, p: ys[-1, :, 0], torch.ones(1, dtype=dtype), (0.0, 1.0), STEPS)

    def ours_forward():
        with torch.no_grad():
            return ss.sdeint(sde, y0, (0.0, 1.0), n_steps=STEPS, seed=1)[-1].mean().reshape(1)

    def theirs_forward():
        with torch.no_grad():
            return torchsde.sdeint(peer, y0, ts, method="euler", dt=1 / STEPS)[-1].mean().reshape(1)

    def ours_gradient():
        result = ss.sensitivity(problem, n_paths=PATHS, seed=1, progress=False)
        return torch.stack([result.gradient[k].mean for k in ("mu", "sigma")])

    def theirs_gradient():
        value = torchsde.sdeint(peer, y0, ts, method="euler", dt=1 / STEPS)[-1].mean()
        return torch.stack(torch.autograd.grad(value, (peer.mu, peer.sigma)))

    return {"forward": (ours_forward, theirs_forward), "gradient": (ours_gradient, theirs_gradient)}


def timed(function):
    gc.collect()
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    title = f"GBM, {PATHS:,} paths x {STEPS} steps; torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {repeats}"
    table = Table("work", "dtype", "sdesens [s]", "torchsde [s]", "ratio", "wanted", title=title)
    missed = 0
    for dtype, wanted in WANTED.items():
        for work, pair in contestants(dtype).items():
            warm = [function() for function in pair]
            # two independent samples of 1e5 paths: means differ by less than 2 percent of 1 (over 20 standard errors)
            torch.testing.assert_close(*(w.double() for w in warm), rtol=0.02, atol=0.02)
            seconds = [[timed(function)[0] for function in pair] for _ in range(repeats)]
            ours, theirs = (statistics.median(column) for column in zip(*seconds, strict=True))
            missed += theirs / ours < wanted
            table.add_row(work, str(dtype)[6:], f"{ours:.3f}", f"{theirs:.3f}", f"{theirs / ours:.2f}", f"{wanted:g}")
    Console(width=120).print(table)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
