"""Variances of gradient estimators, and the methods beside each other."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from sdesens.errors import ArgumentError
from sdesens.estimate import Estimate
from sdesens.estimators.compare import Comparison
from sdesens.estimators.exact import Exact, normal_variances
from sdesens.estimators.study import COSTS, Study, at
from sdesens.plot.common import look, new_axes, new_figure, one_axes

ESTIMATOR_STYLES = {
    "pathwise": ("C0", "o", "-"),
    "score_function": ("C3", "s", "--"),
    "score_function (baseline=optimal)": ("C1", "^", "-."),
    "rloo (group=2)": ("C4", "x", ":"),
    "measure_valued": ("C2", "+", (0, (5, 1, 1, 1, 1, 1))),
}


def variance_study(study: Study, *, axes: Any = None) -> Any:
    """One-draw variances against the cost's parameter: a column for each cost, a row for each parameter of the law.

    Lines are exact, markers sampled; a vertical line stands where pathwise and score function change places.

    Parameters
    ----------
    study : Study
        From `sdesens.estimators.variance_study`.
    axes : array of Axes (parameters, costs), optional

    Returns
    -------
    The array of Axes.
    """
    costs, parameters = (tuple(dict.fromkeys(getattr(p, a) for p in study.points)) for a in ("cost", "parameter"))
    axes = new_axes(axes, (len(parameters), len(costs)))
    exact: dict[str, list[tuple[float, dict[str, Exact]]]] = {}
    for cost in costs:
        fine = _between([p.k for p in study.select(cost, parameters[0])], 60)
        exact[cost] = [(k, normal_variances(at(cost, k), study.mean, study.scale)) for k in fine]
    for (i, parameter), (j, cost) in product(enumerate(parameters), enumerate(costs)):
        ax, points = axes[i, j], study.select(cost, parameter)
        ks = [p.k for p in points]
        for method in points[0].variance:
            color, marker, line = ESTIMATOR_STYLES.get(method, ("C5", "d", "-"))
            curve = [(k, by[parameter].variance[method]) for k, by in exact[cost] if by[parameter].variance[method] > 0]
            sampled = [(p.k, p.variance[method]) for p in points if p.exact.variance[method] > 0]
            ax.plot(*zip(*curve, strict=True), color=color, linestyle=line, linewidth=1.2, label=f"{method}, exact")
            marks = {"color": color, "marker": marker, "linestyle": "", "markersize": 4.5, "markerfacecolor": "none"}
            ax.plot(*zip(*sampled, strict=True), **marks, label="sampled")
        ax.set_yscale("log")
        if min(ks) > 0:
            ax.set_xscale("log")
            ax.set_xticks(
                shown := [k for k in (0.1, 0.3, 1.0, 3.0, 8.0) if min(ks) <= k <= max(ks)], [f"{k:g}" for k in shown]
            )
            ax.set_xticks([], minor=True)
        if (cost, parameter) in study.crossings:
            found, exact_k = study.crossings[cost, parameter]
            ax.axvline(exact_k, color="0.4", linewidth=0.8)
            ax.annotate(
                f" k = {exact_k:.3f}\n (sampled {found:.3f})",
                (exact_k, 0.02),
                xycoords=("data", "axes fraction"),
                fontsize="x-small",
            )
        ax.set_title(f"f = {COSTS[cost][1].replace('^2', '²')}, derivative in the {parameter}", fontsize="medium")
        ax.set(xlabel="k", ylabel="variance of one draw")
    lines, labels = axes[0, 0].get_legend_handles_labels()
    axes[0, 0].figure.legend(
        lines, labels, fontsize="small", ncols=2 if len(costs) < 3 else len(lines) // 2, loc="outside lower center"
    )
    return axes


def _between(ks: list[float], count: int) -> list[float]:
    """Places from the first to the last k: evenly in log k if all are positive, else evenly."""
    low, high = min(ks), max(ks)
    shares = [i / count for i in range(count + 1)]
    return [low * (high / low) ** s for s in shares] if low > 0 else [low + (high - low) * s for s in shares]


def comparison(found: Comparison, parameter: str, *, axes: Any = None) -> Any:
    """The methods beside each other: estimates with 95 % intervals, and variance times time.

    Parameters
    ----------
    found : Comparison
        From `sdesens.estimators.compare`.
    parameter : str
        As in its rows: "mean", "logits[0]".
    axes : pair of Axes, optional

    Returns
    -------
    The pair of Axes.
    """
    rows = [r for r in found.rows() if r["parameter"] == parameter]
    if not rows:
        names = ", ".join(dict.fromkeys(repr(r["parameter"]) for r in found.rows()))
        raise ArgumentError(f"`parameter` must be one of {names}, got {parameter!r}.")
    left, right = new_axes(axes, 2)
    places = list(range(len(rows)))
    labels = [r["method"].replace(" (", "\n(") + (" (biased)" if r["biased"] else "") for r in rows]
    left.errorbar(
        [r["mean"] for r in rows], places, xerr=[1.96 * r["standard_error"] for r in rows], fmt="o", color="C0", capsize=4, markerfacecolor="none"
    )  # fmt: skip
    if rows[0]["bias"] is not None:
        left.axvline(rows[0]["mean"] - rows[0]["bias"], color="0.4", linewidth=0.8, label="exact")
        left.legend(fontsize="small")
    refused = f" (refused: {', '.join(found.refused)})" if found.refused else ""
    left.set(xlabel=f"d/d {parameter}, with 95 % intervals", title=f"estimates{refused}")
    for place, row in zip(places, rows, strict=True):
        if row["variance_x_time"] > 0:
            marks = {"marker": "s", "color": "C0", "markerfacecolor": "none" if row["biased"] else "C0"}
            right.plot(1e6 * row["variance_x_time"], place, **marks)
        else:
            right.annotate(
                "no variance", (0.02, place), xycoords=("axes fraction", "data"), va="center", fontsize="small"
            )
    right.set_xscale("log")
    right.grid(axis="x", which="both", color="0.9")
    right.set(xlabel="variance x time a draw / us (open: biased)", title="work for a given precision")
    for ax in (left, right):
        ax.set_yticks(places, labels)
        ax.set_ylim(len(rows) - 0.5, -0.5)
    if axes is None:
        right.set_yticklabels([])
    return left, right


def study_report(study: Study, path: Path | str) -> None:
    """Write the picture of a variance study."""
    figure = new_figure((11, 7.2))
    variance_study(study, axes=figure.subplots(2, len({p.cost for p in study.points}), squeeze=False))
    figure.savefig(path, dpi=150)


def estimates(
    x: Sequence[float],
    found: Mapping[str, Sequence[Estimate]],
    *,
    exact: float | None = None,
    xlabel: str = "",
    axes: Any = None,
) -> Any:
    """Estimates with their 95 % intervals against what was varied.

    Parameters
    ----------
    x : numbers (K,)
    found : mapping of str to K Estimates of one number
        By what the legend says.
    exact : float, optional
        A line across.

    Returns
    -------
    Axes
    """
    ax = one_axes(axes)
    for i, (name, rows) in enumerate(found.items()):
        middle = [float(e.mean) for e in rows]
        half = [float(e.confidence_interval().high - e.mean) for e in rows]
        ax.errorbar(x, middle, yerr=half, capsize=3, linewidth=1.0, **look(i), label=name)
    if exact is not None:
        ax.axhline(exact, color="0.4", linewidth=0.8, label="exact")
    ax.set(xlabel=xlabel, ylabel="estimate, 95 % interval")
    ax.legend(fontsize="small")
    return ax
