"""What the commands share: their output, the words of a list, and objects from the user's own files."""

import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from sdesens.errors import ArgumentError, SdesensError


def split(names: str | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    found = tuple(n.strip() for n in names.split(",") if n.strip())
    if not found:
        raise ArgumentError(f"{names!r} names nothing: separate names by commas, or leave the option out.")
    return found


def load_object(target: str) -> tuple[Any, dict[str, Any]]:
    """What FILE.py:NAME says: the object (None if there is none), and all that the file defines."""
    file, _, name = target.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ArgumentError(f"there is no file {file!r}: give FILE.py:NAME, NAME being defined in that file.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ArgumentError(f"{file!r} is not a Python file: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as `python FILE.py` would
    with as_argument(target):
        spec.loader.exec_module(module)
    return getattr(module, name, None), vars(module)


@contextmanager
def as_argument(target: str) -> Iterator[None]:
    """Errors of the user's code become one of the argument."""
    try:
        yield
    except SdesensError:
        raise
    except Exception as error:
        raise ArgumentError(f"{target!r} could not be run: {type(error).__name__}: {error}") from error


def plain(x):
    """Numbers that JSON has no word for become null."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [plain(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def console() -> Console:
    """A console that is wide enough for tables where nothing says how wide it is."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 150
    return Console(width=width, emoji=False, markup=False, highlight=False)
