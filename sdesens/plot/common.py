"""What the pictures share: styles that are told apart in black and white, Axes, files."""

from pathlib import Path
from typing import Any

from sdesens.errors import ArgumentError

LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "x", "+", "d")


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


def new_figure(size: tuple[float, float]) -> Any:
    """A figure for a file, without pyplot: a program's own windows and backend are left alone."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def look(i: int, **more: Any) -> dict[str, Any]:
    """The i-th of several lines: its own colour, style and open marker."""
    style = {"color": f"C{i}", "linestyle": LINES[i % len(LINES)], "marker": MARKERS[i % len(MARKERS)]}
    return {**style, "markerfacecolor": "none", **more}


def one_axes(axes: Any) -> Any:
    """The Axes given, or new ones."""
    return axes if axes is not None else new_axes(None, 1)[0]


def new_axes(axes: Any, shape: int | tuple[int, int]) -> Any:
    """The Axes given, or a row or a table of new ones."""
    if axes is not None:
        return axes
    import matplotlib.pyplot as plt

    rows, columns = (1, shape) if isinstance(shape, int) else shape
    found = plt.subplots(rows, columns, figsize=(5 * columns, 3.8 * rows), layout="constrained", squeeze=False)[1]
    return found[0] if isinstance(shape, int) else found
