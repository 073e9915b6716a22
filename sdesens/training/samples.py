"""Samples of a run: a sampler by name on a grid that suits it and the schedule, labels, and guidance.

Row i of a seed is the same sample whatever the number of rows and the batches they are drawn in.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdesens.diffusion.checks import number, whole
from sdesens.diffusion.grids import edm_grid, log_snr_grid, uniform_grid
from sdesens.diffusion.predict import Denoiser, Predictor
from sdesens.diffusion.samplers import ancestral, ddim, dpmpp_2m, euler_maruyama, heun, prior
from sdesens.diffusion.schedule import Schedule
from sdesens.diffusion.summary import FIRST_TIME
from sdesens.diffusion.wrappers import guide
from sdesens.errors import ArgumentError
from sdesens.training.data import Form
from sdesens.training.files import whole_file

MOST_AT_ONCE = 2**22  # numbers of a batch of samples
LEAST_RATIO = 0.002  # sigma/alpha of the last time above 0


class Sampler(NamedTuple):
    """A sampler, its usual number of steps, and whether its noise has a level `eta`."""

    walk: Callable
    steps: int
    takes_eta: bool


SAMPLERS = {
    "heun": Sampler(heun, 18, False),
    "ddim": Sampler(ddim, 50, True),
    "dpmpp": Sampler(dpmpp_2m, 20, False),
    "em": Sampler(euler_maruyama, 200, True),
    "ancestral": Sampler(ancestral, 200, False),
}


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples (n, *event), and their labels (n,) if there are classes."""

    x: Tensor
    labels: Tensor | None

    def save(self, file: Path, form: Form) -> None:
        """Write an npz in the data's own units: whole, or not at all."""
        arrays = {"x": form.restore(self.x.cpu()).numpy()}
        if self.labels is not None:
            arrays["labels"] = self.labels.cpu().numpy()
        with whole_file(file) as part, part.open("wb") as out:
            np.savez(out, **arrays)  # type: ignore[arg-type]


def sampler_grid(schedule: Schedule, sampler: str, steps: int) -> Tensor:
    """Times (steps + 1,) for a sampler: Karras et al.'s where alpha is 1, and for heun; equal steps in log-SNR for dpmpp, else in t.

    Example
    -------
    >>> from sdesens.diffusion import EDM
    >>> sampler_grid(EDM(), "heun", 3)
    tensor([8.0000e+01, 2.5152e+00, 2.0000e-03, 0.0000e+00], dtype=torch.float64)
    """
    first = FIRST_TIME * schedule.t_max
    with torch.no_grad():
        always_one = bool(schedule.alpha(schedule.t_max) == 1)
        r_min = max(LEAST_RATIO, float(schedule.ratio(torch.tensor(first, dtype=torch.float64))))
        if always_one or sampler == "heun":
            return edm_grid(schedule, steps, r_min=r_min)
        if sampler == "dpmpp":
            return log_snr_grid(schedule, steps, t_start=float(edm_grid(schedule, 2, r_min=r_min)[0]))
        return uniform_grid(schedule, steps, t_start=float(edm_grid(schedule, 2, r_min=r_min)[0]))


def draw_samples(
    denoiser: Denoiser,
    form: Form,
    n: int,
    *,
    sampler: str = "heun",
    steps: int | None = None,
    label: int | None = None,
    guidance: float = 1.0,
    eta: float | None = None,
    seed: int = 0,
) -> Samples:
    """Samples of a trained network.

    Parameters
    ----------
    denoiser : Denoiser
        As of `Run.denoiser`; samples are drawn where its weights are.
    form : Form
        Of the data.
    n : int
    sampler : {"heun", "ddim", "dpmpp", "em", "ancestral"}
    steps : int, optional
        The sampler's usual number if left out: heun 18, ddim 50, dpmpp 20, em and ancestral 200.
    label : int, optional
        One class for all; left out, the classes in turn.
    guidance : float
        1 is plain conditional sampling.
    eta : float, optional
        Noise level of em (default 1) and ddim (default 0).
    seed : int

    Raises
    ------
    ArgumentError, ArgumentTypeError
        For an unknown sampler or class, guidance of a model without classes, or a bad number.

    Example
    -------
    >>> from sdesens.training.config import recipe
    >>> from sdesens.training.data import load_data
    >>> from sdesens.training.model import make_denoiser
    >>> form = load_data("gmm8").form
    >>> draw_samples(make_denoiser(recipe("gmm8"), form), form, 3, steps=4).x.shape
    torch.Size([3, 2])
    """
    if not isinstance(sampler, str) or sampler not in SAMPLERS:
        raise ArgumentError(f"`sampler` must be one of {', '.join(SAMPLERS)}, got {sampler!r}.")
    whole("n", n, hint="it is a number of samples")
    guidance = number("guidance", guidance, hint="1 is plain conditional sampling")
    labels = _labels(form, n, label, guidance)
    walk, usual, takes_eta = SAMPLERS[sampler]
    if eta is not None:
        if not takes_eta:
            raise ArgumentError(f"`eta` is for em and ddim, and `sampler` is {sampler!r}: leave it out.")
        walk = partial(walk, eta=number("eta", eta, 0.0, ends=True, hint="0 is the ODE"))
    grid = sampler_grid(denoiser.schedule, sampler, usual if steps is None else steps)
    many = max(1, MOST_AT_ONCE // math.prod(form.event))
    device, found = next(iter(denoiser.weights.values())).device, []
    with torch.no_grad():
        for first in range(0, n, many):
            count = min(many, n - first)
            start = prior(denoiser.schedule, count, form.event, seed=seed, first_path=first, device=device)
            some = None if labels is None else labels[first : first + count].to(device)
            model = _conditional(denoiser, some, guidance)
            found.append(walk(model, start, grid, seed=seed, first_path=first))
    return Samples(torch.cat(found).cpu(), labels)


def _labels(form: Form, n: int, label: int | None, guidance: float) -> Tensor | None:
    if not form.classes:
        if label is not None or guidance != 1.0:
            raise ArgumentError("`label` and `guidance` are for a model with classes: its data had no labels.")
        return None
    if label is None:
        return torch.arange(n) % form.classes
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < form.classes:
        raise ArgumentError(f"`label` must be a class of the data, 0 ... {form.classes - 1}, got {label!r}.")
    return torch.full((n,), label)


def _conditional(denoiser: Denoiser, labels: Tensor | None, guidance: float) -> Predictor:
    if labels is None:
        return denoiser
    return denoiser.given(labels) if guidance == 1.0 else guide(denoiser, guidance, labels)
