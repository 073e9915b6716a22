"""A schedule in the words of diffusers (0.42), for its training loops and pipelines.

Index i of T steps is the time (i + 1)/T of the way to t_max, and i = -1 is the data. With abar = alpha^2 = 1 - sigma^2,

    beta_i = 1 - abar_i / abar_{i-1},      abar_{-1} = 1,                                                       (1)
    add_noise     x_i = alpha_i x_0 + sigma_i eps,          get_velocity     v = alpha_i eps - sigma_i x_0,     (2)
    step          from i to the next of `timesteps`, equation (1) of `steps.py`; from the last, to x_0.         (3)

References: J. Ho et al., 2006.11239; J. Song et al., 2010.02502. Nothing of diffusers is imported.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sdesens.diffusion.checks import number, parameter, whole
from sdesens.diffusion.conversions import combination, combine, split
from sdesens.diffusion.schedule import Schedule
from sdesens.diffusion.steps import ddim_update
from sdesens.diffusion.tables import Discrete
from sdesens.diffusion.values import reals
from sdesens.errors import ArgumentError, ArgumentTypeError, ShapeError
from sdesens.noise import Noise, settle
from sdesens.tensors import concrete, describe

THEIRS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


class Config(dict):
    """What a scheduler of diffusers can be made from; its entries are attributes, too."""

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)

    def __setattr__(self, name, value):
        raise ArgumentError(f"`config` only describes the scheduler: for another {name!r} make a new one.")


class Stepped(NamedTuple):
    """What a step returns, each (B, *event)."""

    prev_sample: Tensor
    pred_original_sample: Tensor


def config_of(schedule: Schedule, T: int, prediction: str) -> Config:
    """A discrete-time model in the words of diffusers; raise ArgumentError if there are none for it."""
    discrete = Discrete(schedule, T)
    if not isinstance(prediction, str) or prediction not in THEIRS:
        words = ", ".join(f"{ours!r} ({theirs!r} there)" for ours, theirs in THEIRS.items())
        raise ArgumentError(f"`prediction` must be one of {words}, got {prediction!r}.")
    with torch.no_grad():
        variance = schedule.alpha(discrete.times) ** 2 + schedule.sigma(discrete.times) ** 2
        if bool(((variance - 1).abs() > 1e-9).any()):
            raise ArgumentError(
                f"`schedule` must preserve the variance, alpha^2 + sigma^2 = 1, got {schedule!r}: "
                "LogSNR(lambda t, p: ...) makes one that has the same log-SNR."
            )
        if prediction == "eps" and schedule.zero_terminal_snr:
            raise ArgumentError(
                f"{schedule!r} has no signal left at its end, where 'eps' says nothing about x0: predict 'v' or 'x0'."
            )
        safe = {"clip_sample": False, "thresholding": False, "timestep_spacing": "trailing", "snr_shift_scale": 1.0}
        named = {"num_train_timesteps": T, "prediction_type": THEIRS[prediction]}
        return Config(**named, **safe, trained_betas=discrete.betas.tolist())


class SchedulerView:
    """A schedule as diffusers' training loops and pipelines want it, equations (2) and (3).

    It has `config`, from which classes of theirs can be made (DDIMScheduler.from_config); `timesteps`, (N,), falling indices, all
    T until they are set; `alphas_cumprod` and `betas`, (T,), float64. It computes in float64 and clips nothing. `set_timesteps`
    apart, calls leave no trace: steps may come in any order.

    Parameters
    ----------
    schedule, T, prediction
        As of `to_diffusers`.
    eta : number or 0-dim Tensor in [0, 1]
        1 is ancestral sampling (DDPM), 0 deterministic (DDIM).

    Raises
    ------
    ArgumentTypeError, ArgumentError
        As of `to_diffusers`; if eta is no number in [0, 1].

    Example
    -------
    >>> from sdesens.diffusion import VP
    >>> view = SchedulerView(VP(), eta=0.0)
    >>> view.set_timesteps(4)
    >>> view.timesteps
    tensor([999, 749, 499, 249])
    >>> view.step(torch.ones(2, 3), 249, torch.ones(2, 3)).prev_sample.shape
    torch.Size([2, 3])
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, schedule: Schedule, T: int = 1000, prediction: str = "eps", eta: float | Tensor = 1.0):
        self.config = config_of(schedule, T, prediction)
        self.schedule, self.prediction, self.eta = schedule, prediction, parameter("eta", eta)
        if concrete(self.eta):
            number("eta", self.eta, 0.0, 1.0, ends=True, hint="1 is ancestral sampling")
        discrete = Discrete(schedule, T)
        self.times, self.timesteps = discrete.times, torch.arange(T).flip(0)
        self.alphas_cumprod, self.betas = discrete.alphas_cumprod.detach(), discrete.betas.detach()

    def __len__(self) -> int:
        return len(self.times)

    def set_timesteps(self, num_inference_steps: int | None = None, device=None, timesteps=None) -> None:
        """Where sampling goes: a number of equal steps from T - 1 on ("trailing"), or falling indices."""
        if (num_inference_steps is None) == (timesteps is None):
            raise ArgumentError("give `num_inference_steps` or `timesteps`, one of the two.")
        if timesteps is None:
            T = len(self)
            N = whole("num_inference_steps", num_inference_steps, 1, T, hint="there are no other indices")
            timesteps = (T - torch.arange(N, dtype=torch.float64) * T / N).round().long() - 1
        i = self._indices(timesteps)
        if i.dim() != 1 or not len(i) or not bool((i.diff() < 0).all()):
            raise ArgumentError(f"`timesteps` must fall, from noise to data, shape (N,), got {i.tolist()!r:.80}.")
        self.timesteps = i.to(device)

    def scale_model_input(self, sample: Tensor, timestep=None) -> Tensor:
        """The sample: where the variance is kept, networks see x."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps) -> Tensor:
        """x_i of equation (2), (B, *event), at indices of shape (B,), or one for all."""
        return self.schedule.reparameterise(original_samples, self._t(timesteps), noise)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps) -> Tensor:
        """v of equation (2), (B, *event), of clean samples and their noise."""
        _check_same("noise", noise, sample)
        return combine(sample, noise.to(sample), combination("v", self.schedule, self._t(timesteps)))

    def step(
        self,
        model_output: Tensor,
        timestep,
        sample: Tensor,
        generator=None,
        return_dict=True,
        *,
        noise=None,
        first_path=0,
    ) -> Stepped:
        """Equation (3), from a timestep to the next one.

        Parameters
        ----------
        model_output, sample : Tensor, shape (B, *event)
        timestep : int or Tensor
            One of `timesteps`; another raises ArgumentError.
        generator : torch.Generator, or list of one a row
            Draws what diffusers would. Where eta > 0 every step but the last needs it, or `noise`.
        return_dict : bool
            Of no effect: the answer is a tuple with names.
        noise : Noise, or Tensor (B, *event) of standard normals
            Of a source, the step from timesteps[k] has step k + 1, paths `first_path` on, as in `ancestral`.

        Raises
        ------
        ArgumentError, ArgumentTypeError, ShapeError
            For another timestep; for no noise where it is needed, or both; if shapes differ.
        """
        _check_same("model_output", model_output, sample)
        i = self._indices(timestep)
        at = torch.isin(self.timesteps.cpu(), i).nonzero()
        if i.numel() != 1 or len(at) != 1:
            raise ArgumentError(f"`timestep` must be one of `timesteps`, got {timestep!r:.60}: see set_timesteps.")
        k, t = int(at), self._t(timestep)
        ab = combination(self.prediction, self.schedule, t)
        x0, eps = split(model_output.to(sample), sample, t, self.schedule, ab)
        if k + 1 == len(self.timesteps):
            return Stepped(x0, x0)
        z = self._normals(sample, k + 1, generator, noise, first_path)
        return Stepped(ddim_update(self.schedule, x0, eps, t, self._t(self.timesteps[k + 1]), z, self.eta), x0)

    def _indices(self, i) -> Tensor:
        values, whole_numbers = reals("timesteps", i).cpu(), torch.as_tensor(i).dtype in (torch.int64, torch.int32)
        if values.numel() and not whole_numbers:
            raise ArgumentTypeError(f"`timesteps` must be integers, got {values.tolist()!r:.80}: use .long().")
        if values.numel() and not 0 <= values.min() <= values.max() < len(self):
            raise ArgumentError(f"`timesteps` must be integers from 0 to {len(self) - 1}, got {values.tolist()!r:.80}.")
        return values.long()

    def _t(self, i) -> Tensor:
        t = self.times[self._indices(i)]
        return t.reshape(()) if t.numel() == 1 else t

    def _normals(self, x: Tensor, step: int, generator, noise: Noise | Tensor | None, first_path: int) -> Tensor:
        if generator is not None and noise is not None:
            raise ArgumentError("give `generator` or `noise`, not both: the noise is either one.")
        if concrete(self.eta) and self.eta.item() == 0 and not self.eta.requires_grad:
            return torch.zeros_like(x)
        if isinstance(noise, Tensor):
            _check_same("noise", noise, x)
            return noise.to(x)
        if noise is not None:
            source, dim = settle(None, noise), x[0].numel()
            return source.normals(first_path, len(x), step, 1, dim, dtype=x.dtype, device=x.device).reshape(x.shape)
        if generator is None:
            raise ArgumentError(
                "a step with eta > 0 draws noise, and never from torch's global state: give `generator`, "
                "torch.Generator().manual_seed(0), or `noise`, Philox(0)."
            )
        return _draw(generator, x)


def _draw(generator, x: Tensor) -> Tensor:
    if isinstance(generator, torch.Generator):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
    if not isinstance(generator, list | tuple):
        raise ArgumentTypeError(
            f"`generator` must be a torch.Generator or a list, got {generator!r:.60}: or give `noise`."
        )
    if len(generator) != len(x):
        raise ArgumentError(f"`generator` must be one, or a list of {len(x)}, one a row, got {len(generator)}.")
    return torch.cat([_draw(g, row[None]) for g, row in zip(generator, x, strict=True)])


def _check_same(name: str, a, x: Tensor) -> None:
    if not isinstance(a, Tensor) or a.shape != x.shape:
        raise ShapeError(f"`{name}` must have the shape of the samples, {tuple(x.shape)}, got {describe(a)}.")
