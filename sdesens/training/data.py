"""What a model is trained on: built-in sets and the user's own arrays, split into training and test rows.

A file's rows are moved and scaled to mean 0 and standard deviation 1 (each column of a table by itself, images as a whole), because
noise schedules are made for data of order 1; `Form.restore` undoes it. The built-in sets are of order 1 and left alone.
"""

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdesens.diffusion.oracles import GaussianMixture
from sdesens.errors import ArgumentError, DtypeError, ShapeError
from sdesens.noise import Philox
from sdesens.training.config import TrainConfig

BUILT_IN = ("gmm8", "moons", "digits")
FEWEST_ROWS = 30  # a tenth is for tests, and the distances of scores want three
MOST_TEST_ROWS = 10_000


@dataclass(frozen=True)
class Form:
    """All that is to be known about the data once a model is trained: numbers and words, for JSON.

    Attributes
    ----------
    name : str
    event : tuple of int
        Shape of an item.
    classes : int
        0 without labels.
    sigma_data : float
        Root mean square of the entries' standard deviations, of the training rows.
    low, high : float
        Extremes of the training rows; of all rows for data on a grid, whose levels they bound.
    fingerprint : str
        Changes with the data.
    shift, scale : tuple of float
        Per entry of an event, or one number for all: data = shift + scale x.
    cell : float
        Distance of neighbouring values, for data on a grid; 0 if there is none.
    """

    name: str
    event: tuple[int, ...]
    classes: int
    sigma_data: float
    low: float
    high: float
    fingerprint: str
    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)
    cell: float = 0.0

    def restore(self, x: Tensor) -> Tensor:
        """Samples (B, *event) in the data's own units, float64 unless the units are x's own."""
        if self.shift == (0.0,) and self.scale == (1.0,):
            return x
        shift, scale = (torch.tensor(v, dtype=torch.float64, device=x.device) for v in (self.shift, self.scale))
        return shift + scale * x.double()

    def to_json(self) -> dict[str, Any]:
        """A dict for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Form":
        """What `to_json` wrote."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


@dataclass(frozen=True, eq=False)
class Data:
    """Rows to train on and rows to test on.

    Attributes
    ----------
    form : Form
    train, test : Tensor, shape (n, *event), float32
        Training rows of a law are only for metrics: training draws fresh ones.
    labels, test_labels : Tensor, shape (n,), int64, or None
    law : GaussianMixture or None
        The exact law, where there is one.
    """

    form: Form
    train: Tensor
    test: Tensor
    labels: Tensor | None = None
    test_labels: Tensor | None = None
    law: GaussianMixture | None = None


def load_data(name: str) -> Data:
    """The data of that name: gmm8, moons, digits, FILE.npy (rows first), or FILE.npz with arrays x and, if there are, labels.

    Raises
    ------
    ArgumentError, ShapeError, DtypeError
        For an unknown name, a missing or unreadable file, rows that are too few, constant, not finite or not numbers.

    Example
    -------
    >>> load_data("gmm8").test.shape
    torch.Size([4000, 2])
    """
    if name in BUILT_IN:
        return {"gmm8": _gmm8, "moons": _moons, "digits": _digits}[name]()
    path = Path(name)
    if path.suffix not in (".npy", ".npz"):
        raise ArgumentError(f"`data` must be {', '.join(BUILT_IN)}, FILE.npy or FILE.npz, got {name!r}.")
    return _from_arrays(str(path.name), *_read(path))


def data_of(config: TrainConfig) -> Data:
    """What a configuration is trained on: its data, without labels if it hides them all."""
    data = load_data(config.data)
    if config.drop_label < 1:
        return data
    return replace(data, form=replace(data.form, classes=0), labels=None, test_labels=None)


def law_of(name: str) -> GaussianMixture | None:
    """The exact law of the data of that name, where there is one."""
    return GaussianMixture.ring() if name == "gmm8" else None


def _gmm8() -> Data:
    law = GaussianMixture.ring()
    sigma_data = float(law.cov.diagonal().mean().sqrt())
    train, test = law.sample(4000, seed=1).float(), law.sample(4000, seed=2).float()
    low, high = float(train.min()), float(train.max())
    form = Form("gmm8", (2,), 0, sigma_data, low, high, _fingerprint(train.numpy(), test.numpy()))
    return Data(form, train, test, law=law)


def _moons() -> Data:
    datasets = _sklearn("moons").datasets
    x, labels = datasets.make_moons(24_000, noise=0.08, random_state=0)
    x = ((x - x.mean(0)) / x.std()).astype(np.float32)
    return _split("moons", x, labels.astype(np.int64), n_test=4000)


def _digits() -> Data:
    found = _sklearn("digits").datasets.load_digits()
    x = (found.images[:, None] / 8 - 1).astype(np.float32)
    return _split("digits", x, found.target.astype(np.int64), n_test=397, cell=1 / 8)


def _sklearn(name: str):
    try:
        import sklearn.datasets
    except ImportError as error:
        raise ArgumentError(f"the data {name!r} come with scikit-learn: pip install 'sdesens[demo]'.") from error
    return sklearn


def _read(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Arrays of a file, without running anything that is pickled in it."""
    if not path.is_file():
        raise ArgumentError(f"there is no file {str(path)!r}: `data` is {', '.join(BUILT_IN)}, FILE.npy or FILE.npz.")
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found, None
        with found as archive:
            if "x" not in archive or not set(archive) <= {"x", "labels"}:
                raise ArgumentError(
                    f"{str(path)!r} must hold arrays `x` and, if there are, `labels`; it holds {', '.join(archive) or 'none'}."
                )
            return archive["x"], archive.get("labels")
    except ArgumentError:
        raise
    except Exception as error:  # numpy raises many kinds: ValueError, EOFError, OSError, BadZipFile, ...
        raise ArgumentError(
            f"{str(path)!r} could not be read as an array of numbers ({error}): write it with numpy.save, without objects."
        ) from error


def _from_arrays(name: str, x: np.ndarray, labels: np.ndarray | None) -> Data:
    if x.dtype.kind not in "fiub":
        raise DtypeError(f"{name}: the data must be real numbers, got {x.dtype}: convert them.")
    if x.ndim < 2 or not x[0:1].size:
        raise ShapeError(f"{name}: the data must have shape (rows, *event), got {x.shape}: x[:, None] for numbers.")
    if len(x) < FEWEST_ROWS:
        raise ShapeError(f"{name}: at least {FEWEST_ROWS} rows are needed, got {len(x)}.")
    if x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        raise ShapeError(
            f"{name}: {x.shape} looks like (rows, height, width, channels); images are (rows, channels, height, width) here: use "
            "x.transpose(0, 3, 1, 2)."
        )
    whole = x.dtype.kind in "iub"
    if whole and max(abs(int(x.max())), abs(int(x.min()))) > 2**53:
        raise ArgumentError(f"{name}: integers beyond 2^53 would be rounded: subtract an offset first.")
    x = x.astype(np.float64)
    bad = ~np.isfinite(x).reshape(len(x), -1).all(1)
    if bad.any():
        raise ArgumentError(
            f"{name}: {bad.sum()} of {len(x)} rows hold NaN or infinite values, the first is row {int(bad.argmax())}: remove them."
        )
    if labels is not None:
        labels = _check_labels(name, labels, len(x))
    images = x.ndim > 2
    x, shift, scale = _standardised(name, x, None if images else 0)
    cell = 1 / float(scale[0]) if images and whole else 0.0
    n_test = min(-(-len(x) // 10), MOST_TEST_ROWS)
    return _split(name, x, labels, n_test=n_test, shift=tuple(shift.tolist()), scale=tuple(scale.tolist()), cell=cell)


def _standardised(name: str, x: np.ndarray, axes: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of mean 0 and standard deviation 1, float32, and what was taken off and divided by; a constant column stays one."""
    with np.errstate(over="ignore", invalid="ignore"):  # looked at below
        shift = np.atleast_1d(x.mean(axes))
        off = x - shift
        largest = np.atleast_1d(np.abs(off).max(axes))
        if not np.isfinite(largest).all():
            raise ArgumentError(
                f"{name}: the numbers are too large for their variance to be computed: scale them down."
            )
        still = largest <= 1e-12 * np.abs(shift)
        largest = np.where(still, 1.0, largest)  # a variance of squares may be too small, or too large, for a float
        scale = np.where(still, 1.0, largest * np.atleast_1d((off / largest).std(axes)))
    if still.all():
        raise ArgumentError(f"{name}: all rows are the same: there is nothing to learn.")
    return (off / scale).astype(np.float32), shift, scale


def _check_labels(name: str, labels: np.ndarray, n: int) -> np.ndarray:
    if labels.shape != (n,) or labels.dtype.kind not in "iub":
        raise ShapeError(
            f"{name}: `labels` must be integers of shape ({n},), one a row, got {labels.dtype} of shape {labels.shape}."
        )
    found = np.unique(labels)
    if found[0] < 0 or found[-1] != len(found) - 1:
        raise ArgumentError(
            f"{name}: `labels` must be 0 ... classes - 1, each of them used, got {len(found)} labels from {found[0]} to {found[-1]}: "
            "numpy.unique(labels, return_inverse=True)[1] renames them."
        )
    return labels.astype(np.int64)


def _split(name: str, x: np.ndarray, labels: np.ndarray | None, *, n_test: int, **form) -> Data:
    """Test rows are a fixed random choice, the same for every seed of training."""
    keys = Philox(0).normals(0, len(x), 0, 1, 1, dtype=torch.float64, device=torch.device("cpu"))[0, :, 0]
    order = torch.argsort(keys, stable=True)
    rows, classes = torch.from_numpy(x), 0 if labels is None else int(labels.max()) + 1
    labels_of = None if labels is None else torch.from_numpy(labels)
    train, test = rows[order[n_test:]], rows[order[:n_test]]
    sigma_data = float(train.double().var(0, correction=0).mean().sqrt())
    if not sigma_data > 0:
        raise ArgumentError(f"{name}: all rows to train on are the same: there is nothing to learn.")
    if labels_of is not None and (lost := set(range(classes)) - set(labels_of[order[n_test:]].tolist())):
        raise ArgumentError(
            f"{name}: no row of class {', '.join(map(str, sorted(lost)))} is left to train on, as a tenth of the rows is held out: give each class "
            "more rows, or leave it out."
        )
    seen = rows if form.get("cell") else train
    fingerprint = _fingerprint(x, np.zeros(0) if labels is None else labels)
    return Data(
        Form(name, tuple(x.shape[1:]), classes, sigma_data, float(seen.min()), float(seen.max()), fingerprint, **form),
        train,
        test,
        None if labels_of is None else labels_of[order[n_test:]],
        None if labels_of is None else labels_of[order[:n_test]],
    )


def _fingerprint(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for a in arrays:
        digest.update(f"{a.dtype} {a.shape}".encode())
        digest.update(np.ascontiguousarray(a).tobytes())
    return digest.hexdigest()[:16]
