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

from sdesens.diffusion.schedule import Schedule
from sdesens.errors import ArgumentError, ArgumentTypeError, DtypeError, GridError, ShapeError
from sdesens.noise import Philox
from sdesens.tensors import concrete, describe

TIMES, TURN, NOISE, DROP = range(0x64736D00, 0x64736D04)  # Philox streams, away from those of paths and of probes
ITEMS, STEPS = 2**32, 2**31
FIRST_TIME = 1e-5  # of t_max: at t = 0 there is no noise to predict


def draw_noise(
    seed: int, step: int, shape, *, first: int = 0, dtype: torch.dtype = torch.float32, device="cpu"
) -> Tensor:
    """Standard normals of the items first ... first + B - 1 at a step.

    Parameters
    ----------
    seed : int
    step : int
        0 ... 2^31 - 1.
    shape : (B, *event)
    first : int
        Index of the first row in the global batch.
    dtype, device
        On every device and in every dtype the same numbers, to rounding.

    Returns
    -------
    Tensor, shape (B, *event)

    Example
    -------
    >>> whole = draw_noise(7, 1000, (4, 3))
    >>> bool((draw_noise(7, 1000, (2, 3), first=2) == whole[2:]).all())
    True
    """
    shape = torch.Size(shape)
    if not shape:
        raise ShapeError("`shape` must be (B, *event), got (): give the number of items first.")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise DtypeError(f"`dtype` must be a floating dtype such as torch.float32, got {dtype}.")
    return _normals(seed, NOISE, step, first, shape[0], shape[1:].numel(), dtype, device).reshape(shape)


def draw_uniforms(seed: int, step: int, n: int, *, first: int = 0, total: int | None = None) -> Tensor:
    """Uniform numbers in (0, 1) of the items first ... first + n - 1, stratified over the global batch, equation (2).

    Parameters
    ----------
    seed, step, first : int
        See `draw_noise`.
    n : int
        Items wanted here.
    total : int
        Items in the global batch: ranks x accumulation x items a rank. May be left out where n is all of them.

    Returns
    -------
    Tensor, shape (n,), float64, on the CPU: to check a time there makes no device wait

    Example
    -------
    >>> u = draw_uniforms(7, 0, 4)
    >>> sorted((4 * u).floor().tolist())
    [0.0, 1.0, 2.0, 3.0]
    """
    if total is None and first:
        raise ArgumentError(f"`total` is missing: with `first` = {first} say how many items the global batch has.")
    total = n if total is None else total
    _check("total", total, ITEMS + 1)
    v = _uniforms(seed, TIMES, step, first, n)
    if first + n > total:
        raise ArgumentError(f"items {first} ... {first + n - 1} do not fit in a global batch of `total` = {total}.")
    turn = (_uniforms(seed, TURN, step, 0, 1) * total).floor()
    place = torch.arange(first, first + n, dtype=torch.float64)
    return ((place + turn) % total + v) / total


def keep_label(seed: int, step: int, n: int, rate: float, *, first: int = 0) -> Tensor:
    """Which items keep their condition where each is dropped with probability `rate`, for classifier-free guidance.

    Returns
    -------
    Tensor, shape (n,), bool, on the CPU

    Example
    -------
    >>> keep_label(7, 0, 3, 0.0)
    tensor([True, True, True])
    """
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise ArgumentTypeError(f"`rate` must be a number in [0, 1], got {rate!r}.")
    if not 0 <= rate <= 1:
        raise ArgumentError(f"`rate` must lie in [0, 1], got {rate}: it is the probability that a label is dropped.")
    return _uniforms(seed, DROP, step, first, n) >= rate


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
    for name, value in (("std", std), ("sigma_data", sigma_data)):
        if not 0 < value < math.inf:
            raise ArgumentError(f"`{name}` must be positive and finite, got {value!r}.")
    t_min = first_time(schedule, t_min)
    log_r = mean + math.log(sigma_data / 0.5) + std * torch.special.ndtri(check_uniform(u))
    return schedule.t_of_log_snr(-2 * log_r).clamp(t_min, schedule.t_max)


def first_time(schedule: Schedule, t_min: float | None) -> float:
    """t_min, or its default; raise GridError unless it lies in [0, t_max)."""
    t_min = FIRST_TIME * schedule.t_max if t_min is None else float(t_min)
    if not 0 <= t_min < schedule.t_max:
        raise GridError(f"`t_min` must lie in [0, {schedule.t_max:.6g}), got {t_min!r}: 1e-5 t_max is usual.")
    return t_min


def _normals(seed, stream, step, first, n, dim=1, dtype=torch.float64, device="cpu") -> Tensor:
    """Normals by equation (1), (n, dim)."""
    _check("step", step, STEPS)
    _check("first", first, ITEMS)
    _check("n", n, ITEMS - first + 1)
    source = Philox(seed, stream)
    return source.normals((step << 32) + first, n, 0, 1, dim, dtype=dtype, device=torch.device(device))[0]


def _uniforms(seed, stream, step, first, n) -> Tensor:
    """Independent uniforms, (n,)."""
    return torch.special.ndtr(_normals(seed, stream, step, first, n)[:, 0])


def _check(name: str, value, limit: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"`{name}` must be an int, got {value!r} ({type(value).__name__}): use int(...).")
    if not 0 <= value < limit:
        raise ArgumentError(f"`{name}` must lie in 0 ... {limit - 1}, got {value}.")


def check_uniform(u) -> Tensor:
    """u in float64; raise unless it is a floating tensor of numbers in [0, 1]."""
    if not isinstance(u, Tensor) or not u.is_floating_point():
        raise ArgumentTypeError(f"`u` must be a floating tensor of numbers in (0, 1), got {describe(u)}.")
    if concrete(u) and not bool(((u >= 0) & (u <= 1)).all()):
        raise ArgumentError(f"`u` must hold numbers in (0, 1), got {float(u.min()):g} ... {float(u.max()):g}.")
    return u.to(torch.float64)
