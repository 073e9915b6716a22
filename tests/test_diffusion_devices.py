"""States on an accelerator, schedules and grids on the CPU: shown on torch's device "meta", which needs none.

A tensor there has a shape, a dtype and a device and no values. An operation that mixes it with a CPU tensor fails as on a GPU (numbers
apart), and so does whatever waits for one of its values.
"""

import pytest
import torch

import sdesens.diffusion as sd
from sdesens.diffusion import Denoiser, Table, ddim_step, dpmpp_2m_step, heun_step
from sdesens.diffusion.chain import sampler_sde
from sdesens.integrate import scheme

F64 = torch.float64
SCHEDULES = [
    sd.VP(),
    sd.SubVP(),
    sd.Cosine(),
    sd.VE(),
    sd.EDM(),
    sd.CondOT(end=0.99),
    sd.LogSNR(lambda t, p: p["a"] * (1 - 2 * t), {"a": torch.tensor(9.0)}),
    Table.from_betas(torch.linspace(1e-4, 0.02, 20, dtype=F64)),
]
STEPS = {
    "euler_maruyama": (None, {"eta": 0.5}),
    "ddim": (ddim_step, {"eta": 0.5}),
    "heun": (heun_step, {"gamma": 0.1}),
    "dpmpp_2m": (dpmpp_2m_step, {}),
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_coefficients_follow_the_state(schedule):
    x = torch.empty(3, 2, device="meta")
    rows = torch.empty(3, device="meta", dtype=F64)
    for denoiser in (
        Denoiser(lambda x, t: x * t[:, None], schedule, "v"),
        Denoiser(lambda x, t: x, schedule, sigma_data=0.5),
    ):
        for t in (0.5, torch.tensor(0.5), rows):
            for out in (denoiser.x0(x, t), denoiser.velocity(x, t), schedule.reparameterise(x, t, x)):
                assert out.is_meta
                assert out.dtype == torch.float32
        for t in (rows, torch.full((3,), 0.5, dtype=F64)):  # times drawn on the CPU are moved
            loss = sd.dsm_loss(denoiser, x, t, x, weight=sd.min_snr_weight(5.0)).loss
            assert loss.is_meta
            assert loss.shape == (3,)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_samplers_follow_the_state(name, schedule):
    """A step of the chain: a network, guidance by a label on the CPU, and nothing that waits for a value of the state."""
    step, options = STEPS[name]
    net = Denoiser(lambda x, t, c: x * t[:, None] + c[:, None], schedule, "v", null=torch.tensor(0.0))
    grid = torch.tensor([0.9, 0.5, 0.1], dtype=F64) * schedule.t_max
    sde = sampler_sde(sd.guide(net, 2.0, torch.tensor(1.0)), grid, step, **options)
    y = torch.empty((3, 2, 2) if name == "dpmpp_2m" else (3, 2), device="meta")
    one = torch.ones((), dtype=F64)
    for time in (0 * one, one, 2 * one):
        out = scheme.step(sde, sde.params, time, one, y, torch.empty(3, y[0].numel(), device="meta"))
        assert out.is_meta
        assert out.shape == y.shape


def test_the_control():
    """What a GPU would refuse is refused here."""
    with pytest.raises(RuntimeError, match="device"):
        torch.empty(3, device="meta") + torch.ones(3)
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.empty((), device="meta") > 0)
