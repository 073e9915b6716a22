"""Two small networks: a residual MLP for points and tables, a residual convolutional network for small images.

Both see the noise level as c = ln(sigma/alpha)/4, embedded by sines and cosines, and a label by a learnt vector, both of
which shift every residual block. The last layer starts at zero: an untrained network returns 0.
"""

import math

import torch
from torch import Tensor, nn

from sdesens.diffusion.schedule import Schedule
from sdesens.errors import ArgumentError, ShapeError

FREQUENCIES = 16
FARTHEST = 5.0  # ln(sigma/alpha)/4 where no signal, or no noise, is left


class Clock(nn.Module):
    """ln(sigma/alpha)/4, (B,), from what a `Denoiser` tells its network: that itself if preconditioned, else the time."""

    def __init__(self, schedule: Schedule | None):
        super().__init__()
        self.schedule = schedule

    def forward(self, t: Tensor) -> Tensor:
        if self.schedule is None:
            return t
        with torch.no_grad():
            return (-self.schedule.log_snr(t.double()) / 8).clamp(-FARTHEST, FARTHEST).to(t)


class Condition(nn.Module):
    """One vector (B, width) from the noise level and, if there are classes, the label; label `classes` means none."""

    def __init__(self, clock: Clock, classes: int, width: int):
        super().__init__()
        self.clock = clock
        self.register_buffer("frequency", torch.exp(torch.linspace(0.0, math.log(32.0), FREQUENCIES)), persistent=False)
        self.level = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width) if classes else None

    def forward(self, t: Tensor, label: Tensor | None) -> Tensor:
        angle = self.clock(t)[:, None] * self.frequency
        h = self.level(torch.cat((angle.cos(), angle.sin()), 1))
        return nn.functional.silu(h if self.label is None else h + self.label(label))


class MLPBlock(nn.Module):
    """h, and the condition c, (B, width) -> (B, width)."""

    def __init__(self, width: int, norm: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.into, self.shift, self.out = (nn.Linear(width, width) for _ in range(3))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return h + self.out(nn.functional.silu(self.into(self.norm(h)) + self.shift(c)))


class ResidualMLP(nn.Module):
    """x (B, *event), t (B,), label (B,) -> (B, *event); the event is flattened."""

    def __init__(self, event: tuple[int, ...], width: int, depth: int, *, classes: int, norm: bool, clock: Clock):
        super().__init__()
        d = math.prod(event)
        self.condition = Condition(clock, classes, width)
        self.first = nn.Linear(d, width)
        self.blocks = nn.ModuleList(MLPBlock(width, norm) for _ in range(depth))
        self.last = _zeroed(nn.Linear(width, d))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        c = self.condition(t, label)
        h = self.first(x.flatten(1))
        for block in self.blocks:
            h = block(h, c)
        return self.last(nn.functional.silu(h)).reshape(x.shape)


class ConvBlock(nn.Module):
    """h (B, width, rows, columns), and the condition c (B, width) -> the shape of h."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.into, self.out = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.shift = nn.Linear(width, width)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        inner = self.into(nn.functional.silu(self.norm(h)))
        return h + self.out(nn.functional.silu(inner + self.shift(c)[:, :, None, None]))


class ResidualConv(nn.Module):
    """x (B, channels, height, width) or (B, height, width), t (B,), label (B,) -> the shape of x; 3 x 3 convolutions."""

    def __init__(self, event: tuple[int, ...], width: int, depth: int, *, classes: int, clock: Clock):
        super().__init__()
        if len(event) not in (2, 3):
            raise ShapeError(
                f"a convolutional network needs images (height, width) or (channels, height, width), got {event}: use network mlp."
            )
        if width % 8:
            raise ArgumentError(f"`width` must be a multiple of 8 for a convolutional network, got {width}.")
        channels = event[0] if len(event) == 3 else 1
        self.condition = Condition(clock, classes, width)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(ConvBlock(width) for _ in range(depth))
        self.last = _zeroed(nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        c = self.condition(t, label)
        h = self.first(x if x.dim() == 4 else x[:, None])
        for block in self.blocks:
            h = block(h, c)
        return self.last(nn.functional.silu(h)).reshape(x.shape)


def make_network(
    kind: str,
    event: tuple[int, ...],
    width: int,
    depth: int,
    *,
    classes: int = 0,
    norm: bool = False,
    schedule: Schedule | None = None,
    seed: int = 0,
) -> nn.Module:
    """A network with initial weights from a seed; torch's global generator is left as it was.

    Parameters
    ----------
    kind : {"mlp", "conv"}
    event : tuple of int
        Shape of one item.
    width, depth : int
        Units (channels) of a hidden layer, and residual blocks.
    classes : int
        Labels are 0 ... classes - 1, and `classes` for none; 0 for data without labels.
    norm : bool
        Layer normalisation in the MLP's blocks.
    schedule : Schedule, optional
        For a network that is told the time; left out, it is told ln(sigma/alpha)/4, as a preconditioned one is.
    seed : int

    Example
    -------
    >>> net = make_network("mlp", (2,), 16, 2)
    >>> net(torch.ones(3, 2), torch.zeros(3)).shape
    torch.Size([3, 2])
    """
    clock = Clock(schedule)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds accelerators too
        if kind == "conv":
            return ResidualConv(event, width, depth, classes=classes, clock=clock)
        return ResidualMLP(event, width, depth, classes=classes, norm=norm, clock=clock)


def _zeroed(layer):
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
