"""How fast two training loops are, and where a step's time goes, without a change to either.

Speed: repeats of some steps take turns, so that a slow minute of the machine meets all loops; compare repeat by repeat.

Parts of a step: functions that the loops call are replaced by ones that look at the clock. A part that calls another pauses meanwhile,
so that times add up to the whole.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import wraps
from unittest.mock import patch

import torch
from diffusers.training_utils import EMAModel
from diffusers_loop import Loop
from torch.optim.swa_utils import AveragedModel

from sdesens.training import Batches, Data, TrainConfig, Trainer, join

WARM = 64  # steps; ours are drawn up to so many at a time: take multiples of it
WHO = ("sdesens", "diffusers", "diffusers, fused")
PARTS = ("draw", "network", "loss around it", "backward", "clip", "AdamW", "average", "rest")


def ours(config: TrainConfig, data: Data) -> tuple[Trainer, Iterator]:
    """Our trainer and its steps, with the losses gathered for the log as `train` does."""
    with join("cpu") as ranks:
        trainer = Trainer(config, data, ranks)

    def steps():
        for step in trainer.steps():
            if step % config.log_every == 0:
                trainer.gather()
                trainer.losses.clear()
            yield step

    return trainer, steps()


def contestant(who: str, config: TrainConfig, data: Data) -> tuple[Callable, torch.nn.Module]:
    """A step, and the network that it trains."""
    if who == "sdesens":
        trainer, steps = ours(config, data)
        return lambda: next(steps), trainer.net
    loop = Loop(config, data, fast=who == "diffusers, fused")
    return loop.step, loop.net


def items_a_second(config: TrainConfig, data: Data, *, pairs: int, steps: int) -> dict[str, list[float]]:
    """Items a second of each contestant, repeat by repeat."""
    here = {who: contestant(who, config, data)[0] for who in WHO}
    speeds: dict[str, list[float]] = {who: [] for who in here}
    for step in here.values():
        for _ in range(WARM):
            step()
    for k in range(pairs):
        for who in WHO[:: -1 if k % 2 else 1]:  # no one is always first
            began = time.perf_counter()
            for _ in range(steps):
                here[who]()
            speeds[who].append(config.batch * steps / (time.perf_counter() - began))
    return speeds


class Stopwatch:
    """Seconds by part; the part that was entered last runs."""

    def __init__(self):
        self.spent: dict[str, float] = defaultdict(float)
        self.running, self.since = ["rest"], time.perf_counter()

    def switch(self) -> None:
        """Book the time since the last switch."""
        now = time.perf_counter()
        self.spent[self.running[-1]] += now - self.since
        self.since = now

    def of(self, part: str, function: Callable) -> Callable:
        """The function, its time booked on a part."""

        @wraps(function)  # what torch has noted on it stays
        def timed(*arguments, **options):
            self.switch()
            self.running.append(part)
            try:
                return function(*arguments, **options)
            finally:
                self.switch()
                self.running.pop()

        return timed


def breakdown(config: TrainConfig, data: Data, *, steps: int) -> dict[str, dict[str, float]]:
    """Seconds a step by part, of each contestant."""
    found = {}
    for who in WHO:
        watch = Stopwatch()
        with ExitStack() as stack:
            for part, owner, name in (
                ("draw", Batches, "_draw"), ("draw", Loop, "_draw"), ("loss around it", Trainer, "_loss"), ("loss around it", Loop, "_loss"),
                ("backward", torch.Tensor, "backward"), ("clip", torch.nn.utils, "clip_grad_norm_"), ("AdamW", torch.optim.AdamW, "step"),
                ("average", AveragedModel, "update_parameters"), ("average", EMAModel, "step"), ("average", torch, "_foreach_lerp_"),
            ):  # fmt: skip
                stack.enter_context(patch.object(owner, name, watch.of(part, getattr(owner, name))))
            step, net = contestant(who, config, data)
            stack.enter_context(patch.object(net, "forward", watch.of("network", net.forward)))
            for _ in range(WARM):
                step()
            watch.switch()
            watch.spent.clear()
            for _ in range(steps):
                step()
            watch.switch()
        found[who] = {part: watch.spent[part] / steps for part in PARTS}
    return found
