"""Pictures, each a function that takes and returns matplotlib Axes.

Readable in black and white: lines differ in style and markers, not in colour alone. matplotlib is an optional extra and is
imported when the first picture is drawn.
"""

from itertools import product
from pathlib import Path
from typing import Any

from sdesens.errors import ArgumentError
from sdesens.estimators.compare import Comparison
from sdesens.estimators.exact import Exact, normal_variances
from sdesens.estimators.study import COSTS, Study, at
from sdesens.problem import Problem
from sdesens.refinement import Refinement
from sdesens.sensitivity.tangent import tangent_paths

STYLES = {
    "pathwise": ("C0", "o", "-"),
    "forward": ("C1", "x", "--"),
    "adjoint": ("C3", "s", "-."),
    "torchsde_adjoint": ("C4", "^", ":"),
    "finite_difference": ("C2", "+", (0, (1, 3))),
}
ESTIMATOR_STYLES = {
    "pathwise": ("C0", "o", "-"),
    "score_function": ("C3", "s", "--"),
    "score_function (baseline=optimal)": ("C1", "^", "-."),
    "rloo (group=2)": ("C4", "x", ":"),
    "measure_valued": ("C2", "+", (0, (5, 1, 1, 1, 1, 1))),
}


def sample_paths(
    problem: Problem, wrt: str, *, component: int = 0, n_paths: int = 6, seed: int = 0, axes: Any = None
) -> Any:
    """Sample paths of one state component, and beside them their derivatives in one parameter, on the same noise.

    Parameters
    ----------
    problem : Problem
    wrt : str
        A parameter; for one with several components the first is shown.
    component : int
        Which component of the (flattened) state.
    n_paths, seed : int
    axes : pair of Axes, optional

    Returns
    -------
    The pair of Axes.
    """
    left, right = _axes(axes, 2)
    ts, ys, tangents = tangent_paths(problem, n_paths=n_paths, wrt=(wrt,), seed=seed, every_step=True)
    states = ys.flatten(2)[:, :, component]
    S = tangents[wrt].reshape(*ys.shape, -1)[..., 0].flatten(2)[:, :, component]
    styles = ("-", "--", "-.", ":")
    for i in range(n_paths):
        look = {"color": f"C{i}", "linestyle": styles[i % 4], "linewidth": 1.0}
        left.plot(ts, states[:, i], **look)
        right.plot(ts, S[:, i], **look)
    left.set(xlabel="t", ylabel=f"$X_t$, component {component}", title="sample paths")
    name = wrt + (f"[{','.join('0' * (tangents[wrt].dim() - ys.dim()))}]" if tangents[wrt].dim() > ys.dim() else "")
    right.set(xlabel="t", ylabel=f"$\\partial X_t / \\partial$ {name}", title="their sensitivities, same noise")
    return left, right


def refinement(study: Refinement, *, axes: Any = None) -> Any:
    """Error of each route against the step, log-log: against the SDE's own path derivative, and against the scheme's.

    Parameters
    ----------
    study : Refinement
        From `crosscheck(problem).refinement`.
    axes : pair of Axes, optional

    Returns
    -------
    The pair of Axes.
    """
    left, right = _axes(axes, 2)
    for method, errors in study.error.items():
        color, marker, line = STYLES.get(method, ("C5", "d", "-"))
        look = {"color": color, "marker": marker, "linestyle": line, "markerfacecolor": "none", "label": method}
        left.loglog(study.dt, errors, **look)
        if study.deviates(method):
            right.loglog(study.dt, study.deviation[method], **look)
        elif method != "pathwise":  # a flat line ten decades below would flatten the others
            right.plot([], [], **{**look, "label": f"{method}: {study.deviation[method][-1]:.0e}"})
    for ax, rows in ((left, study.error), (right, study.deviation)):
        top = 1.5 * max((max(v) for k, v in rows.items() if ax is left or study.deviates(k)), default=1.0)
        for slope, line in ((0.5, "-"), (1.0, "--")):
            guide = [top * (h / max(study.dt)) ** slope for h in study.dt]
            ax.loglog(study.dt, guide, color="0.6", linestyle=line, linewidth=1, label=f"slope {slope:g}")
        ax.set_xlabel("step dt")
        ax.set_xticks(study.dt, [f"{h:.3g}" for h in study.dt])
        ax.set_xticks([], minor=True)
        ax.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    left.set(ylabel="relative RMS error a path", title="against the SDE's path derivative")
    right.set(ylabel="relative RMS deviation a path", title="against the scheme's own derivative")
    return left, right


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
    axes = _axes(axes, (len(parameters), len(costs)))
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
            look = {"color": color, "marker": marker, "linestyle": "", "markersize": 4.5, "markerfacecolor": "none"}
            ax.plot(*zip(*sampled, strict=True), **look, label="sampled")
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
    left, right = _axes(axes, 2)
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
            look = {"marker": "s", "color": "C0", "markerfacecolor": "none" if row["biased"] else "C0"}
            right.plot(1e6 * row["variance_x_time"], place, **look)
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


def check_file(path: Path) -> None:
    """Raise ArgumentError unless a picture can be written to `path`."""
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise ArgumentError(
            f"no picture can be written to {str(path)!r}: its name must end in one of {', '.join(kinds)}."
        )
    if not path.resolve().parent.is_dir():
        raise ArgumentError(f"no picture can be written to {str(path)!r}: there is no such folder.")


def report(problem: Problem, wrt: str, study: Refinement | None, path: Path | str, *, seed: int = 0) -> None:
    """Write one picture: sample paths with their sensitivities, and the refinement study below if there is one."""
    rows = 1 if study is None else 2
    figure, plt = _figure((11, 3.8 * rows))
    axes = figure.subplots(rows, 2, squeeze=False)
    sample_paths(problem, wrt, seed=seed, axes=axes[0])
    if study is not None:
        refinement(study, axes=axes[1])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def study_report(study: Study, path: Path | str) -> None:
    """Write the picture of a variance study."""
    figure, plt = _figure((11, 7.2))
    variance_study(study, axes=figure.subplots(2, len({p.cost for p in study.points}), squeeze=False))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure that needs no screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.figure(figsize=size, layout="constrained"), plt


def _axes(axes: Any, shape: int | tuple[int, int]) -> Any:
    if axes is not None:
        return axes
    import matplotlib.pyplot as plt

    rows, columns = (1, shape) if isinstance(shape, int) else shape
    found = plt.subplots(rows, columns, figsize=(5 * columns, 3.8 * rows), layout="constrained", squeeze=False)[1]
    return found[0] if isinstance(shape, int) else found
