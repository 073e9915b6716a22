"""Paths of a problem, and how its routes behave as the step shrinks."""

from pathlib import Path
from typing import Any

from sdesens.crosscheck import CrossCheck
from sdesens.plot.common import new_axes, new_figure
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
    left, right = new_axes(axes, 2)
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
    left, right = new_axes(axes, 2)
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


def report(problem: Problem, wrt: str, study: Refinement | None, path: Path | str, *, seed: int = 0) -> None:
    """Write one picture: sample paths with their sensitivities, and the refinement study below if there is one."""
    rows = 1 if study is None else 2
    figure = new_figure((11, 3.8 * rows))
    axes = figure.subplots(rows, 2, squeeze=False)
    sample_paths(problem, wrt, seed=seed, axes=axes[0])
    if study is not None:
        refinement(study, axes=axes[1])
    figure.savefig(path, dpi=150)


def costs(check: CrossCheck, *, axes: Any = None) -> Any:
    """Seconds and peak memory of each route of a crosscheck.

    Returns
    -------
    The pair of Axes.
    """
    left, right = new_axes(axes, 2)
    names = list(check.results)
    places = list(range(len(names)))
    memory = [(check.peak_memory[k] or 0) / 2**20 for k in names]
    for ax, values, label in (
        (left, [check.results[k].seconds for k in names], "seconds"),
        (right, memory, "peak memory, MiB"),
    ):
        ax.barh(places, values, color="0.7", edgecolor="k")
        for place, value in zip(places, values, strict=True):
            ax.annotate(f" {value:.3g}", (value, place), va="center", fontsize="small")
        ax.set(xlabel=label, xlim=(0, 1.2 * max([*values, 1e-3])))
        ax.set_yticks(places, names)
        ax.invert_yaxis()
    return left, right
