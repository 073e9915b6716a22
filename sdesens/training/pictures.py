"""Pictures of samples and of a report. matplotlib is an optional extra, imported when the first picture is drawn."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdesens.errors import ArgumentError
from sdesens.training.data import Data, Form
from sdesens.training.files import whole_file
from sdesens.training.samples import Samples
from sdesens.training.scores import Report

ROW = 10  # images
SHOWN_POINTS = 2000
FLOORS = {"oracle": ("k", "-"), "memorisation": ("k", ":"), "linear": ("0.5", "--")}


def require_matplotlib() -> None:
    """Raise ArgumentError unless matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ArgumentError(
            "pictures need matplotlib: pip install 'sdesens[plot]', or leave them out with --picture-every 0 and --no-report."
        ) from error


def is_image(form: Form) -> bool:
    """Whether an item is an image: (height, width), (1, height, width) or (3, height, width).

    Example
    -------
    >>> is_image(Form("x", (3, 8, 8), 0, 1.0, 0.0, 1.0, ""))
    True
    """
    return len(form.event) == 2 or (len(form.event) == 3 and form.event[0] in (1, 3))


def show_samples(axes: Any, x: Tensor, form: Form, *, like: Tensor | None = None, label: str = "samples") -> Any:
    """Draw samples (n, *event) into Axes: images in rows of ten, the first two columns of a table in its own units, a histogram of one; `like`
    beside them is data."""
    if is_image(form):
        axes.imshow(tiles(x[: ROW * ROW], form), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_off()
        return axes
    rows = [form.restore(r[:SHOWN_POINTS]).flatten(1) for r in (like, x) if r is not None]
    names, colours = ["data", label][-len(rows) :], ["0.6", "C0"][-len(rows) :]
    if rows[0].shape[1] == 1:
        bins = torch.linspace(*torch.cat(rows).aminmax(), 41).numpy()
        for r, name, colour in zip(rows, names, colours, strict=True):
            axes.hist(r[:, 0].numpy(), bins=bins, density=True, histtype="step", label=name, color=colour)
        axes.set(xlabel="x[0]", ylabel="density")
    else:
        for r, name, colour in zip(rows, names, colours, strict=True):
            axes.plot(r[:, 0], r[:, 1], ".", markersize=2, label=name, color=colour, alpha=0.6)
        axes.set(xlabel="x[0]", ylabel="x[1]")
        if len(form.scale) == 1:  # else columns have units of their own
            axes.set_aspect("equal", adjustable="datalim")
    if len(rows) > 1:
        axes.legend(loc="upper right", fontsize="small", markerscale=4)
    return axes


def tiles(x: Tensor, form: Form) -> Any:
    """Images side by side, ten in a row, a grey pixel between them, as an array (height, width[, 3]) of values in [0, 1].

    The data's extremes become 0 and 1, black and white, and what lies beyond is cut off.
    """
    colours = form.event[0] if len(form.event) == 3 else 1
    h, w = form.event[-2:]
    x = x.reshape(len(x), colours, h, w).double()
    x = ((x - form.low) / max(form.high - form.low, 1e-12)).clamp(0, 1)
    rows, columns = -(-len(x) // ROW), min(ROW, len(x))
    sheet = torch.full((colours, rows * (h + 1) - 1, columns * (w + 1) - 1), 0.5, dtype=torch.float64)
    for i, image in enumerate(x):
        top, left = (i // ROW) * (h + 1), (i % ROW) * (w + 1)
        sheet[:, top : top + h, left : left + w] = image
    return sheet[0].numpy() if colours == 1 else sheet.movedim(0, -1).numpy()


def show_levels(axes: Any, report: Report) -> Any:
    """Draw the eps-loss at each log-SNR and its other floors, over that of the best linear network, into Axes."""
    lam = [level.log_snr for level in report.levels]
    for name, (colour, style) in FLOORS.items():
        if all(name in level.floors for level in report.levels):
            ratios = [level.floors[name] / level.floors["linear"] for level in report.levels]
            axes.plot(lam, ratios, style, color=colour, label=f"{name} floor")
    own = {k: [getattr(level, k) / level.floors["linear"] for level in report.levels] for k in ("test", "train")}
    axes.plot(lam, own["test"], "C0o-", label="test", markersize=4)
    axes.plot(lam, own["train"], "C1x--", label="train", markersize=5)
    axes.set(ylim=(0, 1.1 * max(1.0, *own["test"], *own["train"])), xlabel="log-SNR (data on the right)", ylabel="eps-loss, over the linear floor", title="what is learnt, and what could be")  # fmt: skip
    axes.legend(fontsize="small")
    return axes


def show_log(axes: Any, rows: list[dict[str, Any]], floors: dict[str, float]) -> Any:
    """Draw the training and held-out loss beside their floors into Axes."""
    losses = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    held = [(r["step"], r["validation"]) for r in rows if "validation" in r]
    if losses:
        axes.plot(*zip(*losses, strict=True), color="C1", linewidth=0.7, label="training")
    if held:
        axes.plot(*zip(*held, strict=True), "C0o-", markersize=4, label="held out, averaged weights")
    for name, value in floors.items():
        colour, style = FLOORS[name]
        axes.axhline(value, color=colour, linestyle=style, label=f"{name} floor")
    if len(values := sorted(v for _, v in losses)) > 20:  # the first losses would hide the rest
        top = max([values[int(0.97 * (len(values) - 1))], *floors.values(), *(v for _, v in held)])
        axes.set_ylim(None, 1.1 * top)
    axes.set(xlabel="step", ylabel="loss", title="training" if losses else "no log of the training")
    axes.legend(fontsize="small")
    return axes


def save_samples(
    samples: Samples, form: Form, file: Path, *, like: Tensor | None = None, title: str | None = None
) -> None:
    """Write a picture of samples."""
    figure, axes = _figure(*(_size(form, len(samples.x)) if is_image(form) else (5.0, 5.0)))
    show_samples(axes, samples.x, form, like=like).set_title(title or "")
    _save(figure, file)


def _size(form: Form, n: int) -> tuple[float, float]:
    """Width and height of a sheet of n images, the longer of them 6."""
    h, w = form.event[-2] * min(ROW, -(-n // ROW)), form.event[-1] * min(ROW, n)
    return max(6 * w / max(h, w), 1.0), max(6 * h / max(h, w), 1.0)


def save_comparison(samples: dict[str, Tensor], form: Form, file: Path) -> None:
    """Write a picture of several sets of samples, side by side, by their names."""
    figure, axes = _figure(5 * len(samples), 5, len(samples))
    for ax, (name, x) in zip(axes, samples.items(), strict=True):
        show_samples(ax, x, form, label=name).set_title(name)
    if not is_image(form):
        for ax in axes:
            ax.set_adjustable("box")
            ax.set(xlim=axes[0].get_xlim(), ylim=axes[0].get_ylim())
    _save(figure, file)


def save_report(report: Report, data: Data, rows: list[dict[str, Any]], floors: dict[str, float], file: Path) -> None:
    """Write the picture of a report: samples, for images beside data, what is learnt, and the course of training."""
    image = is_image(data.form)
    figure, axes = _figure(16 if image else 13, 4.2, 4 if image else 3)
    if image:
        show_samples(axes[0], data.test, data.form).set_title("test data")
    show_samples(axes[-3], report.samples.x, data.form, like=data.train).set_title("samples")
    show_levels(axes[-2], report)
    show_log(axes[-1], rows, floors)
    _save(figure, file)


def _figure(width: float, height: float, panels: int = 1):
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot: a program's own windows and backend are left alone

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels)


def _save(figure, file: Path) -> None:
    with whole_file(file) as part:
        figure.savefig(part, dpi=120)
