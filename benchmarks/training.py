"""The trainer beside diffusers' own loop: how good the samples are, and how fast it trains.

    OMP_NUM_THREADS=2 python benchmarks/training.py [--seeds 0,1,2] [--only gmm8,digits,throughput] [--quick]

gmm8, digits    For each seed the default recipe is trained and sampled by Heun's method in 18 steps; diffusers' loop trains the same
                network, from the same initial weights, on as many batches of the same size, and its samplers draw as many samples. All
                are scored by the same function, `sdesens.training.score`. The tables hold medians over the seeds.
throughput      Items a second of both loops, everything included, in repeats that take turns; and where a step's time goes.

`--quick` makes everything far smaller, to see that it runs: its figures mean nothing. Exit status 1 if a figure of a full run is off
its limit. For what is and is not diffusers' own see `diffusers_loop.py`.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import diffusers_loop
import torch
from rich.console import Console
from rich.table import Column, Table
from training_speed import WARM, WHO, breakdown, items_a_second

from sdesens.diffusion import VP, Denoiser, draw_uniforms, simple_weight, sliced_w2, uniform_times
from sdesens.training import Data, Report, Samples, TrainConfig, draw_samples, floors, load_data, recipe, score, train
from sdesens.training.scores import EVALUATED, FIRST_TIME_OF_LOSS

OURS, REAL, FLOOR = "sdesens, Heun 18", "real data", "floor"
MANY = 40_000
FRECHET, FRECHET_TIMES_FLOOR = 7.0, 1.84
COLUMNS = {  # by data: heading, name of the score
    "gmm8": {
        "sliced W2": "sliced W2",
        "MMD^2": "MMD^2",
        "inliers": "inliers",
        "mode TV": "mode total variation",
        "cross-entropy": "cross-entropy",
        "eps-loss": "eps-loss, test",
    },
    "digits": {
        "Frechet, test": "classifier Frechet distance, test",
        "Frechet, train": "classifier Frechet distance, train",
        "class hits": "class hit rate",
        "nearest ratio": "nearest-neighbour ratio",
        "sliced W2": "sliced W2",
        "eps, test": "eps-loss, test",
        "eps, train": "eps-loss, train",
        "bits/dim": "test bits per dimension",
    },
}


class Limit(NamedTuple):
    """A figure and what it has to be; `low` and `high` may be left out, and both for a figure that is only reported."""

    what: str
    figure: float
    low: float = -float("inf")
    high: float = float("inf")
    note: str = ""

    @property
    def holds(self) -> bool:
        return self.low <= self.figure <= self.high

    @property
    def bounds(self) -> str:
        low, high = (f"{x:.4g}" if abs(x) < float("inf") else "" for x in (self.low, self.high))
        return f"{low} ... {high}" if low and high else f">= {low}" if low else f"<= {high}" if high else ""


@dataclass(frozen=True)
class Sampled:
    """One sampler of one trained network: evaluations a sample, seconds, scores."""

    who: str
    evaluations: int
    training: float
    sampling: float
    report: Report


@dataclass(frozen=True)
class Size:
    """Of a run of this file."""

    changes: dict  # of the recipe
    samples: dict[str, int]
    many: int
    pairs: int
    steps: int  # of a repeat of the throughput


FULL = Size({}, {"gmm8": 4000, "digits": 1400}, MANY, 7, 3 * WARM)
QUICK = Size({"steps": 40, "warmup": 10}, {"gmm8": 100, "digits": 100}, 1000, 2, WARM)


def timed(function: Callable, *arguments, **options):
    """What a function returns, and the seconds it takes."""
    began = time.perf_counter()
    result = function(*arguments, **options)
    return result, time.perf_counter() - began


def ours(config: TrainConfig, data: Data, n: int) -> tuple[Sampled, Denoiser]:
    """Our recipe, trained with its log and checkpoints, and sampled."""
    with tempfile.TemporaryDirectory() as folder:
        run, training = timed(train, config, folder, device="cpu", tensorboard=False, progress=False)
        denoiser = run.denoiser()
    samples, sampling = timed(draw_samples, denoiser, data.form, n, sampler="heun", steps=18, seed=config.seed)
    return Sampled(
        OURS, 35, training, sampling, score(denoiser, data, samples, likelihood=bool(data.form.cell))
    ), denoiser


def theirs(config: TrainConfig, data: Data, n: int) -> Iterator[Sampled]:
    """diffusers' loop for as many steps, and its samplers."""
    loop = diffusers_loop.Loop(config, data)
    _, training = timed(lambda: [loop.step() for _ in range(config.steps)])
    net = loop.averaged()
    judged = diffusers_loop.denoiser(net, config, data)
    labels = torch.arange(n) % data.form.classes if data.form.classes else None
    for name, (scheduler, evaluations) in diffusers_loop.SAMPLERS[data.form.name].items():
        x, sampling = timed(
            diffusers_loop.sample, net, scheduler, evaluations, n, data.form.event, labels, seed=config.seed
        )
        report = score(judged, data, Samples(x, labels), likelihood=False)
        yield Sampled(f"diffusers, {name}", evaluations, training, sampling, report)


def value(results: list[Sampled], who: str, name: str) -> float:
    """The median over the seeds of a score, or of a field of `Sampled`."""
    return statistics.median(each(results, who, name))


def each(results: list[Sampled], who: str, name: str) -> list[float]:
    """A score, or a field of `Sampled`, seed by seed; NaN where it was not scored."""
    return [getattr(r, name) if hasattr(r, name) else found(r.report, name) for r in results if r.who == who]


def by_seed(values: list[float]) -> str:
    return "by seed " + ", ".join(map(shown, values))


def found(report: Report, name: str, field: str = "value") -> float:
    """A number of a report; NaN where it has none."""
    values = [getattr(s, field) for s in report.scores if s.name == name]
    return float("nan") if not values or values[0] is None else values[0]


def floor(results: list[Sampled], name: str) -> float:
    """The floor of a score, median over the seeds."""
    return statistics.median(found(r.report, name, "floor") for r in results if r.who == OURS)


def shown(x: float) -> str:
    return "" if x != x else f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}" if abs(x) >= 0.01 else f"{x:.2g}"


def table(name: str, results: list[Sampled], seeds: list[int]) -> Table:
    """Contestants by scores."""
    columns = COLUMNS[name]
    out = Table(Column("", no_wrap=True), "evaluations", "training, s", "sampling, s", *columns, title_justify="left")
    out.title = f"{name}: medians over the seeds {', '.join(map(str, seeds))}"
    for who in dict.fromkeys(r.who for r in results):
        cost = ("evaluations", "training", "sampling")
        out.add_row(who, *(shown(value(results, who, k)) for k in (*cost, *columns.values())))
    out.add_row(FLOOR, "", "", "", *(shown(floor(results, k)) for k in columns.values()))
    return out


def limit(
    results: list[Sampled], what: str, name: str, low: float = -float("inf"), high: float = float("inf")
) -> Limit:
    """Of the median of our own score."""
    return Limit(what, value(results, OURS, name), low, high, by_seed(each(results, OURS, name)))


def gmm8(seeds: list[int], size: Size, console: Console) -> list[Limit]:
    data, n = load_data("gmm8"), size.samples["gmm8"]
    law = data.law
    results: list[Sampled] = []
    far: dict[str, list[float]] = {OURS: [], REAL: []}
    for seed in seeds:
        config = recipe("gmm8", seed=seed, **size.changes)
        mine, denoiser = ours(config, data, n)
        real = Samples(law.sample(n, seed=1000 + seed).float(), None)
        results += [mine, *theirs(config, data, n)]
        results.append(Sampled(REAL, 0, 0.0, 0.0, score(law.denoiser(VP()), data, real, likelihood=False)))
        reference = law.sample(size.many, seed=2000 + seed).float()
        far[OURS].append(sliced_w2(draw_samples(denoiser, data.form, size.many, seed=5000 + seed).x, reference))
        far[REAL].append(sliced_w2(law.sample(size.many, seed=3000 + seed).float(), reference))
        console.print(f"gmm8, seed {seed} done", style="dim")
    console.print(table("gmm8", results, seeds))
    other = "diffusers, DDPM 1000"
    w2 = "sliced W2"
    many = f"sliced W2 of {size.many:,} samples from as many draws of the law"
    return [
        limit(results, f"sliced W2 of {n:,} samples", w2, high=0.06),
        Limit(f"sliced W2 of {n:,} real samples", value(results, REAL, w2), note=by_seed(each(results, REAL, w2))),
        Limit(many, statistics.median(far[OURS]), note=by_seed(far[OURS])),
        Limit("the same of real samples", statistics.median(far[REAL]), note=by_seed(far[REAL])),
        Limit("sliced W2, ours over diffusers' DDPM 1000", value(results, OURS, w2) / value(results, other, w2)),
        limit(results, "inliers", "inliers", low=0.95),
        limit(results, "seconds of training", "training", high=40),
    ]


def digits(seeds: list[int], size: Size, console: Console) -> list[Limit]:
    data, n = load_data("digits"), size.samples["digits"]
    results: list[Sampled] = []
    for seed in seeds:
        config = recipe("digits", seed=seed, **size.changes)
        results += [ours(config, data, n)[0], *theirs(config, data, n)]
        console.print(f"digits, seed {seed} done", style="dim")
    console.print(table("digits", results, seeds))
    frechet = "classifier Frechet distance, test"
    t = uniform_times(VP(), draw_uniforms(0, 0, EVALUATED), t_min=FIRST_TIME_OF_LOSS)
    between = floors(data, VP(), t, simple_weight)
    low, high = between["memorisation"], between["linear"]
    return [
        limit(results, "classifier Frechet distance from the test rows", frechet, high=FRECHET),
        Limit(
            "the same over that of training rows",
            value(results, OURS, frechet) / floor(results, frechet),
            high=FRECHET_TIMES_FLOOR,
            note=f"that is {floor(results, frechet):.3g}",
        ),
        limit(results, "class hit rate", "class hit rate", low=0.97),
        limit(results, "nearest-neighbour ratio", "nearest-neighbour ratio", 0.85, 1.2),
        limit(results, "eps-loss on test rows, between memorisation and linear", "eps-loss, test", low, high),
        limit(results, "eps-loss on training rows", "eps-loss, train", low, high),
        limit(results, "bits per dimension of test rows", "test bits per dimension"),
        limit(results, "seconds of training", "training", high=180),
    ]


def throughput(seeds: list[int], size: Size, console: Console) -> list[Limit]:
    limits = []
    for name in ("gmm8", "digits"):
        config, data = replace(recipe(name), steps=10**6), load_data(name)
        speeds = items_a_second(config, data, pairs=size.pairs, steps=size.steps)
        parts = breakdown(config, data, steps=size.steps)
        out = Table(
            "ms a step",
            *parts["sdesens"],
            "whole step",
            title=f"{name}: where a step's time goes",
            title_justify="left",
        )
        for who, spent in parts.items():
            out.add_row(who, *(f"{1e3 * s:.3f}" for s in (*spent.values(), sum(spent.values()))))
        console.print(out)
        mine = speeds["sdesens"]
        for who in WHO[1:]:
            ratio = statistics.median(a / b for a, b in zip(mine, speeds[who], strict=True))
            note = f"{statistics.median(mine):,.0f} and {statistics.median(speeds[who]):,.0f}, {size.pairs} pairs"
            least = 1.0 if who == "diffusers" else -float("inf")
            limits.append(Limit(f"{name}: items a second, sdesens over {who}", ratio, least, note=note))
    return limits


PARTS = {"gmm8": gmm8, "digits": digits, "throughput": throughput}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="of training and sampling")
    parser.add_argument("--only", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="see that it runs")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if wrong := set(chosen) - PARTS.keys():
        parser.error(f"--only takes {', '.join(PARTS)}, not {', '.join(sorted(wrong))}")
    seeds, size = ([0], QUICK) if options.quick else ([int(s) for s in options.seeds.split(",")], FULL)
    console, failed = Console(width=None if sys.stdout.isatty() else 190), 0
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in chosen:
        limits, seconds = timed(PARTS[name], seeds, size, console)
        out = Table("what", "measured", "wanted", "", "", title=f"{name}, {seconds:.0f} s", title_justify="left")
        for row in limits:
            judged = bool(row.bounds) and not options.quick
            failed += judged and not row.holds
            verdict = "" if not judged else "ok" if row.holds else "FAILED"
            out.add_row(row.what, shown(row.figure), row.bounds, verdict, row.note, style="red" if verdict == "FAILED" else None)  # fmt: skip
        console.print(out)
    console.print("quick: figures mean nothing" if options.quick else f"{failed} failed" if failed else "all hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
