"""Steering trained models of the ring to a linear reward, beside the closed form: `python benchmarks/steering.py [--seeds 0,1,2]`.

Each seed trains gmm8 by its recipe. The model is then tuned to r(x) = 0.5 x_1 + 0.25 x_2 by each method, on a coarse grid, and judged on one
four times as fine: mean reward, mean vector and covariance, off the tilted mixture's as a share of their norms. A run from a noise of
3, in which data are left, remembers that start; it is judged by what is predicted for it, and must be off the tilt.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings

import torch
from rich.console import Console
from rich.table import Table

from sdesens.diffusion import GaussianMixture, remembered
from sdesens.errors import HeavyTailWarning, MemoryWarning
from sdesens.training import open_run, recipe, train
from sdesens.training.steer import steer
from sdesens.training.steer_objective import LinearReward, Sampling, steering_grid
from sdesens.training.steer_report import moments, predicted, tilted

LIMIT = 0.03
N = 40_000
NOISE = 80.0  # sigma at the schedule's end
SETTINGS = {  # name: options of steer, steps of the grid, eta, where it starts
    "gradient": ({"method": "gradient", "steps": 200, "batch": 400, "lr": 2e-3}, 32, 1.0, NOISE),
    "remembering": ({"method": "gradient", "steps": 200, "batch": 400, "lr": 2e-3}, 32, 1.0, 3.0),
    "adjoint matching": ({"method": "adjoint_matching", "steps": 300, "batch": 400, "lr": 2e-3}, 24, 1.0, NOISE),
}


def one(base, name: str, seed: int) -> dict[str, float]:
    """Figures of one setting."""
    options, n_steps, eta, first = SETTINGS[name]
    law, reward = GaussianMixture.ring(), LinearReward(torch.tensor([0.5, 0.25]))
    std = base.sigma_data
    start = None if first == NOISE else (std**2 + first**2) ** 0.5
    coarse, fine = (
        Sampling(steering_grid(base.schedule, k, data_std=std, r_max=first), (2,), eta=eta, start=start)
        for k in (n_steps, 4 * n_steps)
    )
    begun = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MemoryWarning)
        warnings.simplefilter("ignore", HeavyTailWarning)
        tuned = steer(base, coarse, reward, seed=seed, data_std=std, **options)
    seconds = time.perf_counter() - begun
    tilt, kept = tilted(law, reward), remembered(base.schedule, eta, data_std=std, t=first)
    target = tilt if kept < 1e-2 else predicted(base, fine, reward, n_starts=2000, n_each=64, seed=11)
    after = moments(tuned, fine, reward, n=N, seed=12)
    mean, cov = (getattr(target, k).mean.norm() for k in ("mean", "cov"))
    return {
        "remembered": kept,
        "E[r]": float(after.reward.mean),
        "target": float(target.reward.mean),
        "tilt": float(tilt.reward.mean),
        "E[r] off": abs(float(after.reward.mean - target.reward.mean)) / float(target.reward.mean),
        "mean off": float((after.mean.mean - target.mean.mean).norm() / mean),
        "cov off": float((after.cov.mean - target.cov.mean).norm() / cov),
        "noise of mean": float(after.mean.standard_error.norm() / mean),
        "errors below tilt": float(tilt.reward.mean - after.reward.mean) / float(after.reward.standard_error),
        "seconds": seconds,
    }


def main() -> None:
    """Run, print, and leave with 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=",".join(SETTINGS))
    given = parser.parse_args()
    seeds, names = [int(s) for s in given.seeds.split(",")], given.only.split(",")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    bases = {}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            train(recipe("gmm8", seed=seed, picture_every=0), folder, device="cpu", tensorboard=False, progress=False)
            bases[seed] = open_run(folder).denoiser()
    for name in names:
        for seed in seeds:
            found[name].append(one(bases[seed], name, seed))
            print(f"{name}, seed {seed}: {found[name][-1]}", flush=True)
    table = Table("", *found[names[0]][0], "", title=f"medians over seeds {given.seeds}", title_justify="left")
    good = True
    for name, rows in found.items():
        median = {k: statistics.median(r[k] for r in rows) for k in rows[0]}
        ok = max(median["E[r] off"], median["mean off"], median["cov off"]) <= LIMIT
        ok = ok and (median["remembered"] < 1e-2 or median["errors below tilt"] > 4)
        good = good and ok
        table.add_row(name, *(f"{v:.3g}" for v in median.values()), "ok" if ok else "missed")
    Console(width=190).print(table)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
