"""Speed and memory of sdesens beside its peers, on the same work in the same run.

    python benchmarks/speed.py [--repeats 5] [--quick] [--only NAME,...] [--out DIR]

Repeat k runs every contestant of a case once, in turn, so that a slow minute of the machine meets all of them; a ratio is
the median of the ratios of single repeats. Work shorter than a fifth of a second is run several times over and divided.
First calls, which compile, are timed apart. The contestants' estimates must agree, see cases.py; who they are and how they
are set up is in peers.py. Writes DIR/speed.json, DIR/speed.md and DIR/speed.png; `--quick` makes everything 20 times
smaller, to see that it runs: its ratios mean nothing. Exit status 1 if a wanted ratio of a full run is missed.
"""

import argparse
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import alone
import numpy as np
import picture
import torch
from cases import all_cases
from rich.console import Console
from rich.table import Table

LEAST_SECONDS = 0.2  # of one measurement
GIB = 2**30
LIBRARIES = ("sdesens", "torch", "torchsde", "jax", "diffrax", "numba", "numpy")


def timed(function, times=1):
    gc.collect()
    began = time.perf_counter()
    for _ in range(times):
        result = function()
    return (time.perf_counter() - began) / times, result


def check_agreement(case, estimates):
    """Raise unless every estimate of a work is that of sdesens, to six standard errors of the difference."""
    for (work, who), estimate in estimates.items():
        if work in case.spread:
            error = 6 * math.sqrt(2 / case.paths) * case.spread[work].double().numpy() + case.allowed.get(who, 0.0)
            gap = np.abs(estimate - estimates[work, "sdesens"])
            if not (gap <= error).all():
                raise AssertionError(f"{case.name}: {work} by {who} is off by {gap}, more than {error}.")


def measured(case, repeats):
    """A case's rows and ratios, as JSON has them."""
    here = {k: f for k, f in case.contestants.items() if f is not None}
    first, times, estimates = {}, {}, {}
    for k, function in here.items():
        first[k], estimate = timed(function)
        estimates[k] = np.ravel(np.asarray(estimate)).astype(float)
        again = timed(function)[0]
        times[k] = min(max(round(LEAST_SECONDS / again), 1), 100)
    check_agreement(case, estimates)
    seconds = {k: [] for k in here}
    for _ in range(repeats):
        for k, function in here.items():
            seconds[k].append(timed(function, times[k])[0])
    rows = [
        {"work": work, "who": who}
        | (
            {
                "seconds": seconds[work, who],
                "median": statistics.median(seconds[work, who]),
                "first": first[work, who],
                "estimate": estimates[work, who][:10].tolist(),
            }
            if (work, who) in here
            else {"seconds": None}
        )
        for work, who in case.contestants
    ]
    return {
        "name": case.name,
        "title": case.title,
        "paths": case.paths,
        "steps": case.steps,
        "rows": rows,
        "wanted": [ratio(case, want, seconds) for want in case.wanted],
    }


def ratio(case, want, seconds):
    """A wanted ratio as the summary shows it."""
    (work, who), (other_work, other) = want.over, want.under
    what = f"{work} by {who}" + (f" over {other}" if work == other_work else f" over {other_work}")
    if want.over not in seconds or want.under not in seconds:
        return claim(case.title, what, None, want.least, want.most)
    pairs = zip(seconds[want.over], seconds[want.under], strict=True)
    return claim(case.title, what, statistics.median(a / b for a, b in pairs), want.least, want.most)


def claim(title, what, figure, least=0.0, most=math.inf):
    wanted = f">= {least:g}" if most == math.inf else f"<= {most:g}"
    verdict = "not installed" if figure is None else "met" if least <= figure <= most else "missed"
    return {"title": title, "what": what, "measured": figure, "wanted": wanted, "verdict": verdict}


def memory(quick):
    """Peak memory of a gradient against the number of steps, ours and that of autograd through a loop."""
    paths, counts = (2000, (48, 200, 800)) if quick else (10_000, (48, 100, 200, 400, 800, 1600, 3200))
    return {"paths": paths} | {who: alone.measure("memory", who, paths, *counts) for who in ("sdesens", "loop")}


def long_run(quick):
    paths, counts = (5000, (500, 2000)) if quick else (100_000, (2500, 10_000))
    runs = alone.measure("memory", "sdesens", paths, *counts)
    per_step = [run["seconds"] / run["steps"] for run in runs]
    title = f"Gradient of {paths:,} paths x {counts[1]:,} steps, float64"
    return {
        "runs": runs,
        "wanted": [
            claim(title, "peak memory, GiB", runs[1]["bytes"] / GIB, most=1),
            claim(title, f"time of a step over that at {counts[0]:,} steps", per_step[1] / per_step[0], most=1.2),
        ],
    }


def compiling(quick):
    """Seconds of compiling, cold and warm, and a check that small runs never compile."""
    paths, steps = (5000, 100) if quick else (50_000, 100)
    with tempfile.TemporaryDirectory() as empty:
        cold, warm = (alone.measure("compile", paths, steps, TORCHINDUCTOR_CACHE_DIR=empty) for _ in range(2))
    small = alone.measure("auto", paths, steps)
    title = "Compiling the gradient of geometric Brownian motion, seconds"
    return {
        "cold": cold,
        "warm": warm,
        "auto": small,
        "wanted": [
            claim(title, "cold, empty cache", cold["first"] - cold["second"], most=20),
            claim(title, "warm, new process", warm["first"] - warm["second"], most=4),
            claim(f"Kernels compiled by compile='auto' for {paths:,} x {steps}", "count", small["kernels"], most=0),
        ],
    }


def machine():
    found = (
        re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else 0
    )
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cpu": found[1] if found else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "environment": {
            k: v for k, v in os.environ.items() if k.startswith(("OMP_", "GOMP_", "MKL_", "NUMBA_", "XLA_"))
        },
    }


def figure(x):
    return "" if x is None else f"{x:.3g}" if x < 1e4 else f"{x:,.0f}"


def describe(report):
    """The title, and {heading: (column names, rows)}, all text."""
    m = report["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    settings = "".join(f"{k}={v}. " for k, v in m["environment"].items())
    about = (
        f"{m['cpu']}, {m['cores']} cores, {m['threads']} torch threads; Python {m['python']}, {versions}. "
        f"{settings}Medians of {report['repeats']} paired repeats. First calls compile, with {report['caches']} caches."
    )
    wanted = [w for part in (*report["cases"], *report["extras"].values()) for w in part.get("wanted", [])]
    tables = {}
    if wanted:
        rows = [(w["title"], w["what"], figure(w["measured"]), w["wanted"], w["verdict"]) for w in wanted]
        tables["What was wanted (ratios of times, unless it says otherwise)"] = (
            ("case", "what", "measured", "wanted", "verdict"),
            rows,
        )
    for case in report["cases"]:
        rows = []
        for row in case["rows"]:
            if row["seconds"] is None:
                rows.append((row["work"], row["who"], "not installed", "", "", ""))
                continue
            base = next((r["median"] for r in case["rows"] if r["work"] == row["work"] and r["who"] == "sdesens"), None)
            rate = case["paths"] * case["steps"] / row["median"] / 1e6
            shown = (row["median"], row["median"] / base, rate, row["first"])
            rows.append((row["work"], row["who"], *map(figure, shown)))
        heading = f"{case['title']} ({case['paths']:,} paths x {case['steps']} steps)"
        tables[heading] = ("work", "who", "seconds", "over sdesens", "million path-steps/s", "first call, s"), rows
    runs = report["extras"].get("memory")
    if runs:
        rows = [
            (f"{a['steps']:,}", figure(a["bytes"] / 2**20), figure(b["bytes"] / 2**20))
            for a, b in zip(runs["sdesens"], runs["loop"], strict=True)
        ]
        tables[f"Peak memory of a gradient, {runs['paths']:,} paths, MiB"] = ("steps", "sdesens", "torch loop"), rows
    return about, tables


def markdown(about, tables):
    lines = ["# Speed", "", about]
    for heading, (columns, rows) in tables.items():
        lines += [
            "",
            f"## {heading}",
            "",
            *(" | ".join(("", *r, "")).strip() for r in (columns, ["---"] * len(columns), *rows)),
        ]
    return "\n".join(lines) + "\n"


def show(console, about, tables):
    console.print(about)
    for heading, (columns, rows) in tables.items():
        table = Table(*columns, title=heading, title_justify="left")
        for row in rows:
            table.add_row(*row, style="red" if "missed" in row else None)
        console.print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", metavar="NAME,...", help="names of cases, or their beginnings")
    parser.add_argument("--out", type=Path, help="benchmarks/results, or its folder quick")
    options = parser.parse_args()
    options.out = options.out or Path(__file__).parent / "results" / ("quick" if options.quick else "")
    cases = all_cases(20 if options.quick else 1)
    extras = {"memory": memory, "long": long_run, "compile": compiling}
    if options.quick:  # one dtype, fewer sizes
        cases = {k: v for k, v in cases.items() if not re.search("float32|cosine-(1|5|20)$|neural-256", k)}
        options.repeats = min(options.repeats, 3)
    asked = tuple(filter(None, options.only.split(",")))
    chosen = [name for name in (*cases, *extras) if not asked or name.startswith(asked)]
    if not chosen:
        parser.error(f"--only takes {', '.join((*cases, *extras))}")

    if not options.quick:  # the first calls of sdesens compile as those of its peers do, from nothing
        empty = tempfile.TemporaryDirectory()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty.name
    caches = "found" if options.quick else "empty"
    report = {"machine": machine(), "repeats": options.repeats, "caches": caches, "cases": [], "extras": {}}
    console = Console(width=None if sys.stdout.isatty() else 140)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        console.print(f"{name} ...", style="dim")
        if name in extras:
            report["extras"][name] = extras[name](options.quick)
        else:
            report["cases"].append(measured(cases[name](), options.repeats))
        (options.out / "speed.json").write_text(json.dumps(report, indent=1))
    about, tables = describe(report)
    (options.out / "speed.md").write_text(markdown(about, tables))
    picture.draw(report, options.out / "speed.png")
    show(console, about, tables)
    missed = any(row[-1] == "missed" for _, rows in tables.values() for row in rows)
    sys.exit(1 if missed and not options.quick else 0)


if __name__ == "__main__":
    main()
