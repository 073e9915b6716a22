"""Checkpoints of a training run that a kill, a full disk or a flipped bit cannot spoil unseen.

One directory a checkpoint, FOLDER/step-00001000/:

    model.safetensors, ema.safetensors   weights, with the run's `meta` as JSON in the metadata under "sdesens"
    train_state.pt                       {"step": ..., "state": ...}, for torch.load(weights_only=True)
    manifest.json                        format, step, score; size and sha256 of each file; the "sha256" of all that
                                         as json.dumps(..., sort_keys=True) writes it

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

Reading. Every byte is checked against the manifest before it is decoded, and no pickled code runs. What fails is
refused with a CheckpointError; load_latest and load_best then go on to another checkpoint, and warn.

References
----------
T. S. Pillai et al., All file systems are not created equal: on the complexity of crafting crash-consistent
applications, OSDI 2014. POSIX.1-2017, rename(). The safetensors format, https://huggingface.co/docs/safetensors.
"""

import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sdesens.errors import ArgumentError, ArgumentTypeError, CheckpointError, CheckpointWarning, SdesensError

FORMAT = 1
MANIFEST = "manifest.json"
FILES = ("model.safetensors", "ema.safetensors", "train_state.pt")
_COUNTS = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})(\.new)?")
_LEFT_OVER = re.compile(r"\.step-[0-9]{8,}\.tmp-[0-9]+")


@dataclass(frozen=True)
class Snapshot:
    """A training run at one step.

    Attributes
    ----------
    step : int
        Optimiser steps done.
    model, ema : dict of str to Tensor
        Weights, and their moving average. Saved contiguous on the CPU; tensors that share memory become separate.
    state : dict
        What else a resume needs: nested dict, list and tuple of Tensor, int, float, str, bool, None.
    meta : dict
        What the run is, as JSON.
    score : float or None
        Validation loss; smaller is better. None: not measured.
    """

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    state: dict
    meta: dict
    score: float | None = None


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
    >>> import tempfile
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
    files = _encode(snapshot)
    final = folder / f"step-{snapshot.step:08d}"
    whole = _aside(final)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _settle(folder)
        if not (_intact(final) and (final / MANIFEST).read_bytes() == files[MANIFEST]):
            _write(whole, files)
            _install(whole, final)
        _prune(folder, snapshot.step, keep_last)
    except BaseException as error:
        shutil.rmtree(whole, ignore_errors=True)
        if isinstance(error, OSError):
            raise _failure(final, error, sum(map(len, files.values()))) from error
        raise
    return final


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
        names = [path.name for path in Path(folder).iterdir() if _COUNTS.fullmatch(path.name) and path.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"no folder of checkpoints: {folder} ({error.strerror}). Give a folder you may read and write."
        ) from error
    return sorted({Path(folder) / name.removesuffix(".new") for name in names}, key=_step)


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
    path = _place(path)
    manifest, data = _contents(path, FILES)
    model, meta = _weights(path / FILES[0], data[FILES[0]])
    ema, ema_meta = _weights(path / FILES[1], data[FILES[1]])
    if meta != ema_meta:
        raise _refusal(path / FILES[1], f"is of another run than {FILES[0]}: their metadata differ")
    stream = io.BytesIO(data[FILES[2]])
    saved = _decoded(path / FILES[2], lambda: torch.load(stream, map_location="cpu", weights_only=True))
    if not isinstance(saved, dict) or saved.keys() != {"step", "state"} or saved["step"] != manifest["step"]:
        raise _refusal(path / FILES[2], f"is not the state of step {manifest['step']}")
    return Snapshot(manifest["step"], model, ema, saved["state"], meta, manifest["score"])


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
    return _weights(path / name, _contents(path, (name,))[1][name])


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
        score = _manifest(_place(path))["score"]
    except CheckpointError:
        return 0, 0.0
    return (2, -_step(path)) if score is None else (1, score)


def _encode(snapshot: Snapshot) -> dict[str, bytes]:
    """All files of a checkpoint, the manifest last: their bytes are a function of the values alone."""
    step, score = snapshot.step, snapshot.score
    if type(step) is not int or step < 0:
        raise ArgumentError(f"`step` must be an int of 0 or more, got {step!r}: give the number of steps done.")
    if score is not None and (type(score) is not float or not math.isfinite(score)):
        raise ArgumentError(f"`score` must be a finite float or None, got {score!r}: use float(loss), None if unknown.")
    try:
        meta = json.dumps(snapshot.meta, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"`meta` must be JSON: {error}. Use dict, list, str, int, finite float.") from error
    if not isinstance(snapshot.meta, dict) or json.loads(meta) != snapshot.meta:
        raise ArgumentTypeError(f"`meta` does not survive JSON: {meta:.200}. Use lists for tuples, strings for keys.")
    buffer = io.BytesIO()
    torch.save({"step": step, "state": _plain("state", snapshot.state)}, buffer)
    data = (_tensors("model", snapshot.model, meta), _tensors("ema", snapshot.ema, meta), buffer.getvalue())
    files = dict(zip(FILES, data, strict=True))
    sums = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return {**files, MANIFEST: _manifest_bytes(step, score, sums)}


def _plain(name: str, x: Any) -> Any:
    """A copy that torch.load(weights_only=True) reads back as it is, and that shares no memory."""
    if isinstance(x, Tensor):
        if x.layout is not torch.strided or x.is_meta or x.is_quantized:
            raise ArgumentTypeError(
                f"`{name}` must be dense and hold values, got {x.layout} on {x.device}: densify it."
            )
        # a view would be stored with all that it views
        return torch.empty(x.shape, dtype=x.dtype, device="cpu").copy_(x.detach())
    if isinstance(x, dict):
        return {_plain(f"{name} key", k): _plain(f"{name}[{k!r}]", v) for k, v in x.items()}
    if type(x) in (list, tuple):
        return type(x)(_plain(f"{name}[{i}]", v) for i, v in enumerate(x))
    if type(x) is str:
        return sys.intern(x)  # pickle writes equal strings that are one object another way than two
    if x is None or type(x) in (int, float, bool):  # subclasses, as NumPy's float64, would be refused at loading
        return x
    raise ArgumentTypeError(
        f"`{name}` is a {type(x).__name__}: use tensors, dict, list, tuple, int, float, str, bool or None."
    )


def _tensors(name: str, tensors: dict[str, Tensor], meta: str) -> bytes:
    bad = [k for k, v in tensors.items() if type(k) is not str or k == "__metadata__" or not isinstance(v, Tensor)]
    if bad:
        raise ArgumentTypeError(f"`{name}` must map names to tensors, not so {bad[:3]}: use module.state_dict().")
    library = _safetensors()
    try:
        return library.save(_plain(name, tensors), {"sdesens": meta})
    except KeyError as error:
        raise ArgumentTypeError(
            f"`{name}` holds {error}, which safetensors cannot store: use another dtype."
        ) from error


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise SdesensError("checkpoints are stored by safetensors: pip install 'sdesens[train]'.") from error
    return safetensors.torch


def _weights(path: Path, data: bytes) -> tuple[dict[str, Tensor], dict]:
    library = _safetensors()

    def both():
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # as the format has it
        return library.load(data), json.loads(header["__metadata__"]["sdesens"])

    return _decoded(path, both)


def _manifest_bytes(step: int, score: float | None, files: dict) -> bytes:
    body = {"format": FORMAT, "step": step, "score": score, "files": files}
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "sha256": seal}, indent=1) + "\n").encode()


def _refusal(file: Path, wrong: str) -> CheckpointError:
    return CheckpointError(f"{file} {wrong}: restore {file.parent.name} from a backup or delete it.")


def _decoded(file: Path, decode: Callable[[], Any]) -> Any:
    try:
        return decode()
    except MemoryError:  # says nothing of the file
        raise
    except Exception as error:  # decoders raise what they like on bad input
        raise _refusal(file, f"cannot be decoded ({type(error).__name__}: {error!s:.200})") from error


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise _refusal(file, "is missing") from error
    except OSError as error:
        raise _refusal(file, f"cannot be read ({error.strerror})") from error


def _manifest(path: Path) -> dict:
    file = path / MANIFEST
    raw = _bytes(file)
    found = _decoded(file, lambda: dict(json.loads(raw)))
    if type(found.get("format")) is int and found["format"] > FORMAT:
        raise CheckpointError(
            f"{file} has format {found['format']}, newer than {FORMAT}, the newest known here: pip install -U sdesens."
        )
    if raw != _manifest_bytes(found.get("step"), found.get("score"), found.get("files")):
        raise _refusal(file, "is altered or truncated (its checksum or format differs)")
    if set(found["files"]) != set(FILES):
        raise _refusal(file, f"lists {sorted(found['files'])} instead of {sorted(FILES)}")
    if found["step"] not in (_step(path), _step(path.resolve())):  # symbolic links
        raise _refusal(file, f"is of step {found['step']}, yet lies in {path.name}")
    return found


def _contents(path: Path, names: Iterable[str]) -> tuple[dict, dict[str, bytes]]:
    """The manifest and the named files, as verified against it."""
    manifest = _manifest(path)
    files = {}
    for name in names:
        files[name], wanted = _bytes(path / name), manifest["files"][name]
        size, due = len(files[name]), wanted["size"]
        if size != due:
            raise _refusal(path / name, f"is {'truncated' if size < due else 'too long'}: {size} bytes of {due}")
        if hashlib.sha256(files[name]).hexdigest() != wanted["sha256"]:
            raise _refusal(path / name, "is altered: its sha256 is not the one in the manifest")
    return manifest, files


def _intact(path: Path) -> bool:
    try:
        _contents(path, FILES)
    except CheckpointError:
        return False
    return True


def _step(path: Path) -> int:
    name = _COUNTS.fullmatch(path.name)
    return int(name[1]) if name else -1


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
        elif _COUNTS.fullmatch(path.name) and path.suffix == ".new":
            _install(path, path.with_suffix(""))


def _prune(folder: Path, step: int, keep_last: int) -> None:
    found = checkpoints(folder)
    best = min((path for path in found if _rank(path)[0] == 1), key=_rank, default=None)
    for path in [path for path in found if _step(path) <= step][:-keep_last]:
        if path != best:
            _remove(path)


def _failure(final: Path, error: OSError, needed: int) -> CheckpointError:
    folder = final.parent
    good = next((path.name for path in checkpoints(folder)[::-1] if _intact(_place(path))), None)
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    return CheckpointError(
        f"saving {final} failed: {error}. It needs {needed} bytes, {shutil.disk_usage(there).free} are free. "
        f"{f'The last good checkpoint, {good}, is intact' if good else 'There is no valid checkpoint yet'}. "
        "Make room, raise the quota or grant access; then run the same command again to resume."
    )
