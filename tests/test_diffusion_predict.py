"""Predictions of every kind from each other and from an exact law, networks with parameters, guidance, clipping, bad input."""

import copy
import itertools
import math

import pytest
import torch
from diffusion_cases import D, call, identity, scalar
from torch import nn

from sdesens.diffusion import (
    EDM,
    VE,
    VP,
    Clipped,
    CondOT,
    Cosine,
    Denoiser,
    Guided,
    LogSNR,
    SubVP,
    Table,
    convert,
    guide,
)
from sdesens.errors import ArgumentError, ArgumentTypeError, DtypeError, GridError, NotAFunctionError, ShapeError
from sdesens.modules import Lent

KINDS = ("eps", "x0", "v", "score", "velocity")


def normals(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def straight(t, p):
    return p["top"] - 28 * t


SCHEDULES = {  # each reaches log-SNR 12 and -12
    "VP": VP(0.1, 30.0),
    "SubVP": SubVP(0.1, 30.0),
    "Cosine": Cosine(),
    "VE": VE(math.exp(-6.5), math.exp(6.5)),
    "EDM": EDM(1000.0),
    "CondOT": CondOT(),
    "LogSNR": LogSNR(straight, {"top": scalar(14.0)}),
    "Table": Table.from_betas(torch.linspace(1e-4, 0.03, 1000, dtype=D)),
}
EVERY = pytest.mark.parametrize("schedule", list(SCHEDULES.values()), ids=list(SCHEDULES))


def rows(coefficient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return coefficient.reshape(-1, *[1] * (x.dim() - 1))


def truth(schedule, t, x0, eps) -> dict[str, torch.Tensor]:
    """x and every prediction from clean data and noise, by their definitions; the velocity's rates by autograd."""
    at = t.clone().requires_grad_()
    alpha, sigma = schedule.alpha(at), schedule.sigma(at)
    da = torch.autograd.grad(alpha.sum(), at)[0] if alpha.requires_grad else torch.zeros_like(t)
    (ds,) = torch.autograd.grad(sigma.sum(), at)
    a, s, da, ds = (rows(c.detach(), x0) for c in (alpha, sigma, da, ds))
    n = torch.sqrt(a**2 + s**2)
    return {
        "x": a * x0 + s * eps,
        "eps": eps,
        "x0": x0,
        "v": (a * eps - s * x0) / n,
        "score": -eps / s,
        "velocity": da * x0 + ds * eps,
        "scale of x": n,
        "scale of eps": torch.ones_like(a),
        "scale of x0": torch.ones_like(a),
        "scale of v": torch.ones_like(a),
        "scale of score": 1 / s,
        "scale of velocity": torch.sqrt(da**2 + ds**2),
    }


def over_the_range(schedule, n=97, width=16):
    """Times at log-SNR -12 ... 12, with clean data and noise of unit variance and no tails: entries up to 1.7."""
    t = schedule.t_of_log_snr(torch.linspace(-12, 12, n, dtype=D))
    x0, eps = (math.sqrt(3) * torch.sin(7 * normals(n, width, seed=seed)) for seed in (0, 1))
    return t, x0, eps


# Conversions


@EVERY
@pytest.mark.parametrize(("dtype", "bar"), [(D, 1e-11), (torch.float32, 2e-4)], ids=["double", "single"])
def test_every_prediction_from_every_other(schedule, dtype, bar):
    """Against the definitions, there and back, relative to the scale of each quantity.

    Log-SNR 12 amplifies rounding by e^6 = 403 when eps is read off x - alpha x0, as -12 does for x0. With entries up to 1.7 that
    is 1.7 x 403 x 2^-53 = 8e-14 in double, 4e-5 in single, a few times over.
    """
    t, x0, eps = over_the_range(schedule)
    exact = truth(schedule, t, x0, eps)
    assert (schedule.log_snr(t) - torch.linspace(-12, 12, 97, dtype=D)).abs().max().item() < 1e-8
    x = exact["x"].to(dtype)
    for have, want in itertools.product(KINDS, KINDS):
        given = exact[have].to(dtype)
        found = convert(given, x, t, schedule, have, want)
        back = convert(found, x, t, schedule, want, have)
        assert found.dtype == back.dtype == dtype
        assert ((found - exact[want]) / exact["scale of " + want]).abs().max().item() < bar, (have, want)
        assert ((back - given) / exact["scale of " + have]).abs().max().item() < bar, (have, want)


@EVERY
@pytest.mark.parametrize("sd", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("dtype", "bar"), [(D, 1e-11), (torch.float32, 2e-4)], ids=["double", "single"])
def test_a_preconditioned_network(schedule, sd, dtype, bar):
    """x0 = c_skip z + c_out F(c_in z, c_noise), z = x / alpha: what the network sees, and what is made of its F."""
    if schedule.zero_terminal_snr:
        schedule = CondOT(end=0.9999)
    t, x0, eps = over_the_range(schedule)
    exact = truth(schedule, t, x0, eps)
    r, z = rows((schedule.sigma(t) / schedule.alpha(t)), x0), x0 + rows(schedule.sigma(t) / schedule.alpha(t), x0) * eps
    c_skip, c_out, c_in = sd**2 / (r**2 + sd**2), r * sd / torch.sqrt(r**2 + sd**2), 1 / torch.sqrt(r**2 + sd**2)
    F = (x0 - c_skip * z) / c_out
    seen = {}

    def net(x, noise):
        seen.update(x=x, noise=noise)
        return F.to(dtype)

    denoiser = Denoiser(net, schedule, sigma_data=sd)
    found_x0, found_eps = denoiser.pair(exact["x"].to(dtype), t)
    # rounding as above; F itself is a difference, amplified by r/sd = 403/0.3, and x0 is it times c_out <= sd
    assert (found_x0 - x0).abs().max().item() < bar
    assert (found_eps - eps).abs().max().item() < bar
    rounding = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(seen["x"], (c_in * z).to(dtype), rtol=rounding, atol=rounding)
    torch.testing.assert_close(seen["noise"], (torch.log(r[:, 0]) / 4).to(dtype), rtol=rounding, atol=rounding)
    a, b = denoiser.combination(t)
    torch.testing.assert_close(rows(a, x0) * x0 + rows(b, x0) * eps, F, rtol=1e-9, atol=1e-9)


@EVERY
def test_with_unit_data_f_is_v_up_to_sign(schedule):
    if schedule.zero_terminal_snr:
        schedule = CondOT(end=0.9999)
    t = torch.linspace(0.01, 1, 50, dtype=D) * schedule.t_max
    F = Denoiser(lambda x, noise: x, schedule, sigma_data=1.0).combination(t)
    v = Denoiser(lambda x, t: x, schedule, "v").combination(t)
    for mine, theirs in zip(F, v, strict=True):
        torch.testing.assert_close(mine, -theirs, rtol=1e-13, atol=0)  # two formulas of a few operations each
    other = Denoiser(lambda x, noise: x, schedule, sigma_data=0.5).combination(t)
    assert (other[0] + v[0]).abs().max().item() > 0.1  # negative control: not with other data


@EVERY
def test_errors_of_one_prediction_in_terms_of_another(schedule):
    """|d eps|^2 = SNR |d x0|^2, |d v|^2 = (SNR + 1) |d x0|^2, |d u|^2 = (sigma lambda' / 2)^2 |d eps|^2, at one x."""
    t, x0, eps = over_the_range(schedule)
    x, off = truth(schedule, t, x0, eps)["x"], normals(97, 16, seed=2)
    size = {
        kind: (convert(x0 + off, x, t, schedule, "x0", kind) - convert(x0, x, t, schedule, "x0", kind)).square().sum(1)
        for kind in KINDS
    }
    snr, speed = torch.exp(schedule.log_snr(t)), schedule.sigma(t) * schedule.log_snr_rate(t) / 2

    # differences of numbers up to 403 times their size, squared: 1e-12; log-SNR itself is known to 1e-8 at CondOT's end
    def close(found, exact):
        torch.testing.assert_close(found, exact, rtol=2e-9, atol=0)

    close(size["eps"], snr * size["x0"])
    close(size["v"], (snr + 1) * size["x0"])
    close(size["velocity"], speed**2 * size["eps"])
    close(size["score"], size["eps"] / schedule.sigma(t) ** 2)
    if isinstance(schedule, VP | Cosine | LogSNR | Table) and not isinstance(schedule, SubVP):
        close(size["v"], size["eps"] / schedule.alpha(t) ** 2)


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("kind", ["x0", "v", "velocity"])
@pytest.mark.parametrize("schedule", [CondOT(), Cosine(-math.inf)], ids=repr)
def test_predictions_where_no_signal_is_left(schedule, kind, dtype):
    """At t = 1 x is eps, and the prediction alone says what x0 is: x0, -x0, and eps - x0 or -pi/2 x0."""
    x0, eps = normals(5, 3).to(dtype), normals(5, 3, seed=1).to(dtype)
    velocity = eps - x0 if isinstance(schedule, CondOT) else -math.pi / 2 * x0
    exact = {"x0": x0, "eps": eps, "score": -eps, "v": -x0, "velocity": velocity}
    denoiser = Denoiser(lambda x, t: exact[kind], schedule, kind)
    rounding = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps}  # of entries up to 3
    for want in KINDS:
        torch.testing.assert_close(convert(exact[kind], eps, 1.0, schedule, kind, want), exact[want], **rounding)
        torch.testing.assert_close(getattr(denoiser, want)(eps, 1.0), exact[want], **rounding)


# An exact law


M, S = 0.7, 1.3  # data N(M, S^2)


def posterior(schedule, x, t) -> dict[str, torch.Tensor]:
    """What an exact network returns for Gaussian data: V = alpha^2 S^2 + sigma^2, score -(x - alpha M)/V."""
    a, s = rows(schedule.alpha(t), x), rows(schedule.sigma(t), x)
    V = a**2 * S**2 + s**2
    y = (x - a * M) / V
    return {
        "eps": s * y,
        "x0": M + a * S**2 * y,
        "score": -y,
        "v": (a * s * y - s * (M + a * S**2 * y)) / torch.sqrt(a**2 + s**2),
    }


@EVERY
def test_a_denoiser_of_any_kind_says_the_same(schedule):
    """Score and velocity f x - g^2 s / 2 of Gaussian data, from networks that return each of the five kinds, or F."""
    t, x0, eps = over_the_range(schedule, n=25, width=4)
    t = t[1:] if isinstance(schedule, CondOT) else t
    x0, eps = x0[-len(t) :].reshape(-1, 2, 2), eps[-len(t) :].reshape(-1, 2, 2)
    x = rows(schedule.alpha(t), x0) * (M + S * x0) + rows(schedule.sigma(t), x0) * eps
    exact = posterior(schedule, x, t)
    f, g2 = rows(schedule.f(t), x), rows(schedule.g2(t), x)
    exact["velocity"] = f * x - g2 * exact["score"] / 2
    nets = {
        kind: Denoiser(lambda x, t, kind=kind: exact[kind], schedule, kind)
        for kind in KINDS
        if kind not in ("eps", "score") or not schedule.zero_terminal_snr
    }
    scales = truth(schedule, t, x0, eps)
    for kind, denoiser in nets.items():
        for want in KINDS:
            found = getattr(denoiser, want)(x, t)
            # rounding x 403, as for the conversions; f x and g^2 s / 2 cancel to the same extent
            error = ((found - exact[want]) / scales["scale of " + want]).abs().max()
            assert float(error) < 1e-11, (kind, want)


def test_one_time_for_all_rows_or_one_each():
    calls = []

    def net(x, t):
        calls.append((x.dtype, t.dtype, t.shape))
        return x * t.reshape(-1, 1, 1)

    for dtype in (D, torch.float32, torch.bfloat16):
        x = normals(3, 2, 4).to(dtype)
        denoiser = Denoiser(net, VP(), "v")
        one, each = denoiser.x0(x, 0.5), denoiser.x0(x, torch.full((3,), 0.5))
        assert torch.equal(one, each)
        assert one.dtype == dtype
        wide = torch.promote_types(dtype, torch.float32)  # half precision would tell too few times apart
        assert calls[-1] == calls[-2] == (dtype, wide, (3,))
        single = torch.cat([denoiser.x0(x[i : i + 1], t) for i, t in enumerate((0.1, 0.5, 0.9))])
        torch.testing.assert_close(single, denoiser.x0(x, scalar([0.1, 0.5, 0.9])), rtol=0, atol=0)


# Networks and their parameters


class Small(nn.Module):
    """A network with a condition, deterministic weights and a buffer."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 5).double(), nn.Linear(5, 2).double()
        self.register_buffer("gain", scalar(0.8))
        for k, p in enumerate(self.parameters()):
            p.data = torch.linspace(-1, 1, p.numel(), dtype=D).sin().reshape(p.shape) * (0.5 + 0.1 * k) + shift

    def forward(self, x, t, cond=None):
        c = torch.zeros_like(t) if cond is None else cond.to(t)
        return self.gain * self.outer(torch.tanh(self.inner(torch.cat((x, t[:, None], c[:, None]), 1))))


NAMES = {"net.inner.weight", "net.inner.bias", "net.outer.weight", "net.outer.bias"}


def loss(predictor, x, t):
    return sum((getattr(predictor, kind)(x, t) ** 2).sum() for kind in ("x0", "eps", "velocity"))


def fresh(params: dict) -> dict:
    return {k: v.detach().clone().requires_grad_() for k, v in params.items()}


@pytest.mark.parametrize("how", [{"prediction": "v"}, {"prediction": "eps"}, {"sigma_data": 0.7}], ids=str)
def test_gradients_through_with_params_are_those_of_the_module(how):
    net, x, t = Small(), normals(6, 2), torch.linspace(0.2, 0.9, 6, dtype=D)
    denoiser = Denoiser(net, VP(), **how)
    assert set(denoiser.params) == {"beta_min", "beta_max"} | NAMES
    p = fresh(denoiser.params)
    value = loss(denoiser.with_params(p), x, t)
    through = torch.autograd.grad(value, [p["net." + k] for k, _ in net.named_parameters()], retain_graph=True)
    own = loss(denoiser, x, t)
    direct = torch.autograd.grad(own, list(net.parameters()))
    assert torch.equal(value, own)
    for a, b in zip(through, direct, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)  # the same operations; sums in the same order
        assert b.abs().max().item() > 1e-3
    # the schedule's parameters, by central differences of h = 1e-4 beta: error 1e-8 + 1e-16/1e-4
    for name in ("beta_min", "beta_max"):
        (found,) = torch.autograd.grad(value, p[name], retain_graph=True)
        h = 1e-4 * float(p[name].detach())
        up, down = (loss(denoiser.with_params({name: p[name].detach() + s}), x, t).detach() for s in (h, -h))
        torch.testing.assert_close(found, (up - down) / (2 * h), rtol=1e-6, atol=1e-7)


def test_only_what_is_named_is_replaced():
    net = Small()
    denoiser = Denoiser(net, VP(), "v")
    before = copy.deepcopy(net.state_dict())
    assert denoiser.with_params({"other": scalar(1.0)}) is denoiser
    assert denoiser.with_params(denoiser.params) is denoiser
    moved = denoiser.with_params({"net.outer.bias": scalar([5.0, 6.0]), "beta_max": scalar(10.0)})
    assert moved.schedule.beta_max.item() == 10.0
    assert moved.params["net.inner.weight"] is denoiser.params["net.inner.weight"]
    x = normals(3, 2)
    shift = net.gain * (scalar([5.0, 6.0]) - net.outer.bias)
    torch.testing.assert_close(moved.raw(x, 0.5), denoiser.raw(x, 0.5) + shift, rtol=1e-14, atol=1e-14)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    net.outer.bias.data += 1.0  # as an optimiser does: seen at once
    torch.testing.assert_close(denoiser.raw(x, 0.5), moved.raw(x, 0.5) - shift + net.gain, rtol=1e-14, atol=1e-13)


def test_a_function_with_parameters():
    def net(x, t, cond, p):
        return p["gain"] * x * cond[:, None] + p["shift"] * t[:, None]

    given = {"gain": scalar(0.5), "shift": scalar([1.0, 2.0])}
    denoiser = Denoiser(net, CondOT(), "velocity", cond=scalar(3.0), parameters=given)
    assert set(denoiser.params) == {"net.gain", "net.shift"}
    x = normals(4, 2)
    torch.testing.assert_close(denoiser.raw(x, 0.5), 1.5 * x + 0.5 * given["shift"], rtol=1e-15, atol=1e-15)
    p = fresh(denoiser.params)
    (found,) = torch.autograd.grad(denoiser.with_params(p).raw(x, 0.25).sum(), p["net.shift"])
    torch.testing.assert_close(found, scalar([1.0, 1.0]), rtol=1e-15, atol=0)  # 4 rows x 0.25
    rows_of_it = denoiser.given(torch.arange(4.0)).raw(x, 0.5)
    torch.testing.assert_close(rows_of_it[3], 1.5 * x[3] + 0.5 * given["shift"], rtol=1e-15, atol=1e-15)
    plain = Denoiser(lambda x, t, p: p["gain"] * x, VP(), "eps", parameters={"gain": scalar(2.0)})
    assert torch.equal(plain.eps(x, 0.5), 2 * x)


# Guidance


def test_guidance_with_one_network_has_one_set_of_names():
    net, x, t = Small(), normals(6, 2), torch.linspace(0.2, 0.9, 6, dtype=D)
    base = Denoiser(net, VP(), "eps", null=scalar(-1.0))
    labels = torch.arange(6)
    guided = guide(base, 2.5, labels)
    assert set(guided.params) == {"beta_min", "beta_max", "guidance"} | NAMES
    c, u = base.given(labels), base.given(scalar(-1.0))
    for kind in KINDS:  # eps = eps_u + w (eps_c - eps_u), and so for every kind, which is linear in eps
        exact = getattr(u, kind)(x, t) + 2.5 * (getattr(c, kind)(x, t) - getattr(u, kind)(x, t))
        torch.testing.assert_close(getattr(guided, kind)(x, t), exact, rtol=1e-12, atol=1e-12)
        for scale, alone in ((1.0, c), (0.0, u)):
            torch.testing.assert_close(
                getattr(guide(base, scale, labels), kind)(x, t), getattr(alone, kind)(x, t), rtol=1e-13, atol=1e-13
            )
    p = fresh(guided.params)
    moved = guided.with_params(p)
    through = torch.autograd.grad(loss(moved, x, t), [p["net." + k] for k, _ in net.named_parameters()])
    direct = torch.autograd.grad(loss(guided, x, t), list(net.parameters()))
    for a, b in zip(through, direct, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # both branches, in another order of summation
    assert set(moved.params) == set(guided.params)
    (found,) = torch.autograd.grad(moved.eps(x, t).sum(), p["guidance"])
    torch.testing.assert_close(found, (c.eps(x, t) - u.eps(x, t)).sum().detach(), rtol=1e-13, atol=1e-13)
    shared = guide(base, 2.5, scalar(2.0))
    torch.testing.assert_close(shared.eps(x, t), guide(base, 2.5, torch.full((6,), 2)).eps(x, t), rtol=0, atol=0)


def test_guidance_with_two_networks_keeps_them_apart():
    x, t = normals(6, 2), torch.linspace(0.2, 0.9, 6, dtype=D)
    first, second = Small(), Small(0.3)
    guided = Guided(Denoiser(first, VP(), "v"), Denoiser(second, VP(), sigma_data=0.8), scalar(1.7))
    assert set(guided.params) == {"beta_min", "beta_max", "guidance"} | NAMES | {"unconditional." + k for k in NAMES}
    p = fresh(guided.params)
    found = dict(zip(p, torch.autograd.grad(loss(guided.with_params(p), x, t), list(p.values())), strict=True))
    for net, prefix in ((first, "net."), (second, "unconditional.net.")):
        direct = torch.autograd.grad(loss(guided, x, t), list(net.parameters()))
        for (name, _), exact in zip(net.named_parameters(), direct, strict=True):
            torch.testing.assert_close(found[prefix + name], exact, rtol=1e-12, atol=1e-12)
    # the schedule is one: its rate moves both branches
    h = 1e-3
    up, down = (loss(guided.with_params({"beta_max": scalar(20.0 + s)}), x, t).detach() for s in (h, -h))
    torch.testing.assert_close(
        found["beta_max"], (up - down) / (2 * h), rtol=1e-7, atol=1e-8
    )  # h^2 of a smooth function
    moved = guided.with_params({"beta_max": scalar(10.0)})
    assert moved.conditional.schedule.beta_max.item() == moved.unconditional.schedule.beta_max.item() == 10.0


def test_guidance_has_one_schedule():
    """Branches on equal schedules share the tensors of the first: a gradient by the schedule sees both branches."""
    x, beta = normals(4, 2), scalar(20.0).requires_grad_()
    nets = [Denoiser(Small(k), schedule, "v") for k, schedule in ((1.0, VP(beta_max=beta)), (0.3, VP()))]
    guided, h = Guided(*nets, 2.0), 1e-3
    assert guided.unconditional.schedule.beta_max is beta
    (found,) = torch.autograd.grad(loss(guided, x, 0.5), beta)
    up, down = (loss(guided.with_params({"beta_max": scalar(20.0 + s)}), x, 0.5).detach() for s in (h, -h))
    torch.testing.assert_close(found, (up - down) / (2 * h), rtol=1e-7, atol=1e-8)  # h^2 of a smooth function


@pytest.mark.parametrize("shared", [True, False])
def test_rebinding_guidance_asks_for_all_names_at_once(shared):
    """A branch builds its dict of n parameters when asked: asked for each of them, a call would take n^2."""

    class Net(Denoiser):
        asked = 0

        @property
        def params(self):
            Net.asked += 1
            return super().params

    def times_asked(n):
        given = [{f"p{i}": scalar(float(i)) for i in range(n)} for _ in range(2)]
        branches = [Net(lambda x, t, p: x, VP(), "eps", parameters=given[0 if shared else k]) for k in range(2)]
        guided = Guided(*branches, 2.0)
        p, Net.asked = fresh(guided.params), 0
        moved, asked = guided.with_params(p), Net.asked
        assert moved.conditional.params["net.p1"] is p["net.p1"]
        assert moved.unconditional.params["net.p1"] is p["net.p1" if shared else "unconditional.net.p1"]
        assert guided.with_params(guided.params) is guided
        assert guided.with_params({"other": scalar(1.0)}) is guided
        return asked

    assert times_asked(3) == times_asked(300) == 2  # once a branch


# Clipping


def test_clipping_recomputes_the_noise():
    """x = alpha x0 + sigma eps after clipping as before it; with the stale eps that fails."""
    x, t = 3 * normals(8, 2), torch.linspace(0.1, 0.99, 8, dtype=D)
    inner = Denoiser(Small(), VP(), "v")
    clipped = Clipped(inner, -0.5, 0.6)
    x0, eps = clipped.pair(x, t)
    plain = inner.x0(x, t)
    assert torch.equal(x0, plain.clamp(-0.5, 0.6))
    assert 0 < int(((plain < -0.5) | (plain > 0.6)).sum()) < 16
    a, s = rows(clipped.schedule.alpha(t), x), rows(clipped.schedule.sigma(t), x)
    torch.testing.assert_close(a * x0 + s * eps, x, rtol=1e-14, atol=1e-14)
    assert (a * x0 + s * inner.eps(x, t) - x).abs().max().item() > 0.1  # negative control
    for kind in ("score", "v", "velocity"):
        torch.testing.assert_close(
            getattr(clipped, kind)(x, t), convert(x0, x, t, VP(), "x0", kind), rtol=1e-12, atol=1e-12
        )
    wide = Clipped(inner, -100.0, 100.0)
    for mine, theirs in zip(wide.pair(x, t), inner.pair(x, t), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)  # eps from x - alpha x0: / sigma >= 0.3
    assert set(clipped.params) == set(inner.params)
    assert clipped.with_params({"beta_max": scalar(3.0)}).schedule.beta_max.item() == 3.0
    assert clipped.with_params(clipped.params) is clipped
    below = Clipped(inner, -math.inf, scalar(0.6))  # one bound, and a tensor that is a number
    assert torch.equal(below.x0(x, t), plain.clamp(max=0.6))


# Bad input


def wide(x, t):
    """A network with a learned variance: twice the channels."""
    return torch.cat((x, x), 1)


def labelled(x, t, label):
    return x * label[:, None]


X = torch.ones(3, 2)
PLAIN = Denoiser(identity, VP(), "eps")
ZERO = Table(scalar([0.9, 0.5, 0.0]))
BAD = {
    "no network": (call(Denoiser, 3, VP(), "eps"), ArgumentTypeError, "module or a function"),
    "no schedule": (call(Denoiser, identity, "VP", "eps"), ArgumentTypeError, r"such as VP\(\)"),
    "a schedule's class": (call(Denoiser, identity, VP, "eps"), ArgumentTypeError, r"such as VP\(\)"),
    "no prediction": (call(Denoiser, identity, VP()), ArgumentError, "`sigma_data` for a preconditioned"),
    "both": (call(Denoiser, identity, VP(), "eps", sigma_data=1.0), ArgumentError, "give `prediction`"),
    "epsilon": (call(Denoiser, identity, VP(), "epsilon"), ArgumentError, "here it is called 'eps'"),
    "v_prediction": (call(Denoiser, identity, VP(), "v_prediction"), ArgumentError, "here it is called 'v'"),
    "sample": (call(Denoiser, identity, VP(), "sample"), ArgumentError, "here it is called 'x0'"),
    "F": (call(Denoiser, identity, VP(), "F"), ArgumentError, "sigma_data="),
    "nonsense": (call(Denoiser, identity, VP(), "e"), ArgumentError, "must be one of 'eps', 'x0', 'v'"),
    "a list": (call(Denoiser, identity, VP(), ["eps"]), ArgumentError, "must be one of"),
    "sigma_data 0": (call(Denoiser, identity, VP(), sigma_data=0.0), ArgumentError, "standard deviation"),
    "sigma_data -1": (call(Denoiser, identity, VP(), sigma_data=scalar(-1.0)), ArgumentError, "standard deviation"),
    "sigma_data NaN": (call(Denoiser, identity, VP(), sigma_data=math.nan), ArgumentError, "standard deviation"),
    "sigma_data text": (call(Denoiser, identity, VP(), sigma_data="1"), ArgumentTypeError, "number"),
    "sigma_data vector": (call(Denoiser, identity, VP(), sigma_data=scalar([1.0, 2.0])), ArgumentTypeError, "must be a number"),
    "eps without signal": (call(Denoiser, identity, CondOT(), "eps"), ArgumentError, "predict 'v' or 'x0'"),
    "score without signal": (call(Denoiser, identity, Cosine(-math.inf), "score"), ArgumentError, r"min_log_snr=-20"),
    "F without signal": (call(Denoiser, identity, ZERO, sigma_data=1.0), ArgumentError, "end the schedule sooner"),
    "velocity of a table to 0": (call(Denoiser, identity, ZERO, "velocity"), ArgumentError, "predict 'v' or 'x0'"),
    "eps of a table to 0": (call(Denoiser, identity, ZERO, "eps"), ArgumentError, "end the schedule sooner"),
    "a number among parameters": (
        call(Denoiser, lambda x, t, p: x, VP(), "eps", parameters={"a": 1.0}), ArgumentTypeError, "torch.tensor",
    ),
    "one name for two": (
        call(Denoiser, lambda x, t, p: x, LogSNR(lambda t, p: p["net.a"] - 20 * t, {"net.a": scalar(9.0)}), "eps", parameters={"a": scalar(1.0)}),
        ArgumentError, "rename",
    ),
    "learned variance": (call(Denoiser(wide, VP(), "eps").x0, X, 0.5), ShapeError, "no learned variance"),
    "one number a row": (call(Denoiser(lambda x, t: x[:, 0], VP(), "v").x0, X, 0.5), ShapeError, "shape of x"),
    "no tensor": (call(Denoiser(lambda x, t: (x, x), VP(), "v").x0, X, 0.5), ShapeError, "tuple"),
    "condition of other rows": (
        call(Denoiser(labelled, VP(), "v", cond=torch.arange(4)).x0, X, 0.5), ShapeError, "one a row",
    ),
    "condition of one row": (
        call(Denoiser(labelled, VP(), "v", cond=torch.ones(1)).x0, X, 0.5), ShapeError, "0-dim tensor that all rows share",
    ),
    "t of other rows": (call(PLAIN.x0, X, scalar([0.1, 0.2])), ShapeError, "one for all"),
    "t past the end": (call(PLAIN.x0, X, 2.0), GridError, "outside"),
    "t NaN": (call(PLAIN.eps, X, math.nan), GridError, "nan"),
    "score of the data": (call(PLAIN.score, X, 0.0), GridError, "use t > 0"),
    "eps of the data": (call(PLAIN.eps, X, scalar([0.5, 0.0, 0.5])), GridError, "use t > 0"),
    "clipped data": (call(Clipped(PLAIN, -1.0, 1.0).eps, X, 0.0), GridError, "use t > 0"),
    "convert at the data": (call(convert, X, X, 0.0, VP(), "x0", "score"), GridError, "use t > 0"),
    "convert eps without signal": (
        call(convert, X, X, 1.0, CondOT(), "eps", "x0"), ArgumentError, r"t_of_log_snr\(-20\)",
    ),
    "convert the velocity of a table to 0": (
        call(convert, X, X, scalar([1e-9, 0.5, 1.0]), ZERO, "velocity", "x0"), ArgumentError, "needs some signal",
    ),
    "convert another shape": (call(convert, X[:1], X, 0.5, VP(), "eps", "x0"), ShapeError, "shape of `x`"),
    "convert from epsilon": (call(convert, X, X, 0.5, VP(), "epsilon", "x0"), ArgumentError, "'eps'"),
    "convert to flow": (call(convert, X, X, 0.5, VP(), "eps", "flow"), ArgumentError, "'velocity'"),
    "guide without null": (call(guide, PLAIN, 2.0, scalar(1.0)), ArgumentError, "give it `null`"),
    "guide a function": (call(guide, identity, 2.0, scalar(1.0)), ArgumentTypeError, r"Guided\(c, u, scale\)"),
    "guided function": (call(Guided, PLAIN, identity, 2.0), ArgumentTypeError, "`unconditional` must be a Denoiser"),
    "guided by text": (call(Guided, PLAIN, PLAIN, "2"), ArgumentTypeError, "0-dim tensor"),
    "guided by a scale a row": (call(Guided, PLAIN, PLAIN, torch.ones(3)), ShapeError, "`scale` must be one number"),
    "guided by integers": (call(Guided, PLAIN, PLAIN, torch.tensor(2)), ArgumentTypeError, "float64"),
    "guided on two schedules": (
        call(Guided, PLAIN, Denoiser(identity, VP(0.1, 10.0), "eps"), 2.0), ArgumentError, "same one",
    ),
    "guided twice": (call(Guided, Guided(PLAIN, PLAIN, 2.0), PLAIN, 3.0), ArgumentError, "guided already"),
    "clipped to nothing": (call(Clipped, PLAIN, 1.0, 1.0), ArgumentError, "`low` must be below `high`"),
    "clipped by text": (call(Clipped, PLAIN, "0", 1.0), ArgumentTypeError, "`low` must be a number"),
    "clipped by a tensor": (call(Clipped, PLAIN, 0.0, X), ArgumentTypeError, "`high` must be a number"),
    "clipped by NaN": (call(Clipped, PLAIN, math.nan, 1.0), ArgumentError, "`low` must lie in"),
    "lent to a function": (call(Lent, identity, ("a",)), ArgumentTypeError, r"`module` must be an nn.Module"),
    "clipped function": (call(Clipped, identity, 0.0, 1.0), ArgumentTypeError, "Denoiser"),
}  # fmt: skip


@pytest.mark.parametrize("bad", list(BAD))
def test_bad_input(bad):
    act, error, words = BAD[bad]
    with pytest.raises(error, match=words):
        act()


# What a network may not do


def test_a_network_that_writes_into_its_input_is_refused():
    class Inplace(nn.Module):
        def forward(self, x, t):
            return torch.relu_(x)

    x = normals(2, 3)
    with pytest.raises(NotAFunctionError, match="writes into its input"):
        Denoiser(Inplace(), VP(), "eps").x0(x.clone(), 0.5)
    with pytest.raises(NotAFunctionError, match="condition"):
        Denoiser(lambda x, t, c: x * c.mul_(2)[:, None], VP(), "eps").given(torch.ones(2)).x0(x, 0.5)
    with torch.inference_mode():  # torch does not count what is written there: a copy is handed over
        y = torch.ones(2, 3)
        Denoiser(Inplace(), VP(), "eps").x0(-y, 0.5)
        Denoiser(lambda x, t: x.mul_(0), VP(), "eps").x0(y, 0.5)
        assert y.min() == 1
    with pytest.raises(NotAFunctionError, match="writes into its input"):
        Denoiser(lambda x, t: x.mul_(2), VP(), "eps").x0(torch.ones(2, 3, requires_grad=True), 0.5)
    t = torch.full((2,), 0.5, dtype=D)
    Denoiser(lambda x, t: x * t.mul_(2)[:, None], VP(), "eps").x0(x, t)  # times are its own
    assert t.tolist() == [0.5, 0.5]


def test_a_network_whose_parameters_are_replaced_is_called_as_it_is():
    class Line(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.layer = nn.Linear(2, 2, bias=False)
            self.layer.weight = nn.Parameter(w * torch.eye(2, dtype=D))

        def forward(self, x, t):
            return self.layer(x)

    net, x = Line(1.0), normals(3, 2)
    denoiser = Denoiser(net, VP(), "x0")
    net.load_state_dict(Line(2.0).state_dict(), assign=True)
    assert torch.equal(denoiser.x0(x, 0.5), 2 * x)
    assert torch.equal(denoiser.params["net.layer.weight"], 2 * torch.eye(2, dtype=D))
    net.layer = Line(3.0).layer
    assert torch.equal(denoiser.x0(x, 0.5), 3 * x)
    lent = denoiser.with_params({"net.layer.weight": 5 * torch.eye(2, dtype=D)})
    assert torch.equal(lent.x0(x, 0.5), 5 * x)
    assert torch.equal(denoiser.x0(x, 0.5), 3 * x)


def test_dtypes_that_do_not_meet_are_named():
    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x, t):
            return self.layer(x)

    with pytest.raises(DtypeError, match=r"states in torch.float64, and its weights are torch.float32"):
        Denoiser(Line(), VP(), "eps").x0(normals(2, 2), 0.5)
    assert "6 parameters" in repr(Denoiser(Line(), VP(), "eps"))
    with pytest.raises(ArgumentError, match="a module brings its own"):
        Denoiser(Line(), VP(), "eps", parameters={"w": torch.ones(())})
    with pytest.raises(ArgumentError, match="given"):
        Denoiser(lambda x, t, c: x, VP(), "eps", null=torch.tensor(0)).x0(normals(2, 2), 0.5)
