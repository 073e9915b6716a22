"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdesens.errors import ArgumentError

PART = ".part-"  # in the name of what is not whole yet


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to: it takes the file's name when all is written, and is removed if not.

    Raises
    ------
    ArgumentError
        If the disk is full or refuses; a file of that name stays as it was.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_file(Path(folder) / "a.txt") as part:
    ...         _ = part.write_text("words")
    ...     print((Path(folder) / "a.txt").read_text())
    words
    """
    part = file.with_name(f".{file.stem}{PART}{os.getpid()}{file.suffix}")  # a library may look at the suffix
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(part, file)
    except OSError as error:
        raise ArgumentError(
            f"{str(file)!r} could not be written ({error}): make room, or give another place, and do it again."
        ) from error
    finally:
        with suppress(OSError):  # it is not there, or there is no such folder
            part.unlink()
