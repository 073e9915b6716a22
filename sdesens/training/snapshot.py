"""A training run at one step, as the bytes of a few files and back; what a checkpoint holds.

    model.safetensors, ema.safetensors   weights, with the run's `meta` as JSON in the metadata under "sdesens"
    train_state.pt                       {"step": ..., "state": ...}, for torch.load(weights_only=True)
    manifest.json                        format, step, score; size and sha256 of each file; the "sha256" of all that
                                         as json.dumps(..., sort_keys=True) writes it

Every byte is checked against the manifest before it is decoded, and no pickled code runs.

Reference: the safetensors format, https://huggingface.co/docs/safetensors.
"""

import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdesens.errors import ArgumentError, ArgumentTypeError, CheckpointError, SdesensError

FORMAT = 1
MANIFEST = "manifest.json"
MODEL, EMA, STATE = FILES = ("model.safetensors", "ema.safetensors", "train_state.pt")
COUNTS = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})(\.new)?")


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


def encode(snapshot: Snapshot) -> dict[str, bytes]:
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


def decode(path: Path) -> Snapshot:
    """A snapshot from a directory, every byte of it verified."""
    about, data = contents(path, FILES)
    model, meta = weights_of(path / MODEL, data[MODEL])
    ema, ema_meta = weights_of(path / EMA, data[EMA])
    if meta != ema_meta:
        raise refusal(path / EMA, f"is of another run than {MODEL}: their metadata differ")
    stream = io.BytesIO(data[STATE])
    saved = _decoded(path / STATE, lambda: torch.load(stream, map_location="cpu", weights_only=True))
    if not isinstance(saved, dict) or saved.keys() != {"step", "state"} or saved["step"] != about["step"]:
        raise refusal(path / STATE, f"is not the state of step {about['step']}")
    return Snapshot(about["step"], model, ema, saved["state"], meta, about["score"])


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


def weights_of(path: Path, data: bytes) -> tuple[dict[str, Tensor], dict]:
    library = _safetensors()

    def both():
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # as the format has it
        return library.load(data), json.loads(header["__metadata__"]["sdesens"])

    return _decoded(path, both)


def _manifest_bytes(step: int, score: float | None, files: dict) -> bytes:
    body = {"format": FORMAT, "step": step, "score": score, "files": files}
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "sha256": seal}, indent=1) + "\n").encode()


def refusal(file: Path, wrong: str) -> CheckpointError:
    return CheckpointError(f"{file} {wrong}: restore {file.parent.name} from a backup or delete it.")


def _decoded(file: Path, decode: Callable[[], Any]) -> Any:
    try:
        return decode()
    except MemoryError:  # says nothing of the file
        raise
    except Exception as error:  # decoders raise what they like on bad input
        raise refusal(file, f"cannot be decoded ({type(error).__name__}: {error!s:.200})") from error


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise refusal(file, "is missing") from error
    except OSError as error:
        raise refusal(file, f"cannot be read ({error.strerror})") from error


def manifest(path: Path) -> dict:
    file = path / MANIFEST
    raw = _bytes(file)
    found = _decoded(file, lambda: dict(json.loads(raw)))
    if type(found.get("format")) is int and found["format"] > FORMAT:
        raise CheckpointError(
            f"{file} has format {found['format']}, newer than {FORMAT}, the newest known here: pip install -U sdesens."
        )
    if raw != _manifest_bytes(found.get("step"), found.get("score"), found.get("files")):
        raise refusal(file, "is altered or truncated (its checksum or format differs)")
    if set(found["files"]) != set(FILES):
        raise refusal(file, f"lists {sorted(found['files'])} instead of {sorted(FILES)}")
    if found["step"] not in (step_of(path), step_of(path.resolve())):  # symbolic links
        raise refusal(file, f"is of step {found['step']}, yet lies in {path.name}")
    return found


def contents(path: Path, names: Iterable[str]) -> tuple[dict, dict[str, bytes]]:
    """The manifest and the named files, as verified against it."""
    found = manifest(path)
    files = {}
    for name in names:
        files[name], wanted = _bytes(path / name), found["files"][name]
        size, due = len(files[name]), wanted["size"]
        if size != due:
            raise refusal(path / name, f"is {'truncated' if size < due else 'too long'}: {size} bytes of {due}")
        if hashlib.sha256(files[name]).hexdigest() != wanted["sha256"]:
            raise refusal(path / name, "is altered: its sha256 is not the one in the manifest")
    return found, files


def intact(path: Path) -> bool:
    try:
        contents(path, FILES)
    except CheckpointError:
        return False
    return True


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 for another name."""
    name = COUNTS.fullmatch(path.name)
    return int(name[1]) if name else -1
