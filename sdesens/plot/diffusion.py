"""Schedules, the couplings of their marginals, and the errors of samplers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sdesens.diffusion.schedule import Schedule
from sdesens.noise import Philox
from sdesens.plot.common import LINES, MARKERS, look, new_axes, one_axes


def schedules(found: Mapping[str, Schedule], *, axes: Any = None) -> Any:
    """alpha and sigma of schedules, and their log-SNR, against time as a share of the whole.

    Returns
    -------
    The three Axes.
    """
    axes = new_axes(axes, 3)
    share = torch.linspace(0.002, 0.998, 300, dtype=torch.float64)
    for i, (name, schedule) in enumerate(found.items()):
        t = share * schedule.t_max
        with torch.no_grad():
            curves = (schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t))
        for ax, y in zip(axes, curves, strict=True):
            ax.plot(share, y, color=f"C{i}", linestyle=LINES[i % 6], label=name)
    axes[1].set_yscale("log")
    for ax, label in zip(axes, ("signal alpha", "noise sigma", "log-SNR"), strict=True):
        ax.set(xlabel="t / t_max", ylabel=label)
    axes[0].legend(fontsize="small")
    return axes


def couplings(
    schedule: Schedule, s: float, t: float, *, x0: float = 0.0, n: int = 600, seed: int = 0, axes: Any = None
) -> Any:
    """Pairs (x_s, x_t) from one x_0, three ways: along the SDE's path, by one eps for both times, by an eps for each.

    Returns
    -------
    The three Axes; the pairs are `axes[i].lines[0]`.
    """
    axes = new_axes(axes, 3)
    start = torch.full((n, 1), x0, dtype=torch.float64)
    eps, other = Philox(seed).normals(0, n, 0, 2, 1, dtype=torch.float64, device=torch.device("cpu"))
    with torch.no_grad():
        path = schedule.sample_path(start, (s, t), Philox(seed, 1))
        one = [schedule.reparameterise(start, at, eps) for at in (s, t)]
        each = [one[0], schedule.reparameterise(start, t, other)]
    pairs: dict[str, Sequence[torch.Tensor]] = {
        "the SDE's path": list(path),
        "one eps for both": one,
        "an eps for each": each,
    }
    for i, (ax, (title, pair)) in enumerate(zip(axes, pairs.items(), strict=True)):
        a, b = (x[:, 0] for x in pair)
        ax.plot(a, b, MARKERS[i], color=f"C{i}", markersize=3, markerfacecolor="none", linestyle="")
        covariance = float(torch.cov(torch.stack((a, b)))[0, 1])
        ax.set(xlabel=f"x at t = {s:g}", ylabel=f"x at t = {t:g}", title=f"{title}: covariance {covariance:.3f}")
    low = min(min(ax.get_xlim()[0], ax.get_ylim()[0]) for ax in axes)
    high = max(max(ax.get_xlim()[1], ax.get_ylim()[1]) for ax in axes)
    for ax in axes:
        ax.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    return axes


def sampler_errors(found: Mapping[str, Sequence[tuple[float, float]]], *, axes: Any = None) -> Any:
    """Errors of samplers against their evaluations of the network, log-log: found[name] = [(evaluations, error), ...].

    Returns
    -------
    Axes
    """
    ax = one_axes(axes)
    for i, (name, points) in enumerate(found.items()):
        ax.loglog(*zip(*points, strict=True), **look(i), label=name)
    places = sorted({n for points in found.values() for n, _ in points})
    ax.set_xticks(places, [f"{n:g}" for n in places])
    ax.set_xticks([], minor=True)
    ax.set(xlabel="evaluations of the network", ylabel="error")
    ax.legend(fontsize="small")
    return ax
