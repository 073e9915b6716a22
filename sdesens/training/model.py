"""A run's network, what it predicts, and its loss, from the configuration and the form of the data."""

import torch
from torch import Tensor, nn

from sdesens.diffusion.losses import dsm_loss
from sdesens.diffusion.predict import Denoiser
from sdesens.diffusion.weights import Weight, edm_weight, likelihood_weight, min_snr_weight, simple_weight
from sdesens.training.batches import Batch
from sdesens.training.config import TrainConfig
from sdesens.training.data import Form
from sdesens.training.networks import make_network


def make_denoiser(config: TrainConfig, form: Form, net: nn.Module | None = None) -> Denoiser:
    """The denoiser of a configuration, around a network; around a new one with the seed's initial weights if none is given.

    Raises
    ------
    ArgumentError, ShapeError
        If network, schedule, prediction and data do not go together.

    Example
    -------
    >>> from sdesens.training.config import recipe
    >>> from sdesens.training.data import load_data
    >>> make_denoiser(recipe("gmm8"), load_data("gmm8").form)
    Denoiser(ResidualMLP of ... parameters, EDM(sigma_max=80), sigma_data=1.4...)
    """
    preconditioned = config.prediction == "edm"
    return Denoiser(
        network_of(config, form) if net is None else net,
        config.make_schedule(),
        prediction=None if preconditioned else config.prediction,
        sigma_data=form.sigma_data if preconditioned else None,
        null=torch.tensor(form.classes) if form.classes else None,
    )


def network_of(config: TrainConfig, form: Form) -> nn.Module:
    """A new network, with the seed's initial weights."""
    return make_network(
        config.network,
        form.event,
        config.width,
        config.depth,
        classes=form.classes,
        norm=config.norm,
        schedule=None if config.prediction == "edm" else config.make_schedule(),
        seed=config.seed,
    )


def loss_weight(config: TrainConfig, sigma_data: float) -> Weight:
    """The weight on the eps-error; "auto" is weight 1 on what a preconditioned network or one that predicts v returns."""
    name = config.weight
    if name == "auto":
        name = {"edm": "edm", "v": "v"}.get(config.prediction, "simple")
    if name == "edm":
        return edm_weight(sigma_data)
    if name == "v":
        return edm_weight(1.0)  # 1 + 1/SNR
    return {"simple": simple_weight, "min_snr": min_snr_weight(), "likelihood": likelihood_weight}[name]


def batch_loss(denoiser: Denoiser, batch: Batch, weight: Weight, *, bf16: bool = False) -> Tensor:
    """The loss of each item (b,): a pure function, for this trainer or any other."""
    given = denoiser if batch.label is None else denoiser.given(batch.label)
    with torch.autocast(batch.x0.device.type, torch.bfloat16, enabled=bf16):
        return dsm_loss(given, batch.x0, batch.t, batch.eps, weight=weight).loss
