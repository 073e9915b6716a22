"""The randomness of training, as a pure function of (seed, step, item).

An item is an index in the *global* batch, never in that of a rank. Item i of step k has the Philox path

    path = 2^32 k + i,      i < 2^32,   k < 2^31,                                                 (1)

on one stream a purpose. So a run resumes from its step alone, and neither the number of ranks nor the accumulation of
gradients changes a number. Times are stratified over the global batch of N items,

    u_i = ((i + r) mod N + v_i) / N,      v_i uniform in (0, 1),      r uniform in {0, ..., N - 1}, one a step:      (2)

one in each N-th of (0, 1), which takes the variance of a mean over the batch from order 1/N to 1/N^3 (but for what other
draws add). The turn r makes every item's own u uniform, so that no item is bound to one noise level by its place.

References: D. Kingma et al., NeurIPS 2021 (arXiv 2107.00630), low-discrepancy times; T. Karras et al., 2206.00364, log-normal
noise levels.
"""

import math

import torch
from torch import Tensor

from sdesens.diffusion.checks import number, whole
from sdesens.diffusion.schedule import Schedule, check_schedule
from sdesens.diffusion.streams import DROP, NOISE, TIMES, TURN
from sdesens.diffusion.summary import FIRST_TIME
from sdesens.errors import ArgumentError, ArgumentTypeError, DtypeError, GridError, ShapeError
from sdesens.noise import Philox
from sdesens.tensors import concrete, describe

ITEMS, STEPS = 2**32, 2**31


def draw_noise(
    seed: int, step: int | range, shape, *, first_item: int = 0, dtype: torch.dtype = torch.float32, device="cpu"
) -> Tensor:
    """Standard normals of the items first_item ... first_item + B - 1 at a step.

    Parameters
    ----------
    seed : int
    step : int, or range of neighbouring steps
        0 ... 2^31 - 1. Small batches are drawn faster for several steps at once.
    shape : (B, *event)
    first_item : int
        Index of the first row in the global batch.
    dtype, device
        On every device and in every dtype the same numbers, to rounding.

    Returns
    -------
    Tensor, shape (B, *event), or (steps, B, *event) for a range

    Raises
    ------
    ArgumentTypeError, ArgumentError, ShapeError, DtypeError
        Unless seed, step and index are ints in their range, the shape has a B, the dtype is floating.

    Example
    -------
    >>> batch = draw_noise(7, 1000, (4, 3))
    >>> bool((draw_noise(7, 1000, (2, 3), first_item=2) == batch[2:]).all())
    True
    """
    if not isinstance(shape, tuple | list):
        raise ArgumentTypeError(
            f"`shape` must be a tuple (B, *event), got {shape!r:.60}: give the number of items first."
        )
    if not shape:
        raise ShapeError("`shape` must be (B, *event), got (): give the number of items first.")
    n, *event = (whole("shape", size, 0, hint="it is a size") for size in shape)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise DtypeError(f"`dtype` must be a floating dtype such as torch.float32, got {dtype!r:.60}.")
    z = _normals(seed, NOISE, step, first_item, n, math.prod(event), dtype, device)
    return z.reshape(*z.shape[:-1], *event)


def draw_uniforms(seed: int, step: int | range, n: int, *, first_item: int = 0, total: int | None = None) -> Tensor:
    """Uniform numbers in (0, 1) of the items first_item ... first_item + n - 1, stratified over the global batch, equation (2).

    Parameters
    ----------
    seed, step, first_item : int
        See `draw_noise`.
    n : int
        Items wanted here.
    total : int
        Items in the global batch: ranks x accumulation x items a rank. May be left out where n is all of them.

    Returns
    -------
    Tensor, shape (n,), or (steps, n) for a range, float64, on the CPU: to check a time there makes no device wait

    Example
    -------
    >>> u = draw_uniforms(7, 0, 4)
    >>> sorted((4 * u).floor().tolist())
    [0.0, 1.0, 2.0, 3.0]
    """
    if total is None and first_item:
        raise ArgumentError(
            f"`total` is missing: with `first_item` = {first_item} say how many items the global batch has."
        )
    v = _uniforms(seed, TIMES, step, first_item, n)
    total = n if total is None else whole("total", total, 0, ITEMS)
    if first_item + n > total:
        raise ArgumentError(
            f"items {first_item} ... {first_item + n - 1} do not fit in a global batch of `total` = {total}: raise it."
        )
    turn = (_uniforms(seed, TURN, step, 0, 1) * total).floor()  # (1,) or (steps, 1)
    place = torch.arange(first_item, first_item + n, dtype=torch.float64)
    return ((place + turn) % total + v) / total


def keep_label(seed: int, step: int | range, n: int, rate: float, *, first_item: int = 0) -> Tensor:
    """Which items keep their condition where each is dropped with probability `rate`, for classifier-free guidance.

    Returns
    -------
    Tensor, shape (n,), or (steps, n) for a range, bool, on the CPU

    Example
    -------
    >>> keep_label(7, 0, 3, 0.0)
    tensor([True, True, True])
    """
    rate = number("rate", rate, 0.0, 1.0, ends=True, hint="it is the probability that a label is dropped")
    return _uniforms(seed, DROP, step, first_item, n) >= rate


def uniform_times(schedule: Schedule, u: Tensor, t_min: float | None = None) -> Tensor:
    """Times spread evenly over [t_min, t_max].

    Parameters
    ----------
    schedule : Schedule
    u : Tensor, shape (B,)
        Uniform in (0, 1), such as `draw_uniforms`.
    t_min : float, optional
        Default 1e-5 t_max.

    Returns
    -------
    Tensor, shape (B,), float64

    Example
    -------
    >>> from sdesens.diffusion import EDM
    >>> uniform_times(EDM(), torch.tensor([0.5]), t_min=0.0)
    tensor([40.], dtype=torch.float64)
    """
    t_min, u = first_time(schedule, t_min), check_uniform(u)
    return t_min + u * (schedule.t_max - t_min)


def lognormal_times(
    schedule: Schedule,
    u: Tensor,
    mean: float = -1.2,
    std: float = 1.2,
    sigma_data: float = 0.5,
    t_min: float | None = None,
) -> Tensor:
    """Times at which the noise level r = sigma/alpha is log-normal: log r ~ N(mean + log(sigma_data/0.5), std^2).

    The default is Karras et al.'s, on any schedule. A level that the schedule does not reach within [t_min, t_max] becomes
    that end: all of its probability sits there. Look at `schedule.summary()` for the range; std = 1.2 wants log-SNR from about
    10 to -5 for data of standard deviation 0.5.

    Parameters
    ----------
    schedule, u, t_min
        See `uniform_times`.
    mean, std : float
    sigma_data : float
        Standard deviation of the data.

    Returns
    -------
    Tensor, shape (B,), float64

    Example
    -------
    >>> from sdesens.diffusion import EDM
    >>> round(float(lognormal_times(EDM(), torch.tensor([0.5])).log()), 6)
    -1.2
    """
    mean, std = number("mean", mean, hint="it is that of log r"), number("std", std, 0.0, hint="it is that of log r")
    sigma_data = number("sigma_data", sigma_data, 0.0, hint="it is the data's standard deviation")
    t_min = first_time(schedule, t_min)
    log_r = mean + math.log(sigma_data / 0.5) + std * torch.special.ndtri(check_uniform(u))
    return schedule.t_of_log_snr(-2 * log_r).clamp(t_min, schedule.t_max)


def first_time(schedule: Schedule, t_min: float | None, *, allow_zero: bool = True) -> float:
    """t_min, by default 1e-5 t_max; raise GridError unless it lies in [0, t_max), or (0, t_max)."""
    check_schedule("schedule", schedule)
    if t_min is None:
        return FIRST_TIME * schedule.t_max
    hint = f"{FIRST_TIME:g} t_max is usual"
    t = number("t_min", t_min, hint=hint)
    if not (0 < t < schedule.t_max or (allow_zero and t == 0)):
        raise GridError(f"`t_min` must lie in {'[' if allow_zero else '('}0, {schedule.t_max:.6g}), got {t!r}: {hint}.")
    return t


def item_normals(x: Tensor, n: int, seed: int, first_item: int, stream: int) -> Tensor:
    """n normals an entry, (n, B, *event), float64: row i's are a function of (seed, first_item + i) alone."""
    whole("first_item", first_item, 0, hint="it is the index of the first row")
    z = Philox(seed, stream).normals(first_item, len(x), 0, n, x[0].numel(), dtype=torch.float64, device=x.device)
    return z.reshape(n, *x.shape)


def _normals(seed, stream, step, first_item, n, dim=1, dtype=torch.float64, device="cpu") -> Tensor:
    """Normals by equation (1), (n, dim), or (steps, n, dim) for a range of steps."""
    if isinstance(step, range):
        if step.step != 1 or not 0 <= step.start < step.stop <= STEPS:
            raise ArgumentError(f"`step` must be a range of neighbouring steps in 0 ... 2^31 - 1, got {step!r}.")
    else:
        whole("step", step, 0, STEPS - 1)
    whole("first_item", first_item, 0, ITEMS - 1)
    whole("n", n, 0, ITEMS - first_item, hint="the global batch has at most 2^32 items")
    steps = step if isinstance(step, range) else range(step, step + 1)
    items = first_item + torch.arange(n, dtype=torch.int64, device=device)
    paths = (torch.arange(steps.start, steps.stop, dtype=torch.int64, device=device) << 32)[:, None] + items
    z = Philox(seed, stream).at(paths.flatten(), 0, 1, dim, dtype)[0].reshape(len(steps), n, dim)
    return z if isinstance(step, range) else z[0]


def _uniforms(seed, stream, step, first_item, n) -> Tensor:
    """Independent uniforms, (n,), or (steps, n) for a range of steps."""
    return torch.special.ndtr(_normals(seed, stream, step, first_item, n)[..., 0])


def check_items(name: str, x, *, dims: int = 2, floating: bool = True) -> None:
    """Raise unless x is (B, *event), real, of so many dims at least and not empty; and floating, if it has to be."""
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(
            f"`{name}` must be a tensor (B, *event), got {type(x).__name__}: use torch.tensor(...)."
        )
    if x.is_complex() or (floating and not x.is_floating_point()):
        raise DtypeError(
            f"`{name}` must be {'floating' if floating else 'real'}, got {x.dtype}: scale the data to order 1 and convert them; for the "
            "likelihood of data on a grid see `dequantise`."
        )
    if x.dim() < dims or not x.numel():
        raise ShapeError(
            f"`{name}` must have shape (B, *event), not empty, got {tuple(x.shape)}: {name}[:, None] for numbers."
        )


def check_uniform(u) -> Tensor:
    """u in float64; raise unless it is a floating tensor of numbers in [0, 1]."""
    if not isinstance(u, Tensor) or not u.is_floating_point():
        raise ArgumentTypeError(f"`u` must be a floating tensor of numbers in (0, 1), got {describe(u)}.")
    if concrete(u) and not bool(((u >= 0) & (u <= 1)).all()):
        raise ArgumentError(f"`u` must hold numbers in (0, 1), got {float(u.min()):g} ... {float(u.max()):g}.")
    return u.to(torch.float64)
