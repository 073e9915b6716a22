"""The log of a run: one JSON object a line, a function of the run's steps alone, and the same numbers for TensorBoard.

A line holds no clock, so that an interrupted and resumed run ends with the same bytes as one that was not interrupted. Speed goes to
TensorBoard only.
"""

import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any

from sdesens.errors import ArgumentError, CheckpointWarning
from sdesens.training.files import whole_file


class Log:
    """Appends to RUN/log.jsonl and, if wanted, to RUN/tensorboard.

    Parameters
    ----------
    run : Path
    step : int
        Steps done: what the files say about later ones, written by a process that was killed, is dropped.
    tensorboard : bool

    Raises
    ------
    ArgumentError
        If TensorBoard is wanted and not installed.
    """

    def __init__(self, run: Path, step: int, *, tensorboard: bool = True):
        if tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ArgumentError(
                "TensorBoard is not installed: pip install 'sdesens[train]', or leave it out with --no-tensorboard."
            )
        self.path = run / "log.jsonl"
        rows = [row for row in read_log(run) if row["step"] <= step]
        if step and step - max((row["step"] for row in rows), default=0) > 0:
            warnings.warn(
                f"{str(self.path)!r} lacks lines of steps before {step}: it was removed or cut, and will not be whole.",
                CheckpointWarning,
                stacklevel=3,
            )
        with whole_file(self.path) as part:
            part.write_text("".join(_line(row) for row in rows))
        self._file = self.path.open("a")
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, **values: float | None) -> None:
        """One line."""
        self._file.write(_line({"step": step, **values}))
        self._file.flush()
        self.show(step, **values)

    def show(self, step: int, **values: float | None) -> None:
        """Numbers for TensorBoard alone."""
        if self._board is not None:
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """See that what was written is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(run: Path) -> list[dict[str, Any]]:
    """The rows of RUN/log.jsonl; a last line that was cut off is left out, an unreadable one before it is an ArgumentError."""
    path = run / "log.jsonl"
    if not path.exists():
        return []
    rows = []
    try:
        lines = path.read_text(errors="replace").split("\n")
    except OSError as error:
        raise ArgumentError(f"{str(path)!r} cannot be read ({error}): move it away.") from error
    for i, line in enumerate(lines[:-1]):  # what follows the last newline was cut off
        try:
            row = json.loads(line)
            if not all(isinstance(v, int | float) for v in (row["step"], *row.values())):
                raise TypeError("a value is no number")
        except (ValueError, TypeError, KeyError) as error:
            raise ArgumentError(f"line {i + 1} of {str(path)!r} is not a row of a log: delete that line.") from error
        rows.append(row)
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
