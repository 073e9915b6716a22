"""Checkpoints of a training run that a kill, a full disk or a flipped bit cannot spoil unseen.

One directory a checkpoint, FOLDER/step-00001000/, with the files of `snapshot.py`.

Writing. A rename within a directory is atomic; nothing else is. So

(1) files are written into FOLDER/.step-00001000.tmp-PID, each fsynced, the manifest last, then the directory is
    fsynced: what gets a name that counts is whole, and on the disk;
(2) the directory is renamed to step-00001000, and FOLDER is fsynced;
(3) no rename replaces a directory with something in it. Where step-00001000 exists already, the new one becomes
    step-00001000.new, which readers prefer; then the old one is removed, and ".new" dropped from the name. At each
    moment one of the two is there and whole;
(4) a checkpoint is removed by a rename to a name as in (1), then deleted: a kill amid that leaves nothing that counts;
(5) what a killed writer left is cleared away (names as in (1)) or finished (".new") by the next save.

One process at a time may save into a folder.

Reading. What fails its checks is refused with a CheckpointError; load_latest and load_best then go on to another
checkpoint, and warn.

Reference: T. S. Pillai et al., All file systems are not created equal: on the complexity of crafting crash-consistent
applications, OSDI 2014. POSIX.1-2017, rename().
"""

import os
import re
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from torch import Tensor

from sdesens.errors import ArgumentError, CheckpointError, CheckpointWarning
from sdesens.training.snapshot import (
    COUNTS,
    MANIFEST,
    Snapshot,
    contents,
    decode,
    encode,
    intact,
    manifest,
    step_of,
    weights_of,
)

_LEFT_OVER = re.compile(r"\.step-[0-9]{8,}\.tmp-[0-9]+")


def save_checkpoint(folder: Path, snapshot: Snapshot, *, keep_last: int = 3) -> Path:
    """Write a checkpoint, whole or not at all; then keep only the `keep_last` newest and the best.

    Checkpoints of later steps than this one are never removed. One of this step that holds the same stays as it is.

    Parameters
    ----------
    folder : Path
        Where checkpoints go; made if missing. Other things in it are left alone.
    snapshot : Snapshot
        What to save.
    keep_last : int
        How many to keep besides the best (the least score), 1 or more.

    Returns
    -------
    Path
        The directory of the checkpoint.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the snapshot holds what cannot be stored and read back unchanged.
    CheckpointError
        If the disk is full or refuses: earlier checkpoints stay, no part of this one does.
    SdesensError
        If safetensors is not installed.

    Examples
    --------
    >>> import tempfile, torch
    >>> weights = {"w": torch.ones(2)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_checkpoint(Path(folder), Snapshot(10, weights, weights, {"lr": 0.1}, {"dim": 2}))
    ...     print(path.name, load_latest(Path(folder)).model["w"])
    step-00000010 tensor([1., 1.])
    """
    if type(keep_last) is not int or keep_last < 1:
        raise ArgumentError(f"`keep_last` must be an int of 1 or more, got {keep_last!r}: use 3.")
    folder = Path(folder)
    checkpoints(folder)  # a folder that is a file is refused before anything is done
    files = encode(snapshot)
    final = folder / f"step-{snapshot.step:08d}"
    whole = _aside(final)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _settle(folder)
        if not (intact(final) and (final / MANIFEST).read_bytes() == files[MANIFEST]):
            _write(whole, files)
            _install(whole, final)
        _prune(folder, snapshot.step, keep_last)
    except BaseException as error:
        shutil.rmtree(whole, ignore_errors=True)
        if isinstance(error, OSError):
            raise _failure(final, error, sum(map(len, files.values()))) from error
        raise
    return final


def tidy(folder: Path, *, keep_last: int = 3) -> None:
    """What a writer that was killed left: cleared away or finished, as the next save would do, which may never come."""
    if found := checkpoints(folder):
        _settle(Path(folder))
        _prune(Path(folder), step_of(found[-1]), keep_last)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder by ascending step, by their names alone; none if there is no such folder.

    Raises
    ------
    CheckpointError
        If `folder` is a file or cannot be read.

    Examples
    --------
    >>> checkpoints(Path("no/such/run"))
    []
    """
    try:
        names = [path.name for path in Path(folder).iterdir() if COUNTS.fullmatch(path.name) and path.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"no folder of checkpoints: {folder} ({error.strerror}). Give a folder you may read and write."
        ) from error
    return sorted({Path(folder) / name.removesuffix(".new") for name in names}, key=step_of)


def load_checkpoint(path: Path) -> Snapshot:
    """Read one checkpoint, every byte of it verified.

    Raises
    ------
    CheckpointError
        Naming the file that is missing, truncated, altered, of a newer format or of another step or run.

    Examples
    --------
    >>> load_checkpoint(Path("run/step-00000010"))
    Traceback (most recent call last):
    ...
    sdesens.errors.CheckpointError: run/step-00000010/manifest.json is missing: ...
    """
    return decode(_place(path))


def load_weights(path: Path, which: Literal["ema", "model"] = "ema") -> tuple[dict[str, Tensor], dict]:
    """Weights and `meta` of a checkpoint, for sampling: only the manifest and that one file are read and verified.

    Raises
    ------
    ArgumentError
        If `which` is neither "ema" nor "model".
    CheckpointError
        As in `load_checkpoint`.

    Examples
    --------
    >>> load_weights(Path("run/step-00000010"), "weights")
    Traceback (most recent call last):
    ...
    sdesens.errors.ArgumentError: `which` must be 'ema' or 'model', got 'weights'.
    """
    if which not in ("ema", "model"):
        raise ArgumentError(f"`which` must be 'ema' or 'model', got {which!r}.")
    name = f"{which}.safetensors"
    path = _place(path)
    return weights_of(path / name, contents(path, (name,))[1][name])


def load_latest(folder: Path) -> Snapshot | None:
    """The newest checkpoint that is valid; None if there are none at all.

    Warns with CheckpointWarning of each newer one that is refused.

    Raises
    ------
    CheckpointError
        If there are checkpoints but none is valid.

    Examples
    --------
    >>> load_latest(Path("no/such/run")) is None
    True
    """
    found = checkpoints(folder)
    return _first_valid(folder, found[::-1]) if found else None


def load_best(folder: Path) -> Snapshot:
    """The valid checkpoint with the least score (the earliest of equals); the newest if none has a score.

    Warns with CheckpointWarning of each one that is refused and may have been better.

    Raises
    ------
    CheckpointError
        If no checkpoint is valid, or there are none.

    Examples
    --------
    >>> load_best(Path("no/such/run"))
    Traceback (most recent call last):
    ...
    sdesens.errors.CheckpointError: there are no checkpoints in no/such/run: check the path, or train first.
    """
    found = checkpoints(folder)
    if not found:
        raise CheckpointError(f"there are no checkpoints in {folder}: check the path, or train first.")
    return _first_valid(folder, sorted(found, key=_rank))


def _first_valid(folder: Path, paths: Iterable[Path]) -> Snapshot:
    refused = []
    for path in paths:
        try:
            snapshot = load_checkpoint(path)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        for reason in refused:
            warnings.warn(f"{reason} Until then {path.name} is used instead.", CheckpointWarning, stacklevel=3)
        return snapshot
    raise CheckpointError(
        f"no checkpoint in {folder} is valid: " + " ".join(refused) + " Restore one from a backup, or train anew."
    )


def _rank(path: Path) -> tuple[int, float]:
    """Sorts from the best: unreadable ones (any may be the best), then by score, then, newest first, those without."""
    try:
        score = manifest(_place(path))["score"]
    except CheckpointError:
        return 0, 0.0
    return (2, -step_of(path)) if score is None else (1, score)


def _place(path: Path) -> Path:
    """Where a checkpoint lies, see (3)."""
    new = Path(path).parent / f"{Path(path).name}.new"
    return new if new.is_dir() else Path(path)


def _aside(path: Path) -> Path:
    """A sibling name that never counts as a checkpoint."""
    return path.with_name(f".{path.name.removesuffix('.new')}.tmp-{os.getpid()}")


def _sync(folder: Path) -> None:
    if os.name != "posix":  # Windows opens no directories
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(folder: Path, files: dict[str, bytes]) -> None:  # (1)
    folder.mkdir()
    for name, data in files.items():
        with open(folder / name, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    _sync(folder)


def _install(whole: Path, final: Path) -> None:  # (2), (3); `whole` may be the ".new" one already
    if final.exists():
        new = final.with_name(f"{final.name}.new")
        os.replace(whole, new)
        _sync(final.parent)
        _remove(final)
        whole = new
    os.replace(whole, final)
    _sync(final.parent)


def _remove(path: Path) -> None:  # (4)
    aside = _aside(path)
    os.replace(path, aside)
    _sync(path.parent)
    _delete(aside)


def _delete(aside: Path) -> None:
    if aside.is_symlink():  # someone moved a checkpoint to another disk
        aside.unlink()
    else:
        shutil.rmtree(aside)


def _settle(folder: Path) -> None:  # (5)
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):  # left-overs come first
        if _LEFT_OVER.fullmatch(path.name):
            _delete(path)
        elif COUNTS.fullmatch(path.name) and path.suffix == ".new":
            _install(path, path.with_suffix(""))


def _prune(folder: Path, step: int, keep_last: int) -> None:
    found = checkpoints(folder)
    best = min((path for path in found if _rank(path)[0] == 1), key=_rank, default=None)
    for path in [path for path in found if step_of(path) <= step][:-keep_last]:
        if path != best:
            _remove(path)


def _failure(final: Path, error: OSError, needed: int) -> CheckpointError:
    folder = final.parent
    good = next((path.name for path in checkpoints(folder)[::-1] if intact(_place(path))), None)
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    return CheckpointError(
        f"saving {final} failed: {error}. It needs {needed} bytes, {shutil.disk_usage(there).free} are free. "
        f"{f'The last good checkpoint, {good}, is intact' if good else 'There is no valid checkpoint yet'}. "
        "Make room, raise the quota or grant access; then run the same command again to resume."
    )
