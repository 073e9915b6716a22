"""Times for a sampler to walk along: N + 1 of them, falling, for N steps.

    uniform    equal steps in t
    log-SNR    equal steps in lambda, for DPM-Solver++
    EDM        r_i = (r_max^(1/rho) + i/(N-1) (r_min^(1/rho) - r_max^(1/rho)))^rho,  r_N = 0,   r = sigma/alpha        (1)

(1): T. Karras et al., 2206.00364. Any other falling times will do: samplers walk pairs of neighbours and have no stride of their own.
"""

import torch
from torch import Tensor

from sdesens.diffusion.checks import number, whole
from sdesens.diffusion.schedule import Schedule, check_schedule
from sdesens.errors import ArgumentError, ArgumentTypeError, GridError, ShapeError
from sdesens.tensors import describe


def uniform_grid(
    schedule: Schedule, n_steps: int, *, t_min: float | None = None, t_start: float | None = None
) -> Tensor:
    """Equal steps in t from t_start (t_max) to t_min (t_max / 1000), shape (n_steps + 1,), float64.

    Example
    -------
    >>> from sdesens.diffusion import VP
    >>> uniform_grid(VP(), 4, t_min=0.0)
    tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000], dtype=torch.float64)
    """
    start, end = _ends(schedule, n_steps, t_min, t_start)
    return torch.linspace(start, end, n_steps + 1, dtype=torch.float64)


def log_snr_grid(
    schedule: Schedule, n_steps: int, *, t_min: float | None = None, t_start: float | None = None
) -> Tensor:
    """Equal steps in log-SNR from t_start (t_max) to t_min (t_max / 1000), shape (n_steps + 1,), float64.

    Raises
    ------
    GridError
        If the log-SNR is infinite at one of the two.

    Example
    -------
    >>> from sdesens.diffusion import VP
    >>> VP().log_snr(log_snr_grid(VP(), 2, t_min=0.1)).diff().diff().abs() < 1e-9
    tensor([True])
    """
    ends = torch.tensor(_ends(schedule, n_steps, t_min, t_start), dtype=torch.float64)
    with torch.no_grad():
        low, high = schedule.log_snr(ends).tolist()
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise GridError(
                f"the log-SNR is {low:g} at t = {float(ends[0]):g} and {high:g} at {float(ends[1]):g}: equal steps need both finite; give `t_start` "
                "= schedule.t_of_log_snr(-20), `t_min` > 0."
            )
        t = schedule.t_of_log_snr(torch.linspace(low, high, n_steps + 1, dtype=torch.float64))
    t[0], t[-1] = ends
    return t


def edm_grid(
    schedule: Schedule, n_steps: int, *, r_min: float = 0.002, r_max: float | None = None, rho: float = 7.0
) -> Tensor:
    """Equation (1), shape (n_steps + 1,), float64; it ends at t = 0.

    Parameters
    ----------
    r_min, r_max : float
        Noise-to-signal ratios sigma/alpha of the last time above 0 and of the first; r_max is that of t_max if left out, and at
        most 80 where no signal is left there.
    rho : float

    Example
    -------
    >>> from sdesens.diffusion import EDM
    >>> edm_grid(EDM(), 3)
    tensor([8.0000e+01, 2.5152e+00, 2.0000e-03, 0.0000e+00], dtype=torch.float64)
    """
    check_schedule("schedule", schedule)
    whole("n_steps", n_steps, 2, hint="the last step of this grid goes to 0")
    with torch.no_grad():
        if r_max is None:
            top = -schedule.log_snr(schedule.t_max) / 2
            r_max = top.exp().item() if top.item() < 10 else 80.0
        if not (0 < r_min < r_max and rho > 0):
            raise ArgumentError(
                f"`r_min`, `r_max` and `rho` must satisfy 0 < r_min < r_max and rho > 0, got {r_min!r}, {r_max!r}, {rho!r}: 0.002, 80 and 7 are usual."
            )
        i = torch.linspace(0, 1, n_steps, dtype=torch.float64)
        r = (r_max ** (1 / rho) + i * (r_min ** (1 / rho) - r_max ** (1 / rho))) ** rho
        t = schedule.t_of_log_snr(-2 * torch.log(r))
        if not bool((t.diff() < 0).all() and t[-1] > 0):
            raise ArgumentError(
                f"noise levels from {r_max:g} down to {r_min:g} do not all lie within {schedule!r}: choose `r_min` and `r_max` inside its range."
            )
    return torch.cat((t, t.new_zeros(1)))


def check_grid(schedule: Schedule, grid) -> Tensor:
    """The grid as a float64 tensor (N + 1,); raise GridError unless it falls within [0, t_max]."""
    grid = schedule.time(grid).cpu()
    if grid.requires_grad:
        raise ArgumentTypeError("`grid` requires a gradient, and would get none: use grid.detach().")
    if grid.dim() != 1 or grid.numel() < 2:
        raise ShapeError(
            f"`grid` must hold at least two times, shape (N + 1,), got {describe(grid)}: uniform_grid(schedule, N) makes one."
        )
    if not bool((grid.diff() < 0).all()):
        i = int((~(grid.diff() < 0)).nonzero()[0])
        raise GridError(
            f"`grid` must fall, from noise to data, but grid[{i}] = {float(grid[i]):.6g} is followed by {float(grid[i + 1]):.6g}: flip it, or drop repeats."
        )
    return grid


def _ends(schedule: Schedule, n_steps, t_min, t_start) -> tuple[float, float]:
    whole("n_steps", n_steps, hint="it is a number of steps")
    check_schedule("schedule", schedule)
    start = schedule.t_max if t_start is None else number("t_start", t_start, hint="it is a time")
    end = 1e-3 * schedule.t_max if t_min is None else number("t_min", t_min, hint="it is a time")
    if not 0 <= end < start <= schedule.t_max:
        raise GridError(
            f"`t_min` and `t_start` must satisfy 0 <= t_min < t_start <= {schedule.t_max:g}, got {end!r} and {start!r}: t_max = {schedule.t_max:g} is the noise."
        )
    return start, end
