"""Series of data beside what a fitted model makes of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdesens.errors import ShapeError
from sdesens.plot.common import new_axes, one_axes


def fitted_series(
    times: Tensor | Sequence[float],
    data: Tensor,
    paths: Tensor,
    *,
    names: Sequence[str],
    unit: str = "",
    xlabel: str = "t",
    axes: Any = None,
) -> Any:
    """Observed series over the paths of a model: bands that half and nine tenths of the paths lie in, and two paths of them.

    Parameters
    ----------
    times : (T,)
    data : Tensor (T, d)
    paths : Tensor (T, B, d)
    names : d words
        Of the components.
    unit : str
        Of the values.
    axes : d Axes, optional

    Returns
    -------
    The Axes.
    """
    T, d = data.shape
    if (
        paths.dim() != 3
        or (paths.shape[0], paths.shape[2]) != (T, d)
        or paths.shape[1] < 2
        or (len(times), len(names)) != (T, d)
    ):
        raise ShapeError(
            f"data (T, d) need T times, d names and two or more paths (T, B, d), got data {tuple(data.shape)}, {len(times)} times, {len(names)} names, "
            f"paths {tuple(paths.shape)}."
        )
    axes = new_axes(axes, d)
    levels = torch.tensor([0.05, 0.25, 0.75, 0.95], dtype=paths.dtype)
    for i, (ax, name) in enumerate(zip(axes, names, strict=True)):
        low, lower, upper, high = torch.quantile(paths[:, :, i], levels, dim=1)
        ax.fill_between(times, low, high, color="0.88", label="9 of 10 paths")
        ax.fill_between(times, lower, upper, color="0.72", label="half of the paths")
        for k, line in enumerate(("--", ":")):
            ax.plot(
                times, paths[:, k, i], color="0.3", linestyle=line, linewidth=0.9, label="two paths" if k == 0 else None
            )
        ax.plot(times, data[:, i], "ko-", markersize=4, linewidth=1.2, label="data")
        ax.set(xlabel=xlabel, ylabel=f"{name}{f', {unit}' if unit else ''}", title=name)
        ax.locator_params(axis="x", nbins=6, integer=True)
    axes[0].legend(fontsize="small")
    return axes


def band(
    x: Tensor,
    middle: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    label: str,
    color: str = "C0",
    line: str = "-",
    axes: Any = None,
) -> Any:
    """A curve with a band around it.

    Returns
    -------
    Axes
    """
    ax = one_axes(axes)
    ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    ax.plot(x, middle, color=color, linestyle=line, label=label)
    return ax
