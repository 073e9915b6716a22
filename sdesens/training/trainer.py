"""The trainer: AdamW on the denoising loss, averaged weights, checkpoints, a log; resumed, it goes on as if nothing had happened.

All that a step depends on is the weights, the optimiser's state and the step's number: the batch, the times and the noise are functions
of (seed, step, item), the learning rate is one of the step. A checkpoint holds just that.
"""

import math
from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sdesens.diffusion.draws import draw_noise, draw_uniforms
from sdesens.diffusion.predict import Denoiser
from sdesens.errors import NonFiniteError
from sdesens.training.batches import Batch, Batches, training_times
from sdesens.training.config import TrainConfig
from sdesens.training.data import Data
from sdesens.training.model import batch_loss, loss_weight, make_denoiser, network_of
from sdesens.training.ranks import Ranks, unsynchronised
from sdesens.training.snapshot import Snapshot

HELD_OUT = 8192  # draws of (test row, time, noise) whose loss is watched
LAST_STEP = 2**31 - 1  # whose draws no training step uses


class Trainer:
    """One rank's part of a run. Use `train`, unless the loop is to be your own.

    Attributes
    ----------
    net : nn.Module
        What is trained; `denoiser` judges it, and `averaged` has the averaged weights.
    step : int
        Steps done.
    """

    def __init__(self, config: TrainConfig, data: Data, ranks: Ranks):
        self.config, self.data, self.ranks = config, data, ranks
        self.batches = Batches(config, data, ranks.rank, ranks.size, ranks.device)
        self.net = network_of(config, data.form).to(ranks.device)
        self.denoiser = make_denoiser(config, data.form, self.net)
        self.weight = loss_weight(config, data.form.sigma_data)
        self.average = AveragedModel(self.net)
        self.parameters: list[Tensor] = list(self.net.parameters())
        self.means: list[Tensor] = list(self.average.module.parameters())
        self.optimiser = torch.optim.AdamW(
            self.net.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.step = 0
        self.losses: list[Tensor] = []  # since the last line of the log
        self.grad_norm = torch.zeros(())

    @property
    def averaged(self) -> Denoiser:
        """The denoiser with the averaged weights, in eval mode."""
        return make_denoiser(self.config, self.data.form, self.average.module.eval())

    def snapshot(self, score: float) -> Snapshot:
        """All that the following steps depend on; it shares memory with the trainer until it is saved."""
        state = {
            "step": self.step,
            "optimiser": self.optimiser.state_dict(),
            "averaged": int(self.average.n_averaged),
            "losses": [float(x) for x in self.losses],
            "ranks": self.ranks.size,
        }
        meta = {"config": self.config.to_json(), "form": self.data.form.to_json()}
        return Snapshot(self.step, self.net.state_dict(), self.average.module.state_dict(), state, meta, score)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot."""
        self.step = snapshot.step
        self.net.load_state_dict(snapshot.model)
        self.average.module.load_state_dict(snapshot.ema)
        self.average.n_averaged.fill_(snapshot.state["averaged"])
        self.optimiser.load_state_dict(deepcopy(snapshot.state["optimiser"]))  # it keeps the tensors, and changes them
        self.losses = list(torch.tensor(snapshot.state["losses"], device=self.ranks.device))

    def steps(self) -> Iterator[int]:
        """Train to the end, yielding after each step."""
        first = next(self.batches.steps(0, 1))[0]
        net = self.ranks.wrap(self.net, lambda w: self._loss(make_denoiser(self.config, self.data.form, w), first))
        denoiser = make_denoiser(self.config, self.data.form, net)
        for pieces in self.batches.steps(self.step, self.config.steps):
            self._update(denoiser, net, pieces)
            self.step += 1
            yield self.step

    def _loss(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        return batch_loss(denoiser, batch, self.weight, bf16=self.config.bf16).mean()

    def _update(self, denoiser: Denoiser, net: nn.Module, pieces: list[Batch]) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.lr_at(self.step)
        total = torch.zeros((), device=self.ranks.device)
        for i, batch in enumerate(pieces):
            with unsynchronised(net, i < len(pieces) - 1):
                loss = self._loss(denoiser, batch) / len(pieces)
                loss.backward()
            total += loss.detach()
        self.grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self._mix()
        self.losses.append(total)

    @torch.no_grad()
    def _mix(self) -> None:
        """Averaged weights by equation (2) of `config.py`, from those after the first step; on kept lists, which
        `AveragedModel.update_parameters` makes anew in every step."""
        i = int(self.average.n_averaged)
        decay = min(self.config.ema, (1 + i) / (10 + i)) if i else 0.0
        torch._foreach_lerp_(self.means, self.parameters, 1 - decay)
        self.average.n_averaged += 1

    def gather(self) -> list[float]:
        """The losses since the last line, means over the ranks; raise NonFiniteError if one is not a number."""
        if not self.losses:
            return []
        values = self.ranks.mean(torch.stack(self.losses)).tolist()
        self.losses = list(torch.tensor(values, device=self.ranks.device))
        for i, v in enumerate(values):
            self._check(v, "loss", self.step - len(values) + i + 1)
        return values

    def validation(self) -> float:
        """The mean loss of the averaged weights on held-out rows, always at the same times and with the same noise."""
        data, device, total = self.data, self.ranks.device, 0.0
        u = draw_uniforms(0, LAST_STEP, HELD_OUT)
        t = training_times(self.config, self.denoiser.schedule, u, data.form.sigma_data)
        with torch.no_grad():
            for items in torch.arange(HELD_OUT).split(self.config.batch):
                rows = items % len(data.test)
                label = None if data.test_labels is None else data.test_labels[rows].to(device)
                shape = (len(items), *data.form.event)
                eps = draw_noise(0, LAST_STEP, shape, first_item=int(items[0]), device=device)
                batch = Batch(data.test[rows].to(device), label, t[items], eps)
                total += float(batch_loss(self.averaged, batch, self.weight).double().sum())
        self._check(total, "held-out loss", self.step)
        return total / HELD_OUT

    def _check(self, value: float, what: str, step: int) -> None:
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the {what} is {value} at step {step}: lower `lr`, lower `clip`, or look for outliers in the data. Earlier checkpoints "
                "are intact.",
                step=step,
            )
