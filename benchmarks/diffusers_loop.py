"""diffusers' training loop, as its unconditional-training example has it, and its samplers, on this library's networks and data.

    x_t = sqrt(A_t) x_0 + sqrt(1 - A_t) eps,   t uniform in {0, ..., 999},   loss = mean |eps - net(x_t, c_t)|^2,        (1)

with A_t of the default `DDPMScheduler`: linear betas, 1,000 steps. Its parts are diffusers' own: `add_noise`, the cosine schedule
with warm-up, `EMAModel`; clipping, AdamW and mse_loss are torch's. What is not, is as fast or faster than in the example: batches are
gathered by index where the example has a DataLoader, nothing is logged but the loss, and there is no accelerate. The network is the
same as ours with the same initial weights; it is told the noise level of step t, c_t = ln((1 - A_t)/A_t)/8, as ours is.

Reference: https://github.com/huggingface/diffusers/tree/main/examples/unconditional_image_generation.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from sdesens.diffusion import Denoiser, from_diffusers
from sdesens.training import Data, TrainConfig, make_network, network_of

T = 1000
DDPM = {"clip_sample": False}
SAMPLERS = {  # by data: {name: (scheduler, evaluations)}
    "gmm8": {
        "DDPM 1000": (DDPMScheduler(T, **DDPM), 1000),
        "DDPM 1000, its default clip": (DDPMScheduler(T), 1000),
        "DDIM 50": (DDIMScheduler(T, **DDPM), 50),
        "DPM-Solver++ 20": (DPMSolverMultistepScheduler(T), 20),
    },
    "digits": {
        "DDPM 250, its default clip": (DDPMScheduler(T), 250),
        "DDPM 250": (DDPMScheduler(T, **DDPM), 250),
        "DDIM 50, its default clip": (DDIMScheduler(T), 50),
        "DDIM 50": (DDIMScheduler(T, **DDPM), 50),
        "DPM-Solver++ 20": (DPMSolverMultistepScheduler(T), 20),
    },
}


def clock() -> Tensor:
    """c_t, (1000,), float32."""
    A = DDPMScheduler(T).alphas_cumprod.double()
    return ((torch.log1p(-A) - torch.log(A)) / 8).float()


class Loop:
    """The loop, a step at a time; its noise and data are drawn from a generator with the configuration's seed.

    `fast` takes the fused AdamW and the foreach EMA, which the example does not.
    """

    def __init__(self, config: TrainConfig, data: Data, *, fast: bool = False):
        self.config, self.data, self.clock = config, data, clock()
        self.random = torch.Generator().manual_seed(config.seed)
        self.scheduler = DDPMScheduler(T)
        self.net = network_of(config, data.form)
        self.optimiser = torch.optim.AdamW(
            self.net.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True if fast else None
        )
        self.lr = get_cosine_schedule_with_warmup(self.optimiser, config.warmup, config.steps)
        self.ema = EMAModel(self.net.parameters(), decay=config.ema, foreach=fast)
        self.rows = torch.empty(0, dtype=torch.int64)

    def step(self) -> float:
        """One step; the loss."""
        loss = self._loss(*self._draw())
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), self.config.clip)
        self.optimiser.step()
        self.lr.step()
        self.optimiser.zero_grad()
        self.ema.step(self.net.parameters())
        return loss.detach().item()

    def averaged(self) -> nn.Module:
        """The network with the averaged weights."""
        net = deepcopy(self.net)
        self.ema.copy_to(net.parameters())
        return net.eval().requires_grad_(False)

    def _draw(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        data, g, n = self.data, self.random, self.config.batch
        label = None
        if data.law is not None:
            law = data.law
            which = torch.multinomial(law.weights, n, replacement=True, generator=g)
            x = law.means[which].float() + float(law.covs.sqrt()) * torch.randn(n, law.dim, generator=g)
        else:
            while len(self.rows) < n:
                self.rows = torch.cat((self.rows, torch.randperm(len(data.train), generator=g)))
            rows, self.rows = self.rows[:n], self.rows[n:]
            x = data.train[rows]
            if data.labels is not None:
                hidden = torch.rand(n, generator=g) < self.config.drop_label
                label = torch.where(hidden, data.form.classes, data.labels[rows])
        return x, label, torch.randn(x.shape, generator=g), torch.randint(0, T, (n,), generator=g)

    def _loss(self, x: Tensor, label: Tensor | None, noise: Tensor, t: Tensor) -> Tensor:
        noisy = self.scheduler.add_noise(x, noise, t)
        return F.mse_loss(evaluate(self.net, noisy, self.clock[t], label), noise)


def evaluate(net: nn.Module, x: Tensor, c: Tensor, label: Tensor | None) -> Tensor:
    return net(x, c) if label is None else net(x, c, label)


def sample(
    net: nn.Module, scheduler, evaluations: int, n: int, event: tuple[int, ...], labels: Tensor | None, seed: int
):
    """Samples (n, *event), as diffusers' pipelines draw them."""
    g, c = torch.Generator().manual_seed(seed), clock()
    scheduler.set_timesteps(evaluations)
    x = torch.randn((n, *event), generator=g)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(evaluate(net, x, c[t].expand(n), labels), t, x, generator=g).prev_sample
    return x


def denoiser(net: nn.Module, config: TrainConfig, data: Data) -> Denoiser:
    """The network as this library's scores take it: on the schedule of the 1,000 steps, told the time."""
    schedule, form = from_diffusers(DDPMScheduler(T)), data.form
    told_time = make_network(
        config.network,
        form.event,
        config.width,
        config.depth,
        classes=form.classes,
        norm=config.norm,
        schedule=schedule,
    )
    told_time.load_state_dict(net.state_dict())
    null = torch.tensor(form.classes) if form.classes else None
    return Denoiser(told_time.eval().requires_grad_(False), schedule, "eps", null=null)
