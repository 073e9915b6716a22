"""Whether a predictor is a differentiable function of its rows, each by itself, as a divergence takes for granted."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sdesens.diffusion.conversions import combination
from sdesens.diffusion.draws import item_normals
from sdesens.diffusion.predict import Denoiser, Predictor
from sdesens.diffusion.streams import PROBES
from sdesens.diffusion.values import like
from sdesens.errors import DetachedError, NotAFunctionError


def check_networks(denoiser: Predictor, x: Tensor) -> None:
    """Raise unless every network is a differentiable function of its row alone."""
    t, x = denoiser.schedule.t_max / 2, x.detach().clone()
    others_moved = torch.cat((x[:1], x[1:] + 1))
    for network in networks(denoiser):
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


def networks(predictor: Predictor) -> Iterator[Denoiser]:
    """The networks in a predictor, inside wrappers too."""
    if isinstance(predictor, Denoiser):
        yield predictor
    for name in ("inner", "conditional", "unconditional"):
        branch = getattr(predictor, name, None)
        if isinstance(branch, Predictor):
            yield from networks(branch)


def check_derivative(denoiser: Predictor, x: Tensor) -> None:
    """Raise DetachedError if autograd misses a part of the velocity's derivative in x, which central differences see.

    At noised data, along one direction, with three steps: a part that is missing is missing in all of them and in most rows, while
    kinks, steepness and rounding spoil one or another.
    """
    t = denoiser.schedule.t_max / 2
    z, v, w = item_normals(x, 3, 0, 0, PROBES).to(x.dtype)
    x, v, w = denoiser.schedule.reparameterise(x.detach(), t, z), torch.sign(v), torch.sign(w)
    with torch.enable_grad():
        here = x.clone().requires_grad_()
        out = (denoiser.velocity(here, t) * w).sum()
        pulled = torch.autograd.grad(out, here, allow_unused=True)[0] if out.requires_grad else None
    along = torch.zeros_like(x) if pulled is None else pulled * v
    a, b = combination("velocity", denoiser.schedule, denoiser.schedule.time(t))
    eps, size, by_autograd = torch.finfo(x.dtype).eps, (a.abs() + b.abs()).item(), along.flatten(1).sum(1)
    apart = []
    for share in (1.0, 1 / 8, 1 / 64):
        h = share * eps ** (1 / 3) * (1 + x.abs().flatten(1).amax(1))
        step = like(h, x) * v
        with torch.no_grad():
            moved = (denoiser.velocity(x + step, t) - denoiser.velocity(x - step, t)) * w
        by_differences = moved.flatten(1).sum(1) / (2 * h)
        rounding = 10 * eps / h * size * x[0].numel() * (1 + x.abs().flatten(1).amax(1))
        off = (by_autograd - by_differences).abs() - rounding
        apart.append(off / (by_autograd.abs() + by_differences.abs() + rounding))
    if bool(torch.stack(apart).amin(0).median() > 0.03):
        raise DetachedError(
            "the velocity moves with x in a way that autograd does not see, and its divergence would be wrong: look for detach(), "
            "torch.no_grad() or numpy in the predictor."
        )
