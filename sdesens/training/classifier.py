"""A small classifier, to score samples that were asked to be of a class.

One hidden layer of 64 units, fitted by scikit-learn until the loss no longer falls:

    h = max(0, W_1^T x + b_1),      the class is that of the largest output W_2^T h + b_2.                        (1)

`features` is h: Frechet's distance of samples and data there is what Inception features are for photographs (M. Heusel et al.,
NeurIPS 2017, arXiv 1706.08500).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdesens.errors import ArgumentError, ArgumentTypeError, DtypeError, SdesensError, ShapeError

HIDDEN = 64
MOST_EPOCHS = 1000  # digits take about 250


@dataclass(frozen=True, eq=False)
class Classifier:
    """A fitted classifier, see `fit_classifier`; what it returns lives on the CPU.

    Its methods raise ArgumentTypeError, DtypeError, ShapeError or ArgumentError for x that is not (n, *event), floating and finite.

    Attributes
    ----------
    network : sklearn.neural_network.MLPClassifier
    event : tuple of int
    """

    network: Any
    event: tuple[int, ...]

    def features(self, x: Tensor) -> Tensor:
        """The hidden layer h of equation (1), (n, 64) float64, at x (n, *event).

        Example
        -------
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> fit_classifier(x, (x[:, 0] > 0).long()).features(x).shape
        torch.Size([20, 64])
        """
        weights, biases = (torch.from_numpy(a[0]) for a in (self.network.coefs_, self.network.intercepts_))
        return (_rows(x, self.event) @ weights + biases).clamp(min=0.0)

    def predict(self, x: Tensor) -> Tensor:
        """The classes, (n,) long, at x (n, *event).

        Example
        -------
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> fit_classifier(x, (x[:, 0] > 0).long()).predict(torch.tensor([[-0.9], [0.8]]))
        tensor([0, 1])
        """
        return torch.from_numpy(self.network.predict(_rows(x, self.event).numpy())).long()

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """The share of x (n, *event) whose class is that of labels (n,).

        Example
        -------
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> fit_classifier(x, (x[:, 0] > 0).long()).accuracy(torch.tensor([[-0.9], [0.8]]), torch.tensor([1, 1]))
        0.5
        """
        return float((self.predict(x) == _labels(labels, len(x))).double().mean())


def fit_classifier(x: Tensor, labels: Tensor, *, seed: int = 0) -> Classifier:
    """Fit equation (1) to rows and their classes, in float64: the same numbers for the same seed.

    Parameters
    ----------
    x : Tensor, shape (n, *event)
        Floating, of order 1.
    labels : Tensor, shape (n,)
        Integers, of two classes at least.
    seed : int
        0 ... 2^32 - 1, of the starting weights and the order of rows.

    Raises
    ------
    SdesensError
        If scikit-learn is not installed.
    ArgumentTypeError, DtypeError, ShapeError, ArgumentError
        Unless x is floating and finite, labels are integers, one a row, of two classes or more; for a seed out of range.

    Example
    -------
    >>> x = torch.linspace(-1, 1, 20)[:, None]
    >>> classifier = fit_classifier(x, (x[:, 0] > 0).long())
    >>> classifier.accuracy(x, (x[:, 0] > 0).long())
    1.0
    """
    try:
        from sklearn.neural_network import MLPClassifier
    except ImportError as error:
        raise SdesensError("the classifier comes with scikit-learn: pip install 'sdesens[demo]'.") from error
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ArgumentTypeError(f"`seed` must be an int, got {seed!r:.60}: use int(...).")
    if not 0 <= seed < 2**32:
        raise ArgumentError(f"`seed` must lie in 0 ... 2^32 - 1, got {seed}.")
    rows = _rows(x, None)
    classes = _labels(labels, len(rows))
    if len(classes.unique()) < 2:
        raise ArgumentError(
            f"`labels` must be of two classes at least, all are {classes[0]}: there is nothing to tell."
        )
    network = MLPClassifier((HIDDEN,), random_state=seed, max_iter=MOST_EPOCHS)
    return Classifier(network.fit(rows.numpy(), classes.numpy()), tuple(x.shape[1:]))


def _rows(x, event: tuple[int, ...] | None) -> Tensor:
    """x as (n, d), float64 on the CPU; raise unless it is (n, *event), floating and finite."""
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(f"`x` must be a tensor (n, *event), got {type(x).__name__}: use torch.tensor(...).")
    if not x.is_floating_point():
        raise DtypeError(f"`x` must be floating, got {x.dtype}: scale the data to order 1 and convert them.")
    if x.dim() < 2 or not x.numel() or event not in (None, tuple(x.shape[1:])):
        wanted = "event" if event is None else ", ".join(map(str, event))
        raise ShapeError(
            f"`x` must have shape (n, {'*' * (event is None)}{wanted}), not empty, got {tuple(x.shape)}: reshape it."
        )
    if not bool(torch.isfinite(x).all()):
        raise ArgumentError("`x` holds NaN or infinite values: remove them.")
    return x.detach().cpu().double().flatten(1)


def _labels(labels, n: int) -> Tensor:
    """Labels on the CPU; raise unless they are n integers."""
    if not isinstance(labels, Tensor):
        raise ArgumentTypeError(f"`labels` must be a tensor (n,), got {type(labels).__name__}: use torch.tensor(...).")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DtypeError(f"`labels` must be integers, got {labels.dtype}: use labels.long().")
    if labels.shape != (n,):
        raise ShapeError(f"`labels` must have shape ({n},), one a row of x, got {tuple(labels.shape)}.")
    return labels.detach().cpu().long()
