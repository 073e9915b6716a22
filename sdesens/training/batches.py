"""The sample stream of training: what item i of the global batch of step k is, whatever the ranks, pieces or restarts.

Item i of step k stands at place p = k N + i of the stream, N items a step. Of n rows it is row

    permutation_e[p mod n],   e = p div n,      permutation_e a function of (seed, e),            (1)

and of a law it is the draw of path p. Its time, noise and hidden label are functions of (seed, k, i) too, see
`sdesens.diffusion.draws`. Several steps are drawn at once, which costs less and changes no number.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sdesens.diffusion.checks import whole
from sdesens.diffusion.draws import draw_noise, draw_uniforms, keep_label, lognormal_times, uniform_times
from sdesens.diffusion.schedule import Schedule
from sdesens.diffusion.streams import LAW, ORDER
from sdesens.errors import ArgumentError
from sdesens.noise import Philox
from sdesens.training.config import TrainConfig
from sdesens.training.data import Data

AT_ONCE = 2**19  # numbers drawn together: enough to hide the cost of a call
MOST_STEPS = 64


class Batch(NamedTuple):
    """Items of one step: `label` is `classes` where it is hidden, None for data without labels."""

    x0: Tensor  # (b, *event)
    label: Tensor | None  # (b,)
    t: Tensor  # (b,), float64, on the CPU
    eps: Tensor  # (b, *event)


def permutations(seed: int, epochs: range, n: int) -> Tensor:
    """The order of n rows in each of some neighbouring epochs, (epochs, n).

    Example
    -------
    >>> permutations(7, range(2), 3).sort(1).values
    tensor([[0, 1, 2],
            [0, 1, 2]])
    """
    paths = (torch.arange(epochs.start, epochs.stop) << 32)[:, None] + torch.arange(n)
    keys = Philox(seed, ORDER).at(paths.flatten(), 0, 1, 1, torch.float64).reshape(len(epochs), n)
    return torch.argsort(keys, dim=1, stable=True)


def training_times(config: TrainConfig, schedule: Schedule, u: Tensor, sigma_data: float) -> Tensor:
    """Training times of uniforms u (B,), by the configuration's law."""
    if config.law_of_times == "uniform":
        return uniform_times(schedule, u)
    return lognormal_times(schedule, u, sigma_data=sigma_data)


@dataclass(frozen=True, eq=False)
class Batches:
    """A rank's part of the sample stream.

    Parameters
    ----------
    config : TrainConfig
    data : Data
    rank, size : int
        This rank, and how many there are.
    device : torch.device or str
        Where x0, labels and noise go.

    Raises
    ------
    ArgumentError
        If rank and size do not fit, or the batch does not divide into equal pieces.

    Example
    -------
    >>> from sdesens.training.config import recipe
    >>> from sdesens.training.data import load_data
    >>> whole = Batches(recipe("gmm8", batch=8), load_data("gmm8"))
    >>> half = Batches(recipe("gmm8", batch=8), load_data("gmm8"), rank=1, size=2)
    >>> bool((next(whole.steps(5, 6))[0].x0[4:] == next(half.steps(5, 6))[0].x0).all())
    True
    """

    config: TrainConfig
    data: Data
    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"
    _orders: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        whole("size", self.size, hint="it is the number of ranks")
        whole("rank", self.rank, 0, self.size - 1, hint="ranks count from 0")
        if self.config.batch % (self.size * self.config.accumulate):
            raise ArgumentError(
                f"`batch` = {self.config.batch} must be a multiple of ranks x `accumulate` = {self.size} x {self.config.accumulate}: change one."
            )

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        """For each step first ... last - 1, the rank's `accumulate` pieces."""
        if not 0 <= first <= last:
            raise ArgumentError(f"steps run from `first` up to `last`, got {first} and {last}.")
        pieces = self.config.accumulate
        b = self.config.batch // (self.size * pieces)
        numbers = b * pieces * self.data.train[0].numel()
        many = min(MOST_STEPS, max(1, AT_ONCE // numbers))
        for start in range(first, last, many):
            block = range(start, min(start + many, last))
            drawn = [self._draw(block, (self.rank * pieces + a) * b, b) for a in range(pieces)]
            for k in range(len(block)):
                yield [Batch(p.x0[k], None if p.label is None else p.label[k], p.t[k], p.eps[k]) for p in drawn]

    def _draw(self, steps: range, first: int, b: int) -> Batch:
        """Items first ... first + b - 1 of each step, with a leading dimension of steps."""
        seed, total, form = self.config.seed, self.config.batch, self.data.form
        u = draw_uniforms(seed, steps, b, first_item=first, total=total)
        t = training_times(self.config, self._schedule, u.flatten(), form.sigma_data).reshape(u.shape)
        eps = draw_noise(seed, steps, (b, *form.event), first_item=first, device=self.device)
        places = torch.arange(steps.start, steps.stop)[:, None] * total + first + torch.arange(b)
        if self.data.law is not None:
            x0 = self._from_law(places)
            return Batch(x0.to(self.device), None, t, eps)
        rows = self._rows(places)
        label = None
        if self.data.labels is not None:
            keep = keep_label(seed, steps, b, self.config.drop_label, first_item=first)
            label = torch.where(keep, self.data.labels[rows], form.classes).to(self.device)
        return Batch(self.data.train[rows].to(self.device), label, t, eps)

    @property
    def _schedule(self) -> Schedule:
        return self.config.make_schedule()

    def _from_law(self, places: Tensor) -> Tensor:
        law = self.data.law
        assert law is not None
        first, n = int(places[0, 0]), int(places[-1, -1]) - int(places[0, 0]) + 1
        drawn = law.sample(n, noise=Philox(self.config.seed, LAW), first_path=first)
        return drawn[places - first].float()

    def _rows(self, places: Tensor) -> Tensor:
        """Equation (1)."""
        n = len(self.data.train)
        epochs = places // n
        needed = range(int(epochs[0, 0]), int(epochs[-1, -1]) + 1)
        for e in self._orders.keys() - set(needed):
            del self._orders[e]
        if missing := [e for e in needed if e not in self._orders]:
            new = range(missing[0], missing[-1] + 1)
            self._orders.update(zip(new, permutations(self.config.seed, new, n), strict=True))
        table = torch.stack([self._orders[e] for e in needed])
        return table[epochs - needed.start, places % n]
