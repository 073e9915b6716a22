"""Schedulers and networks of diffusers (0.42), to and from.

diffusers keeps abar = alpha^2 as a float32 product of T factors, each off by up to 2^-24. That is nothing to alpha, but near the
data sigma^2 = 1 - abar is small: sigma_0 of DDPM is wrong by 1e-4 of itself. Here tables are float64, and betas are those of
`scheduler_view.py`. Only `to_diffusers` imports diffusers.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sdesens.diffusion.schedule import Schedule
from sdesens.diffusion.scheduler_view import config_of
from sdesens.diffusion.tables import Discrete, Table
from sdesens.errors import ArgumentError, ArgumentTypeError, DtypeError, SdesensError

NEEDED = {"num_train_timesteps", "trained_betas", "prediction_type"}


def to_diffusers(
    schedule: Schedule, T: int = 1000, prediction: str = "eps", scheduler: Callable | None = None, **options
):
    """A scheduler of diffusers with the betas of the schedule.

    Defaults that bite are off: x_0 is not clipped to [-1, 1], and sampling in few steps starts at pure noise ("trailing").

    Parameters
    ----------
    schedule : Schedule
        One that preserves the variance.
    T : int
        How many steps the model is trained on.
    prediction : {"eps", "x0", "v"}
        What the network returns; diffusers says "epsilon", "sample", "v_prediction".
    scheduler : callable, optional
        Its class; DDPMScheduler if left out.
    **options
        Other settings of the class.

    Returns
    -------
    object of that class

    Raises
    ------
    ArgumentError
        For any other schedule or prediction, and for "eps" where no signal is left at the end.
    ArgumentTypeError
        For what is no schedule, no int or no scheduler's class.
    SdesensError
        Without diffusers.

    Example
    -------
    >>> from sdesens.diffusion import VP
    >>> to_diffusers(VP(), 500, "v").config.prediction_type
    'v_prediction'
    """
    config = config_of(schedule, T, prediction)
    make = _ddpm() if scheduler is None else scheduler
    takes = inspect.signature(make).parameters if callable(make) else {}
    if not takes.keys() >= NEEDED:
        raise ArgumentTypeError(
            f"`scheduler` must be a class that takes {', '.join(sorted(NEEDED))}, got {make!r:.80}: DDIMScheduler, for one."
        )
    made = make(**{**{k: v for k, v in config.items() if k in takes}, **options})
    held, middle = getattr(made, "alphas_cumprod", None), T // 2
    if isinstance(held, Tensor):  # float32 is good to 1e-3 of the log-SNR there
        gap = torch.logit(held[middle].double()) - schedule.log_snr(Discrete(schedule, T).times[middle])
        if not abs(gap.item()) < 1e-2:
            raise ArgumentError(
                f"{type(made).__name__} makes another schedule of these betas, log-SNR off by {gap.item():.3g}: look at its options."
            )
    return made


def _ddpm() -> Callable:
    try:
        from diffusers import DDPMScheduler
    except ImportError as error:
        raise SdesensError("DDPMScheduler comes with diffusers: pip install 'sdesens[diffusers]'.") from error
    return DDPMScheduler


def from_diffusers(scheduler) -> Table:
    """The schedule behind a scheduler of diffusers, exact at its indices.

    The product of 1 - beta is taken anew in float64: for DDPM it differs from their alphas_cumprod by 2e-7 in alpha and, near the
    data, by 8e-5 in sigma, relatively. Without betas, or where the two differ by more than a float32 product can, T 2^-23,
    theirs is taken. No signal at the end (`rescale_betas_zero_snr`) is kept.

    Parameters
    ----------
    scheduler : object
        One with a tensor `alphas_cumprod` (T,), and `betas` at best.

    Returns
    -------
    Table

    Raises
    ------
    ArgumentTypeError
        Without alphas_cumprod.
    ArgumentError, ShapeError
        If they do not fall within [0, 1).

    Example
    -------
    >>> from sdesens.diffusion import VP, SchedulerView
    >>> bool((from_diffusers(SchedulerView(VP())).log_snr(0.5) - VP().log_snr(0.5)).abs() < 1e-12)
    True
    """
    held, betas = getattr(scheduler, "alphas_cumprod", None), getattr(scheduler, "betas", None)
    if not isinstance(held, Tensor):
        raise ArgumentTypeError(
            f"`scheduler` must have a tensor `alphas_cumprod`, {type(scheduler).__name__} has none: flow matching is CondOT()."
        )
    held = held.detach().cpu().double()
    if isinstance(betas, Tensor) and betas.shape == held.shape:
        table = Table.from_betas(betas.detach().cpu())
        if bool(_alike(table.alphas_cumprod, held).all()):
            return table
    return Table(held)


def _alike(exact: Tensor, held: Tensor) -> Tensor:
    """Where a float32 product of T factors is this one; some classes hold 2^-24 where no signal is left."""
    close = (exact - held).abs() <= len(held) * 2**-23 * exact
    close[-1] |= (exact[-1] < 2**-30) & (held[-1] <= 2**-24)
    return close


class IndexedUNet(nn.Module):
    """See `wrap_unet`."""

    def __init__(self, unet: nn.Module, discrete: Discrete):
        super().__init__()
        self.unet, self.discrete = unet, discrete

    def forward(self, x: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        """What the network returns at states x (B, *event) and times t (B,), (B, *event)."""
        if torch.finfo(t.dtype).eps / 4 * self.discrete.T >= 0.5:
            raise DtypeError(
                f"`t` in {t.dtype} cannot tell {self.discrete.T} indices apart: keep states in float32, autocast the network."
            )
        t = t.double().clamp(max=self.discrete.schedule.t_max)  # half precision may round it beyond
        out = self.unet(x, self.discrete.index(t), *cond)
        return getattr(out, "sample", out)


def wrap_unet(unet: nn.Module, schedule: Schedule, T: int = 1000) -> IndexedUNet:
    """A UNet of diffusers as a network (x, t) or (x, t, cond) for `Denoiser`, called at the index nearest to t.

    Parameters
    ----------
    unet : nn.Module
        Called as unet(x, index) or unet(x, index, cond), index (B,); returns an object with `sample`. cond are the class labels of
        UNet2DModel, the hidden states of UNet2DConditionModel. Its parameters are called "unet.<name>".
    schedule : Schedule
    T : int
        How many steps it was trained on.

    Raises
    ------
    ArgumentTypeError, ArgumentError
        If the three are no module, no schedule, no positive int. DtypeError when called at times too coarse to tell T indices apart.

    Example
    -------
    >>> from diffusers import UNet2DModel
    >>> from sdesens.diffusion import VP, Denoiser
    >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
    ...                    up_block_types=("UpBlock2D",), add_attention=False)
    >>> Denoiser(wrap_unet(unet, VP()), VP(), "eps").x0(torch.ones(2, 1, 8, 8), 0.5).shape
    torch.Size([2, 1, 8, 8])
    """
    if not isinstance(unet, nn.Module):
        raise ArgumentTypeError(f"`unet` must be an nn.Module, got {type(unet).__name__}.")
    return IndexedUNet(unet, Discrete(schedule, T))
