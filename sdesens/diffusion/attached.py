"""Whether a predictor is a differentiable function of its rows, each by itself, as a divergence takes for granted."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sdesens.diffusion.conversions import combination
from sdesens.diffusion.draws import item_normals
from sdesens.diffusion.predict import Denoiser, Predictor
from sdesens.diffusion.streams import PROBES
from sdesens.errors import DetachedError, NotAFunctionError


def check_networks(denoiser: Predictor, x: Tensor) -> None:
    """Raise unless every network is a differentiable function of its row alone."""
    t, x = denoiser.schedule.t_max / 2, x.detach().clone()
    others_moved = torch.cat((x[:1], x[1:] + 1))
    for network in _networks(denoiser):
        with torch.enable_grad():
            here = x.clone().requires_grad_()
            out = network.raw(here, t)
            if not out.requires_grad or torch.autograd.grad(out.sum(), here, allow_unused=True)[0] is None:
                raise DetachedError(
                    "the network's result is cut off from x, and its part of the divergence would be missing: take torch.no_grad(), "
                    "inference_mode or detach() out of it."
                )
            again = network.raw(others_moved, t)
        close = 100 * torch.finfo(x.dtype).eps * (1 + out[0].abs().max())
        if bool(((again[0] - out[0]).abs() > close).any()):
            raise NotAFunctionError(
                "the network gives one row two values, so it is random, or depends on the other rows: net.eval() turns off dropout and "
                "batch statistics."
            )


def _networks(predictor: Predictor) -> Iterator[Denoiser]:
    """The networks in a predictor, inside wrappers too."""
    if isinstance(predictor, Denoiser):
        yield predictor
    for name in ("inner", "conditional", "unconditional"):
        branch = getattr(predictor, name, None)
        if isinstance(branch, Predictor):
            yield from _networks(branch)


def check_derivative(denoiser: Predictor, x: Tensor) -> None:
    """Raise DetachedError if autograd misses a part of the velocity's derivative in x, which central differences see."""
    t, x = denoiser.schedule.t_max / 2, x.detach().clone()
    v, w = torch.where(item_normals(x, 2, 0, 0, PROBES) > 0, 1.0, -1.0).to(x.dtype)
    h = torch.finfo(x.dtype).eps ** (1 / 3) * (1 + x.abs().max())
    with torch.enable_grad():
        here = x.requires_grad_()
        out = (denoiser.velocity(here, t) * w).sum()
        pulled = torch.autograd.grad(out, here, allow_unused=True)[0] if out.requires_grad else None
        pulled = torch.zeros_like(x) if pulled is None else pulled.detach()
    with torch.no_grad():
        x = x.detach()
        moved = (denoiser.velocity(x + h * v, t) - denoiser.velocity(x - h * v, t)) / (2 * h)
    by_autograd, by_differences = ((a * b).flatten(1).sum(1).abs() for a, b in ((pulled, v), (moved, w)))
    apart = ((pulled * v) - (moved * w)).flatten(1).sum(1).abs().sum()
    a, b = combination("velocity", denoiser.schedule, denoiser.schedule.time(t))
    rounding = 100 * torch.finfo(x.dtype).eps ** (2 / 3) * (a.abs() + b.abs()).item() * x.numel()
    if bool(apart > 0.05 * (by_autograd + by_differences).sum() + rounding):  # differences and kinks leave far less
        raise DetachedError(
            "the velocity moves with x in a way that autograd does not see, and its divergence would be wrong: look for detach(), "
            "torch.no_grad() or numpy in the predictor."
        )
