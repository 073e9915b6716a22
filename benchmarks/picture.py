"""The picture of a speed measurement: `python benchmarks/picture.py speed.json speed.png`.

Throughput against paths; gradient over forward cost by library; peak memory against steps; cost of the forward
sensitivity against the number of parameters. A panel whose cases were not run is left empty.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "sdesens": "#c0392b",
    "torch loop": "#555555",
    "loop": "#555555",
    "jax scan": "#2471a3",
    "diffrax": "#17a589",
    "numba": "#d68910",
    "torchsde": "#8e44ad",
}

BEYOND = 10  # where bars of the second panel are cut


def colour(who):
    return next(c for name, c in COLOURS.items() if who.startswith(name))


def ticks(ax, values):
    """Label a logarithmic axis at the values measured."""
    ax.set_xticks(values, [f"{v:,}" for v in values])
    ax.set_xticks([], minor=True)


def medians(case):
    return {(row["work"], row["who"]): row["median"] for row in case["rows"] if row["seconds"]}


def throughput(ax, cases):
    lines = {}
    for case in (c for c in cases if c["name"].startswith("throughput")):
        for (_, who), seconds in medians(case).items():
            lines.setdefault(who, []).append((case["paths"], case["paths"] * case["steps"] / seconds))
    for who, points in lines.items():
        ax.loglog(
            *zip(*points, strict=True), "o-", ms=4, color=colour(who), lw=2.5 if who == "sdesens" else 1.3, label=who
        )
    ax.set(xlabel="paths", ylabel="path-steps / s", title="$E[X_T]$ of geometric Brownian motion, 128 steps")
    if lines:
        ax.legend(fontsize=8)


def gradient_cost(ax, cases):
    case = next((c for c in cases if c["name"] == "gbm-float64"), None)
    if case is None:
        return
    times = medians(case)
    whos = [who for work, who in times if work == "gradient"]
    library = {who: next(w for work, w in times if work == "forward" and who.startswith(w)) for who in whos}
    ratios = [times["gradient", who] / times["forward", library[who]] for who in whos]
    bars = ax.barh(whos, [min(r, BEYOND) for r in ratios], color=[colour(who) for who in whos])
    labels = [
        f" {r:.2g}x, {times['gradient', who]:.2g} s" + (" (cut)" if r > BEYOND else "")
        for r, who in zip(ratios, whos, strict=True)
    ]
    ax.bar_label(bars, labels, fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.3)
    ax.set(xlabel="time of the gradient over the library's own forward", title="Gradient in both parameters, float64")


def memory(ax, runs):
    for who, label in (("sdesens", "sdesens"), ("loop", "autograd through a torch loop")):
        points = [(run["steps"], run["bytes"] / 2**20) for run in runs[who]]
        ax.loglog(*zip(*points, strict=True), "o-", ms=4, color=colour(who), label=label)
    ticks(ax, [run["steps"] for run in runs["sdesens"]])
    ax.set(xlabel="steps", ylabel="MiB above baseline", title=f"Peak memory of a gradient, {runs['paths']:,} paths")
    ax.legend(fontsize=8)


def parameters(ax, cases):
    points = []
    for case in (c for c in cases if c["name"].startswith("cosine")):
        times = medians(case)
        points.append((int(case["name"].split("-")[1]), times["gradient", "sdesens"] / times["forward", "sdesens"]))
    if points:
        ax.semilogx(*zip(*sorted(points), strict=True), "o-", ms=4, color=colour("sdesens"))
        ticks(ax, [k for k, _ in points])
    ax.set(xlabel="parameters K", ylabel="time over forward", ylim=(0, 1.15 * ax.get_ylim()[1]))
    ax.set_title(r"Forward sensitivity, drift $\Sigma_k\, a_k \cos(k y)$")


def draw(report, path):
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    cases = report["cases"]
    throughput(axes[0, 0], cases)
    gradient_cost(axes[0, 1], cases)
    if "memory" in report["extras"]:
        memory(axes[1, 0], report["extras"]["memory"])
    parameters(axes[1, 1], cases)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    m = report["machine"]
    figure.suptitle(f"{m['cpu']}, {m['cores']} cores; medians of {report['repeats']} paired repeats", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
