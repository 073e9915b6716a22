"""Bridges to diffusers: its schedulers are the authority, in float64 with one table to rounding, in float32 to what its own table is off by."""

import math
import pickle
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sdesens import Philox
from sdesens.diffusion import (
    VE,
    VP,
    CondOT,
    Cosine,
    Denoiser,
    Discrete,
    LogSNR,
    SubVP,
    Table,
    ancestral,
    dpmpp_2m,
    prior,
)
from sdesens.diffusion.bridges import from_diffusers, to_diffusers, wrap_unet
from sdesens.diffusion.scheduler_view import SchedulerView
from sdesens.errors import ArgumentError, ArgumentTypeError, DtypeError, SdesensError, ShapeError

diffusers = pytest.importorskip("diffusers")
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: E402
from diffusers.training_utils import compute_snr  # noqa: E402

D = torch.float64
T = 1000
SIZE = 5.0  # states are cut to 4, and the noise drawn in a test, 64 000 normals, stays below this
U32, U64 = 2.0**-24, 2.0**-53  # half the distance of 1 to the next number
PREDICTIONS = pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, D])


def normals(seed: int, *shape: int, dtype=torch.float32) -> torch.Tensor:
    z = Philox(seed).normals(0, shape[0], 0, 1, torch.Size(shape[1:]).numel(), dtype=D, device=torch.device("cpu"))
    return z[0].reshape(shape).clamp(-4, 4).to(dtype)


class Wave(nn.Module):
    """A network that diffusers' pipelines accept: eps for N(0, 0.1), and a wave."""

    dtype, device = torch.float32, torch.device("cpu")
    config = SimpleNamespace(sample_size=8, in_channels=1)

    def __init__(self):
        super().__init__()
        self.size = nn.Parameter(torch.tensor(0.02))
        self.called = []

    def forward(self, sample, timestep, class_labels=None):
        index = torch.as_tensor(timestep)
        self.called.append(index)
        kept = VP().alpha((index.double() + 1) / T).to(sample).reshape(-1, *[1] * (sample.dim() - 1)) ** 2
        label = 0.0 if class_labels is None else class_labels.reshape(kept.shape)
        return SimpleNamespace(
            sample=sample * (1 - kept).sqrt() / (1 - 0.9 * kept) + self.size * torch.sin(3 * sample) + label
        )


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Rounding:
    """First-order bounds on how far a step of theirs is from ours.

    Theirs has an abar that is off by a known part of itself, ours none. 1 - abar and 1 - abar_t / abar_u inherit that as absolute
    errors, plus one rounding u, however small they are: that is what makes tolerances grow as 1/sigma^2 near the data. Recovering
    x0 from eps divides by alpha, which makes them grow towards the noise. States and noise are at most M.
    """

    def __init__(self, exact, held, i, j, prediction, M, u):
        def at(table, k):
            return torch.where(k >= 0, table[k.clamp_min(0)], 1.0)

        a, b, self.u, self.M = at(exact, i), at(exact, j), u, M
        self.a, self.b, self.r, self.S, self.R = a, b, a / b, 1 - a, 1 - b
        own = 8 * U64  # the exact table is a float64 one
        self.off_a, self.off_b = (at(held, i) / a - 1).abs() + own, (at(held, j) / b - 1).abs() + own
        self.off_r = (at(held, i) / at(held, j) / self.r - 1).abs() + 2 * own
        self.dS = (self.off_a * a + u) / self.S  # of themselves
        self.dR = torch.where(self.R > 0, (self.off_b * b + u) / self.R, 0.0)
        self.dbeta = self.off_r * self.r + u  # absolute, of 1 - r
        self.std = (self.R / self.S * (1 - self.r)).sqrt()
        self.dstd = (
            self.std * (self.dR + self.dS + 4 * u) / 2 + (self.R / self.S / (1 - self.r)).sqrt() * self.dbeta / 2
        )
        self.x0, self.dx0, self.e, self.de = self.estimates(prediction)

    def estimates(self, prediction):
        """Sizes and errors of x0 and eps."""
        alpha, sigma, u = self.a.sqrt(), self.S.sqrt(), self.u
        turn = alpha * (self.off_a / 2 + 5 * u) + sigma * (self.dS / 2 + 5 * u)
        one, nothing = torch.ones_like(alpha), torch.zeros_like(alpha)
        divided = ((1 + sigma) * (self.off_a / 2 + 5 * u) + sigma * self.dS / 2) / alpha
        found = {
            "eps": ((1 + sigma) / alpha, divided, one, nothing),
            "x0": (
                one,
                nothing,
                (1 + alpha) / sigma,
                ((1 + alpha) * (self.dS / 2 + 5 * u) + alpha * self.off_a / 2) / sigma,
            ),
            "v": (alpha + sigma, turn, alpha + sigma, turn),
        }[prediction]
        return tuple(self.M * f for f in found)

    def ddpm(self):
        c0, c1 = self.b.sqrt() * (1 - self.r) / self.S, self.r.sqrt() * self.R / self.S
        dc0 = c0 * (self.off_b / 2 + self.dS + 5 * self.u) + self.b.sqrt() * self.dbeta / self.S
        dc1 = c1 * (self.off_r / 2 + self.dR + self.dS + 5 * self.u)
        mean = c0 * self.dx0 + self.x0 * dc0 + self.M * dc1
        floor = torch.where(self.R > 0, 0.0, 1e-10)  # they add that much noise in the last step, lest a variance be 0
        return mean + self.M * (self.dstd + floor) + 4 * self.u * (c0 * self.x0 + 2 * self.M)

    def ddim(self, eta):
        c0, keep = self.b.sqrt(), (self.R - (eta * self.std) ** 2).clamp_min(0).sqrt()
        dkeep = (self.R * self.dR + 2 * eta**2 * self.std * self.dstd + 4 * self.u) / (2 * keep)
        dkeep = torch.where(self.R > 0, dkeep, 0.0)
        mean = c0 * self.dx0 + c0 * self.x0 * (self.off_b / 2 + 5 * self.u) + keep * self.de + self.e * dkeep
        return mean + eta * self.M * self.dstd + 4 * self.u * (c0 * self.x0 + self.e + self.M)


# Training


@pytest.mark.parametrize("name", ["add_noise", "get_velocity"])
def test_noising_is_theirs_at_every_timestep(name):
    theirs, view = to_diffusers(VP()), SchedulerView(VP())
    x0, eps, i = normals(1, T, 64), normals(2, T, 64), torch.arange(T)
    difference = (getattr(view, name)(x0, eps, i) - getattr(theirs, name)(x0, eps, i)).abs()
    exact, held = view.alphas_cumprod, theirs.alphas_cumprod.double()
    d_alpha, d_sigma = (exact.sqrt() - held.sqrt()).abs(), ((1 - exact).sqrt() - (1 - held).sqrt()).abs()
    a, b = (x0, eps) if name == "add_noise" else (eps, x0)
    explained = d_alpha[:, None] * a.abs() + d_sigma[:, None] * b.abs()
    # what their float32 table is off by, and three roundings on each side of numbers up to 8
    assert bool((difference <= explained + 6 * U32 * 8).all())
    assert difference.max() < 5e-6  # sigma_0 = 0.01 is off by 1.2e-4 of itself, times 4
    theirs.alphas_cumprod = exact
    both = [getattr(s, name)(x0.double(), eps.double(), i) for s in (view, theirs)]
    # 1 - abar in float64 is off by 2^-53, sigma_0 by 100 times half of that; a few roundings
    assert (both[0] - both[1]).abs().max() < 4 * 50 * U64 + 6 * U64 * 8


def test_noise_near_the_data_is_right_here():
    B = 0.1 / T + 0.5 * 19.9 / T**2  # of VP, at index 0
    sigma, one = math.sqrt(-math.expm1(-B)), torch.ones(1, 1)
    off = [
        float(s.add_noise(0 * one, one, torch.tensor([0]))) / sigma - 1
        for s in (SchedulerView(VP()), to_diffusers(VP()))
    ]
    assert abs(off[0]) < U32  # rounded once
    assert abs(off[1]) > 1e-4  # sqrt(1 - abar), abar a float32 product


def test_signal_to_noise_ratio_is_theirs():
    view, i = SchedulerView(VP()), torch.arange(T)
    # theirs takes 1 - abar of float64, off by 2^-53 / 1e-4, and rounds alpha and sigma to float32
    torch.testing.assert_close(
        compute_snr(view, i).double(), torch.exp(VP().log_snr(view.times)), rtol=6 * U32, atol=0.0
    )


def pictures(n: int, seed: int) -> torch.Tensor:
    """8 x 8: a bar, dark or light."""
    bar = torch.zeros(1, 8, 8)
    bar[:, 2:5] = 1.0
    return normals(seed, n, 1, 1, 1).sign() * bar + 0.1 * normals(seed + 1, n, 1, 8, 8)


def tiny_unet(**how) -> UNet2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8,),
            norm_num_groups=4,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            add_attention=False,
            **how,
        )


def train(noise_scheduler, n_steps: int) -> torch.Tensor:
    """The loop of diffusers' example for unconditional generation; the losses."""
    model = tiny_unet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    prediction_type = noise_scheduler.config.prediction_type
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for step in range(n_steps):
            clean_images = pictures(16, 2 * step)
            noise = torch.randn(clean_images.shape)
            timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (16,)).long()
            noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
            model_output = model(noisy_images, timesteps).sample
            if prediction_type == "epsilon":
                loss = nn.functional.mse_loss(model_output.float(), noise.float())
            elif prediction_type == "v_prediction":
                velocity = noise_scheduler.get_velocity(clean_images, noise, timesteps)
                loss = nn.functional.mse_loss(model_output.float(), velocity.float())
            else:
                alpha_t = noise_scheduler.alphas_cumprod[timesteps].float().reshape(-1, 1, 1, 1)
                snr_weights = alpha_t / (1 - alpha_t)
                loss = nn.functional.mse_loss(model_output.float(), clean_images.float(), reduction="none")
                loss = (snr_weights * loss).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return torch.tensor(losses)


@PREDICTIONS
def test_their_training_loop_runs_on_a_view(prediction):
    losses = train(SchedulerView(VP(), prediction=prediction), 150)
    before, after = losses[:40].median(), losses[-40:].median()
    assert after < 0.8 * before  # seen .36, .19, .71; forty losses of 16 pictures each
    # theirs in the same loop, through AdamW: float32, but for the weights of "sample", whose 1 - abar is off by 2.4e-4 at index 0
    theirs = train(to_diffusers(VP(), prediction=prediction), 40)
    torch.testing.assert_close(losses[:40], theirs, rtol=3e-4 if prediction == "x0" else 2e-5, atol=0.0)


# Steps


def compared(view, theirs, dtype, **how):
    """The largest difference of a step of two schedulers with the same timesteps, and what share of it rounding allows, of x0 too."""
    held = view.alphas_cumprod if dtype == D else theirs.alphas_cumprod.double()
    if dtype == D:  # with our table, only formulas can differ
        theirs.alphas_cumprod, one = held, torch.ones((), dtype=D)
        theirs.one = theirs.final_alpha_cumprod = one
    following = torch.cat((view.timesteps[1:], torch.tensor([-1])))
    unit = U64 if dtype == D else U32
    rounding = Rounding(view.alphas_cumprod, held, view.timesteps, following, view.prediction, SIZE, unit)
    tolerance = rounding.ddim(**how) if isinstance(theirs, DDIMScheduler) else rounding.ddpm()
    x, o = normals(1, T, 64, dtype=dtype), normals(2, T, 64, dtype=dtype)
    found = []
    for i in view.timesteps.tolist():
        ours = view.step(o[i : i + 1], i, x[i : i + 1], generator=generator(i))
        other = theirs.step(o[i : i + 1], torch.tensor(i), x[i : i + 1], generator=generator(i), **how)
        assert ours.prev_sample.dtype == other.prev_sample.dtype == dtype
        found.append(torch.stack([(a - b).abs().max() for a, b in zip(ours, other.to_tuple(), strict=True)]))
    found = torch.stack(found, 1).double()
    tolerances = torch.stack((tolerance, rounding.dx0 + 4 * unit * rounding.x0))
    return found[0].max().item(), (found / tolerances).max().item()


@PREDICTIONS
@DTYPES
@pytest.mark.parametrize(("spacing", "N"), [("trailing", T), ("leading", 50), ("trailing", 20)])
def test_ancestral_steps_are_those_of_ddpm(spacing, N, dtype, prediction):
    view = SchedulerView(VP(), prediction=prediction)
    theirs = to_diffusers(VP(), prediction=prediction, timestep_spacing=spacing)
    theirs.set_timesteps(N)
    view.set_timesteps(timesteps=theirs.timesteps)
    largest, share = compared(view, theirs, dtype)
    assert share < 1  # seen .12 to .57
    assert largest < (3e-10 if dtype == D else 5e-4)  # the first is their noise in the last step, the second at index 1


def test_the_other_variance_is_told_apart():
    large = DDPMScheduler(
        clip_sample=False, trained_betas=SchedulerView(VP()).betas.tolist(), variance_type="fixed_large"
    )
    assert compared(SchedulerView(VP()), large, torch.float32)[1] > 30


@PREDICTIONS
@DTYPES
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("spacing", "N"), [("leading", 10), ("trailing", 10), ("leading", 250), ("trailing", T)])
def test_deterministic_and_noisy_steps_are_those_of_ddim(spacing, N, eta, dtype, prediction):
    view = SchedulerView(VP(), prediction=prediction, eta=eta)
    theirs = to_diffusers(VP(), T, prediction, DDIMScheduler, timestep_spacing=spacing)
    theirs.set_timesteps(N)
    view.set_timesteps(timesteps=theirs.timesteps)
    largest, share = compared(view, theirs, dtype, eta=eta)
    assert share < 1  # seen .04 to .37
    assert largest < (2e-12 if dtype == D else 4e-4)  # seen, at index 1


# Sampling


def mean_and_slope(scheduler) -> list[float]:
    """Where the exact denoiser of N(1, 1/4) takes the mean 0 of the noise, and its slope in the noise."""
    x = torch.tensor([[0.0], [1.0]], dtype=D)
    for i in scheduler.timesteps:
        alpha, sigma = VP().alpha((int(i) + 1) / T), VP().sigma((int(i) + 1) / T)
        x = scheduler.step((x - alpha) * sigma / (alpha**2 / 4 + sigma**2), i, x).prev_sample
    return [x[0].item(), (x[1] - x[0]).item()]


@pytest.mark.parametrize(("spacing", "mean"), [("leading", 0.9937), ("trailing", 0.9976), ("linspace", 0.9473)])
def test_ten_steps_on_gaussian_data(spacing, mean):
    theirs = to_diffusers(VP(), scheduler=DDIMScheduler, timestep_spacing=spacing)
    theirs.set_timesteps(10)
    view = SchedulerView(VP(), eta=0.0)
    view.set_timesteps(timesteps=theirs.timesteps)
    # the map of the mean by hand: m_u = alpha_u x0 + sigma_u eps with x0 = 1 + alpha/4 (m - alpha)/V, eps = sigma (m - alpha)/V
    m, t = 0.0, [(int(i) + 1) / T for i in theirs.timesteps]
    for now, after in zip(t, [*t[1:], 0.0], strict=True):
        (a, s), (b, r) = ((float(VP().alpha(k)), float(VP().sigma(k))) for k in (now, after))
        away = (m - a) / (a * a / 4 + s * s)
        m = b * (1 + a / 4 * away) + r * s * away
    ours, other = mean_and_slope(view), mean_and_slope(theirs)
    assert abs(ours[0] - m) < 1e-12
    assert abs(other[0] - mean) < 1e-4  # as printed
    if spacing == "linspace":  # their stride is T // N = 100, their grid's 111
        assert abs(other[0] - ours[0]) > 0.05
    else:  # their coefficients are float32, 6e-8 each, in ten steps; seen 2e-7
        assert max(abs(a - b) for a, b in zip(ours, other, strict=True)) < 1e-6


def test_a_view_samples_as_the_core_does():
    denoiser = Denoiser(lambda x, t: 0.3 * x + t[:, None], VP(), "eps")
    view = SchedulerView(VP())
    view.set_timesteps(30)
    grid = torch.cat((view.times[view.timesteps], torch.zeros(1, dtype=D)))
    start = prior(VP(), 6, (3,), seed=5)
    expected = ancestral(denoiser, start, grid, seed=5)
    x = start[2:]
    for i in view.timesteps:
        out = denoiser.raw(x, view.times[i])
        x = view.step(out, i, x, noise=Philox(5), first_path=2).prev_sample
    assert torch.equal(x, expected[2:])  # the same operations on the same noise, whatever the batch


def test_steps_leave_no_trace():
    view = SchedulerView(VP())
    view.set_timesteps(7)
    x, o, z = normals(1, 4, 3), normals(2, 4, 3), normals(3, 4, 3)
    forwards = [view.step(o, i, x, noise=z).prev_sample for i in view.timesteps]
    backwards = [view.step(o, int(i), x, noise=z, return_dict=False)[0] for i in view.timesteps.flip(0)]
    assert all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))
    copy = pickle.loads(pickle.dumps(view))
    assert torch.equal(copy.step(o, 999, x, noise=z).prev_sample, forwards[0])
    assert copy.config == view.config


def test_gradients_flow_to_eta_states_and_schedule():
    x, o, z = (normals(k, 2, 3, dtype=D) for k in (1, 2, 3))
    eta, b0 = torch.tensor(0.6, dtype=D), torch.tensor(0.3, dtype=D)

    def step(eta, b0, o, x):
        view = SchedulerView(VP(b0, 12.0), 100, "v", eta)
        view.set_timesteps(5)
        return view.step(o, 59, x, noise=z).prev_sample, view.add_noise(x, o, torch.tensor([3, 50]))

    # central differences of 1e-6 in float64: error 1e-10 relatively to third derivatives of order 1, rounding 1e-10
    assert torch.autograd.gradcheck(step, [v.requires_grad_() for v in (eta, b0, o, x)], eps=1e-6, atol=1e-7, rtol=1e-6)


def test_noise_counts_in_the_derivative_at_eta_0():
    x, o, z = (normals(k, 2, 3, dtype=D) for k in (1, 2, 3))
    eta = torch.tensor(0.0, dtype=D, requires_grad=True)
    view = SchedulerView(VP(), eta=eta)
    (found,) = torch.autograd.grad(view.step(o, 500, x, noise=z).prev_sample.sum(), eta)
    q = -torch.expm1(VP().log_snr(0.501) - VP().log_snr(0.5))
    torch.testing.assert_close(
        found, VP().sigma(0.5) * q.sqrt() * z.sum(), rtol=1e-11, atol=0.0
    )  # q = 5e-3 by a difference
    with pytest.raises(ArgumentError, match="give `generator`"):
        view.step(o, 500, x)


def test_one_index_is_for_all_rows():
    x, o, view = normals(1, 3, 2), normals(2, 3, 2), SchedulerView(VP())
    each = view.add_noise(x, o, torch.tensor([7, 7, 7]))
    for one in (7, torch.tensor(7), torch.tensor([7]), torch.tensor([7], dtype=torch.int32)):
        assert torch.equal(view.add_noise(x, o, one), each)
        assert torch.equal(view.step(o, one, x, noise=o).prev_sample, view.step(o, 7, x, noise=o).prev_sample)


def test_generators_draw_what_theirs_draw():
    view, theirs = SchedulerView(VP()), to_diffusers(VP())
    x, o = normals(1, 3, 2, 4), normals(2, 3, 2, 4)
    for generators in (lambda: generator(1), lambda: [generator(k) for k in range(3)]):
        ours, other = (s.step(o, 500, x, generators()).prev_sample for s in (view, theirs))
        torch.testing.assert_close(ours, other, rtol=0.0, atol=1e-5)  # `Rounding` allows 8e-6 at index 500
    quiet = SchedulerView(VP(), eta=0.0)
    assert torch.equal(quiet.step(o, 500, x).prev_sample, quiet.step(o, 500, x, generator(1)).prev_sample)


def sampled(pipeline, **how):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(3, generator=generator(4), output_type="pt", **how).images


@pytest.mark.parametrize("n_steps", [20, T])
def test_their_pipeline_runs_on_a_view(n_steps):
    unet = Wave()
    ours, theirs = (
        sampled(DDPMPipeline(unet, s), num_inference_steps=n_steps) for s in (SchedulerView(VP()), to_diffusers(VP()))
    )
    assert 0.1 < ours.std() < 0.2  # of N(0, 0.1), halved
    # float32 steps of theirs are off by 5e-4 at index 1 for unrelated x and x0; here x0 is near x, which takes most of that away
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-4)
    with pytest.raises(ArgumentError, match="give `generator`"):
        DDPMPipeline(unet, SchedulerView(VP()))(1, num_inference_steps=3)


def test_their_ddim_pipeline_makes_its_own_scheduler_from_the_config():
    view = SchedulerView(Cosine(), prediction="x0", eta=0.0)
    pipeline = DDIMPipeline(Wave(), view)
    assert type(pipeline.scheduler) is DDIMScheduler
    torch.testing.assert_close(pipeline.scheduler.betas.double(), view.betas, rtol=2 * U32, atol=0.0)
    assert pipeline.scheduler.config.prediction_type == "sample"
    assert pipeline.scheduler.config.clip_sample is False
    assert pipeline.scheduler.config.timestep_spacing == "trailing"


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # theirs, at every set_timesteps
def test_multistep_sampler_is_theirs():
    theirs = to_diffusers(VP(), scheduler=diffusers.DPMSolverMultistepScheduler)
    theirs.set_timesteps(20)
    grid = torch.tensor([(i + 1) / T for i in theirs.timesteps.tolist()] + [0.0], dtype=D)
    denoiser = Denoiser(lambda x, t: (x + 0.2 * torch.sin(3 * x)) * VP().sigma(t)[:, None].to(x), VP(), "eps")
    start = normals(1, 50, 2)
    x = start
    for i, t in zip(theirs.timesteps, grid[:-1], strict=True):
        x = theirs.step(denoiser.raw(x, t), i, x).prev_sample
    # theirs is float32: at index 49, its last, sigma^2 = 0.03 is off by 2^-24 / 0.03 = 2e-6, and sizes are up to 4; seen 1.6e-6
    torch.testing.assert_close(dpmpp_2m(denoiser, start, grid), x, rtol=0.0, atol=1e-5)


# Schedules


def test_round_trip_keeps_the_table():
    theirs = to_diffusers(VP())
    there, here = from_diffusers(theirs), Discrete(VP(), T)
    relative = {
        k: (getattr(there, k)(here.times) / getattr(VP(), k)(here.times) - 1).abs().max() for k in ("alpha", "sigma")
    }
    # betas are rounded to float32, 6e-8 of themselves, so that B = -2 log alpha <= 10 is off by 3e-7 and sigma by 3e-8 at most
    assert relative["alpha"] < 3e-7
    assert relative["sigma"] < 3e-8
    held = Table(theirs.alphas_cumprod.double())  # the product in float32
    assert (held.sigma(here.times) / VP().sigma(here.times) - 1).abs().max() > 1e-4
    torch.testing.assert_close(
        from_diffusers(SchedulerView(VP())).alphas_cumprod, here.alphas_cumprod, rtol=1e-12, atol=0.0
    )


def test_tables_of_theirs():
    ddpm = DDPMScheduler()
    betas = torch.linspace(1e-4, 0.02, T).double()
    torch.testing.assert_close(from_diffusers(ddpm).alphas_cumprod, torch.cumprod(1 - betas, 0), rtol=1e-12, atol=0.0)
    off = (1 - ddpm.alphas_cumprod.double()[0]).sqrt() / from_diffusers(ddpm).sigma(1 / T) - 1
    assert abs(off) == pytest.approx(8.3e-5, rel=0.01)
    edited = DDPMScheduler()
    edited.alphas_cumprod = edited.alphas_cumprod**1.1  # no longer the product of 1 - beta: the table in use counts
    torch.testing.assert_close(
        from_diffusers(edited).alphas_cumprod, edited.alphas_cumprod.double(), rtol=0.0, atol=0.0
    )
    squared = from_diffusers(DDIMScheduler(beta_schedule="squaredcos_cap_v2"))
    # their cosine with an offset, divided by its value at 0; betas in float32 are off by 500 * 2^-25 = 1.5e-5 in B at most
    kept = (math.cos(0.508 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
    assert float(squared.log_snr(0.5)) == pytest.approx(math.log(kept / (1 - kept)), abs=1e-5)
    with pytest.raises(ArgumentTypeError, match="CondOT"):
        from_diffusers(diffusers.FlowMatchEulerDiscreteScheduler())


def test_zero_terminal_snr():
    table = from_diffusers(DDIMScheduler(rescale_betas_zero_snr=True))
    assert table.alphas_cumprod[-1] == 0
    assert table.zero_terminal_snr
    for make in (SchedulerView, to_diffusers):
        with pytest.raises(ArgumentError, match="predict 'v' or 'x0'"):
            make(table, T, "eps")
    view, theirs = SchedulerView(table, T, "v", eta=0.0), to_diffusers(table, T, "v", DDIMScheduler)
    assert theirs.alphas_cumprod[-1] == 0
    theirs.set_timesteps(10)
    view.set_timesteps(10)
    x, o = normals(1, 1, 64), normals(2, 1, 64)
    ours, other = (s.step(o, 999, x).prev_sample for s in (view, theirs))
    assert bool(torch.isfinite(ours).all())
    # x0 = -o and eps = x at the end: a few roundings of numbers up to 4 on each side
    torch.testing.assert_close(ours, other, rtol=0.0, atol=10 * 4 * U32)


def test_options_and_other_classes():
    theirs = to_diffusers(Cosine(), 250, "x0", DDIMScheduler, clip_sample=True)
    assert theirs.config.clip_sample is True  # asked for
    assert theirs.config.timestep_spacing == "trailing"
    assert len(theirs) == 250
    again = DDPMScheduler.from_config(theirs.config)
    assert torch.equal(again.betas, theirs.betas)
    plain = DDPMScheduler.from_config(SchedulerView(Cosine(), 250, "x0").config)
    assert (plain.config.prediction_type, plain.config.clip_sample) == ("sample", False)
    with pytest.raises(ArgumentTypeError, match="trained_betas"):
        to_diffusers(VP(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler)
    with pytest.raises(ArgumentTypeError, match="must be a class"):
        to_diffusers(VP(), scheduler="DDIMScheduler")


def test_a_class_that_rescales_the_betas_is_told_not_to():
    """CogVideoX shifts the SNR by a factor of 3 unless asked; a class that does so all the same is refused."""
    theirs = to_diffusers(VP(), 1000, "v", diffusers.CogVideoXDDIMScheduler)
    assert theirs.config.snr_shift_scale == 1.0
    assert abs(float(from_diffusers(theirs).log_snr(0.5) - VP().log_snr(0.5))) < 1e-3
    with pytest.raises(ArgumentError, match="another schedule"):
        to_diffusers(VP(), 1000, "v", diffusers.CogVideoXDDIMScheduler, snr_shift_scale=3.0)


def test_no_signal_is_kept_where_a_class_holds_almost_none():
    """Some classes put 2^-24 where alphas_cumprod is 0."""
    theirs = diffusers.EulerDiscreteScheduler(rescale_betas_zero_snr=True)
    assert from_diffusers(theirs).zero_terminal_snr


def test_timesteps():
    view, theirs = SchedulerView(VP()), to_diffusers(VP())
    assert len(view) == len(theirs) == T
    assert torch.equal(view.timesteps, theirs.timesteps)
    for N in (1, 7, 10, 30, 999, T):
        view.set_timesteps(N)
        theirs.set_timesteps(N)
        assert torch.equal(view.timesteps, theirs.timesteps)  # "trailing"
    assert view.init_noise_sigma == theirs.init_noise_sigma
    assert view.order == theirs.order
    x = torch.ones(2)
    assert view.scale_model_input(x, 3) is x


def test_before_set_timesteps_a_step_goes_to_the_next_index():
    x, z = normals(1, 2, 5, dtype=D), normals(2, 2, 5, dtype=D)
    view, denoiser = SchedulerView(VP()), Denoiser(lambda x, t: torch.cos(x), VP(), "eps")
    o = torch.cos(x)
    expected = ancestral(denoiser, x, (0.301, 0.3), noise=z[None])
    # the same formulas; sigma^2 and beta, of size 0.6 and 6e-3, are differences of numbers near 1
    torch.testing.assert_close(view.step(o, 300, x, noise=z).prev_sample, expected, rtol=1e-12, atol=1e-12)
    last = view.step(o, 0, x)
    assert torch.equal(last.prev_sample, last.pred_original_sample)
    torch.testing.assert_close(last.prev_sample, denoiser.x0(x, 1e-3), rtol=1e-12, atol=1e-12)


def test_what_a_view_refuses():
    x, o, view = normals(1, 3, 2), normals(2, 3, 2), SchedulerView(VP())
    view.set_timesteps(10)
    for wrong, word in (("epsilon", "epsilon"), ("score", "v_prediction"), (None, "sample")):
        for make in (SchedulerView, to_diffusers):
            with pytest.raises(ArgumentError, match=word):
                make(VP(), T, wrong)
    for schedule in (VE(), CondOT(), SubVP()):
        with pytest.raises(ArgumentError, match="preserve the variance"):
            SchedulerView(schedule, T, "v")
    for eta in (-0.1, 1.1):
        with pytest.raises(ArgumentError, match="eta"):
            SchedulerView(VP(), eta=eta)
    for i in (998, torch.tensor(0), view.timesteps, torch.tensor([999, 5]), torch.tensor([])):
        with pytest.raises(ArgumentError, match="timestep"):
            view.step(o, i, x, noise=o)
    for wrong in ({"num_inference_steps": 0}, {"num_inference_steps": T + 1}, {}):
        with pytest.raises(ArgumentError, match="num_inference_steps"):
            view.set_timesteps(**wrong)
    with pytest.raises(ArgumentTypeError, match="num_inference_steps"):
        view.set_timesteps(2.0)
    for wrong in ([1, 2], [5, 5], [T, 3], [3, -1], []):
        with pytest.raises(ArgumentError, match="timesteps"):
            view.set_timesteps(timesteps=wrong)
    for wrong in (torch.tensor([0, 1, T]), torch.tensor([-1, 0, 0])):
        with pytest.raises(ArgumentError, match="integers from 0 to 999"):
            view.add_noise(x, o, wrong)
    for wrong in (torch.tensor([0.1, 0.2, 0.3]), "999", [True, False, True]):
        with pytest.raises(ArgumentTypeError, match="timesteps"):
            view.add_noise(x, o, wrong)
    with pytest.raises(ShapeError, match="one time a row"):
        view.add_noise(x, o, torch.tensor([1, 2]))
    for call in (
        lambda: view.get_velocity(x, o[:1], torch.tensor([1, 2, 3])),
        lambda: view.step(torch.cat((o, o), 1), 999, x, noise=o),
        lambda: view.step(o, 999, x, noise=o[0]),
    ):
        with pytest.raises(ShapeError, match="shape"):
            call()
    with pytest.raises(ArgumentError, match="not both"):
        view.step(o, 999, x, generator(1), noise=o)
    with pytest.raises(ArgumentError, match="a list of 3"):
        view.step(o, 999, x, [generator(1)] * 2)
    with pytest.raises(ArgumentTypeError, match=r"must be a torch\.Generator"):
        view.step(o, 999, x, 1)
    for make in (SchedulerView, to_diffusers, partial(wrap_unet, Wave())):
        for wrong, error in ((10.0, ArgumentTypeError), ("10", ArgumentTypeError), (0, ArgumentError)):
            with pytest.raises(error, match="`T`"):
                make(VP(), T=wrong)
    with pytest.raises(ArgumentError, match="make a new one"):
        view.config.prediction_type = "sample"
    with pytest.raises(AttributeError):
        view.config.nothing  # noqa: B018


def test_the_log_snr_is_all_that_a_bridge_needs():
    schedule = LogSNR(lambda t, p: CondOT().log_snr(0.001 + 0.998 * t))
    table = from_diffusers(to_diffusers(schedule, 200))
    times = Discrete(schedule, 200).times
    # the last beta is 0.972 in float32: 1 - beta is off by 2^-25, 1e-6 of itself
    torch.testing.assert_close(table.log_snr(times), schedule.log_snr(times), rtol=0.0, atol=2e-6)


# Networks


def test_indices_are_exact():
    unet = Wave()
    for schedule in (VP(), Cosine()):
        net, times = wrap_unet(unet, schedule), Discrete(schedule, T).times
        for dtype in (D, torch.float32, torch.float16):
            net(torch.zeros(T, 1), times.to(dtype))
            assert torch.equal(unet.called[-1], torch.arange(T))
    with pytest.raises(DtypeError, match="1000 indices"):
        net(torch.zeros(T, 1), times.to(torch.bfloat16))
    wrap_unet(unet, VP(), 100)(torch.zeros(2, 1), torch.tensor([0.254, 0.256]))
    assert unet.called[-1].tolist() == [24, 25]  # to the nearest
    with pytest.raises(ArgumentTypeError, match=r"nn\.Module"):
        wrap_unet(lambda x, i: x, VP())


def test_a_unet_in_a_denoiser_and_its_gradient():
    unet = tiny_unet(class_embed_type=None, num_class_embeds=3)
    x, labels = normals(1, 4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    denoiser = Denoiser(wrap_unet(unet, VP()), VP(), "eps", cond=labels)
    index = torch.tensor([0, 10, 500, 999])
    t = (index.double() + 1) / T
    assert torch.equal(denoiser.eps(x, t), unet(x, index, class_labels=labels).sample)
    name = "net.unet.conv_in.bias"
    bias = denoiser.params[name].detach().clone().requires_grad_()

    def loss(bias):
        return denoiser.with_params({name: bias}).eps(x, t).square().sum()

    (found,) = torch.autograd.grad(loss(bias), bias)
    expected = torch.autograd.grad(unet(x, index, class_labels=labels).sample.square().sum(), unet.conv_in.bias)[0]
    # the same graph, of float32 kernels that may sum in another order: a hundred roundings, 100 U32 = 6e-6, and cancellation
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.abs().min() > 0


# Without diffusers


def test_without_diffusers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SdesensError, match=r"pip install 'sdesens\[diffusers\]'"):
        to_diffusers(VP())
    view = SchedulerView(VP(), 10)  # which needs none of it
    assert view.step(torch.ones(1, 2), 9, torch.ones(1, 2), generator(0)).prev_sample.shape == (1, 2)


def test_nothing_else_imports_diffusers():
    code = """
import sys
from sdesens.diffusion import VP, SchedulerView, from_diffusers
from_diffusers(SchedulerView(VP()))
assert "diffusers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
