"""How rough a curve is, and a family of paths of one noise: the two meanings of "path"."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sdesens.errors import ArgumentError
from sdesens.family import Family
from sdesens.plot.common import LINES, look, new_axes, one_axes
from sdesens.roughness import Roughness


def roughness(found: Mapping[str, Roughness], *, axes: Any = None) -> Any:
    """Increments, difference quotients and sums of squares against the lag, log-log; lags as shares of the whole curve.

    Parameters
    ----------
    found : mapping of str to Roughness
        From `sdesens.roughness.roughness`, by what the legend says.
    axes : three Axes, optional

    Returns
    -------
    The three Axes.
    """
    axes = new_axes(axes, 3)
    parts = (
        ("mean |increment|", "increments"),
        ("mean |increment| / lag", "quotients"),
        ("sum of squares", "variation"),
    )
    for ax, (label, name) in zip(axes, parts, strict=True):
        for i, (key, r) in enumerate(found.items()):
            text = f"{key}: slope {float(r.exponent.mean):.3f}" if name == "increments" else key
            ax.loglog(r.lags, getattr(r, name), **look(i, markersize=5), label=text)
        ax.set(xlabel="lag h, in the argument's unit", ylabel=label)
    axes[0].legend(fontsize="small")
    return axes


def family(found: Family, *, at: float, slopes: Sequence[float] | None = None, shown: int = 5, axes: Any = None) -> Any:
    """Left: one noise, a path in time for each of some values of the parameter. Right: each noise, its functional against the parameter,
    with tangents where they are known.

    Parameters
    ----------
    found : Family
    at : float
        The parameter's value at which tangents touch.
    slopes : numbers (B,), optional
        dF/dtheta of each path there.
    shown : int
        Values of the parameter in the left panel.
    axes : pair of Axes, optional

    Returns
    -------
    The pair of Axes.
    """
    if found.ys.dim() != 4 or found.ys.shape[3] != 1:
        raise ArgumentError(f"`found` must have states of one number, got ys of shape {tuple(found.ys.shape)}.")
    if not float(found.values[0]) <= at <= float(found.values[-1]):
        raise ArgumentError(
            f"`at` must lie among the values, {float(found.values[0]):g} ... {float(found.values[-1]):g}, got {at!r}."
        )
    if slopes is not None and len(slopes) != found.F.shape[1]:
        raise ArgumentError(f"`slopes` must have one number a path, {found.F.shape[1]}, got {len(slopes)}.")
    left, right = new_axes(axes, 2)
    picked = torch.linspace(0, len(found.values) - 1, shown).round().long().tolist()
    for k, i in enumerate(picked):
        left.plot(found.ts, found.ys[i, :, 0, 0], color=str(0.75 * k / max(shown - 1, 1)), linestyle=LINES[k % 4], linewidth=1.0, label=f"{found.name} = {float(found.values[i]):.3g}")  # fmt: skip
    left.set(xlabel="t", ylabel="$X_t$", title=f"one noise, {shown} values of {found.name}: rough in t")
    left.legend(fontsize="small")
    half = 0.12 * float(found.values[-1] - found.values[0])
    for b in range(found.F.shape[1]):
        right.plot(found.values, found.F[:, b], color=f"C{b}", linestyle=LINES[b % 6], linewidth=1.2)
        if slopes is not None:
            middle = torch.tensor([at - half, at, at + half])
            height = float(np.interp(at, found.values.numpy(), found.F[:, b].numpy()))
            right.plot(middle, height + float(slopes[b]) * (middle - at), color="k", linewidth=2.2, alpha=0.7)
            right.plot([at], [height], "ko", markersize=4)
    right.set(xlabel=found.name, ylabel=f"F({found.name}; noise)", title=f"each noise, {found.name} moving: smooth")
    return left, right


def coefficients(found: Mapping[str, Sequence[float]], *, axes: Any = None) -> Any:
    """Sizes of Chebyshev coefficients: a straight fall where a curve is analytic, a slow one where it is rough or jumps.

    Parameters
    ----------
    found : mapping of str to numbers
        Coefficients, by what the legend says.

    Returns
    -------
    Axes
    """
    ax = one_axes(axes)
    for i, (name, c) in enumerate(found.items()):
        sizes = [max(abs(float(v)), 1e-17) for v in c]
        ax.semilogy(range(len(sizes)), sizes, **look(i, markersize=4), label=name)
    ax.set(xlabel="degree k", ylabel="|Chebyshev coefficient|")
    ax.legend(fontsize="small")
    return ax
