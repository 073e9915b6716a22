"""What a loss can be: the least that any network has, and the least of a linear one.

    oracle          the exact law's floor, where the law is known
    memorisation    the floor of the law that is the training rows: a network near it recites them
    linear          the floor of a Gaussian with the data's mean and covariance: a network above it has learnt less than a linear one

With labels, the memorisation floor is the mean of the classes' own and, by the share of hidden labels, that of all rows.
"""

import torch
from torch import Tensor

from sdesens.diffusion.draws import draw_uniforms
from sdesens.diffusion.oracles import Empirical, Gaussian
from sdesens.diffusion.schedule import Schedule
from sdesens.diffusion.weights import Weight
from sdesens.training.batches import training_times
from sdesens.training.config import TrainConfig
from sdesens.training.data import Data
from sdesens.training.model import loss_weight

MOST_WORK = 2 * 10**10  # multiplications, some ten seconds
MOST_DIMENSIONS = 2048
DRAWS = 2**12


def floors(data: Data, schedule: Schedule, t: Tensor, weight: Weight, *, drop_label: float = 0.0) -> dict[str, float]:
    """Floors of the mean loss over times t (n,), a dimension, by the names at the head of this file; those that take too long are left out.

    Example
    -------
    >>> from sdesens.diffusion import VP, simple_weight
    >>> from sdesens.training.data import load_data
    >>> floors(load_data("gmm8"), VP(), torch.linspace(0.001, 1, 500, dtype=torch.float64), simple_weight)
    {'oracle': 0.2..., 'linear': 0.3...}
    """
    rows = data.train.flatten(1).double()
    n, d = rows.shape
    found = {}
    if data.law is not None:
        found["oracle"] = float(data.law.floor(schedule, t, weight=weight).mean)
    elif n * d * DRAWS <= MOST_WORK:
        found["memorisation"] = _memorisation(rows, data.labels, drop_label, schedule, t, weight)
    if d <= MOST_DIMENSIONS:
        # the eigenvalues are the variances along the axes, and the loss of a Gaussian depends on nothing else
        axes = torch.linalg.eigvalsh(torch.cov(rows.mT, correction=0).reshape(d, d)).clamp_min(1e-12)
        found["linear"] = float(Gaussian(torch.zeros(d), axes).floor(schedule, t, weight=weight).mean)
    return found


def training_floors(config: TrainConfig, data: Data) -> dict[str, float]:
    """Floors of the loss that a configuration trains on."""
    schedule, sigma_data = config.make_schedule(), data.form.sigma_data
    t = training_times(config, schedule, draw_uniforms(0, 0, DRAWS), sigma_data)
    return floors(data, schedule, t, loss_weight(config, sigma_data), drop_label=config.drop_label)


def _memorisation(rows: Tensor, labels: Tensor | None, drop: float, schedule, t, weight) -> float:
    def floor(some: Tensor) -> float:
        return float(Empirical(some).floor(schedule, t, weight=weight, n_samples=DRAWS).mean)

    if labels is None:
        return floor(rows)
    own = sum(int((labels == c).sum()) * floor(rows[labels == c]) for c in labels.unique()) / len(rows)
    return (1 - drop) * own + (drop * floor(rows) if drop else 0.0)
