"""sdeint: the scheme against a loop, torchsde and exact solutions; its derivatives; the grid; its noise."""

import math

import numpy as np
import pytest
import torch
import torchsde
from scipy import stats
from torch.func import grad, jacfwd, jacrev, vmap

from sdesens import SDE, Antithetic, Coarsened, GivenNoise, Philox, sdeint
from sdesens.errors import NonFiniteError

F64, CPU = torch.float64, torch.device("cpu")


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def normals(source, paths, steps, dim, dtype=F64):
    return source.normals(0, paths, 0, steps, dim, dtype=dtype, device=CPU)


# One equation for each noise type: coupled, nonlinear, and dependent on time.

P = {"a": torch.tensor(0.8, dtype=F64), "s": torch.tensor([0.3, 0.5], dtype=F64)}
B, N, T0, T1 = 6, 24, 0.25, 1.75


def drift(t, y, p):
    return p["a"] * torch.sin(y.flip(-1) + t) - y


def diagonal(t, y, p):
    return p["s"] * torch.cos(y) * (1 + t)


def general(t, y, p):
    rows = torch.stack((y.flip(-1), p["s"] * torch.cos(y), p["a"] + 0 * y), -1)  # (B, 2, 3)
    return rows * (0.3 + 0.1 * t)


EQUATIONS = {
    "diagonal": SDE(drift, diagonal, P),
    "scalar": SDE(drift, lambda t, y, p: general(t, y, p)[..., :1], P, "scalar"),
    "additive": SDE(drift, lambda t, y, p: torch.outer(p["s"], torch.stack((p["a"], t, t * t))), P, "additive"),
    "general": SDE(drift, general, P, "general"),
}
WIDTH = {"diagonal": 2, "scalar": 1, "additive": 3, "general": 3}
every_noise = pytest.mark.parametrize("name", EQUATIONS)


def loop(sde, y, t0, t1, dW):
    """Euler-Maruyama written out; returns every state."""
    h, ys = (t1 - t0) / len(dW), [y]
    for n, increment in enumerate(dW):
        t = torch.tensor(t0 + n * h, dtype=y.dtype)
        g = sde.diffusion(t, y, sde.params)
        if sde.noise_type == "diagonal":
            g = torch.diag_embed(g)
        g = g.expand(len(y), *g.shape[-2:])
        y = y + sde.drift(t, y, sde.params) * h + torch.einsum("bij,bj->bi", g, increment)
        ys.append(y)
    return torch.stack(ys)


# the scheme


@every_noise
def test_sdeint_is_the_loop(name):
    sde, y0 = EQUATIONS[name], rand(B, 2)
    dW = normals(Philox(7), B, N, WIDTH[name]) * math.sqrt((T1 - T0) / N)
    every = [T0 + (T1 - T0) * n / N for n in range(N + 1)]
    ys = sdeint(sde, y0, every, n_steps=N, seed=7)
    assert ys.shape == (N + 1, B, 2)
    # the order of the products differs, so 24 steps of a few roundings each
    assert torch.allclose(ys, loop(sde, y0, T0, T1, dW), rtol=1e-13, atol=1e-14)
    assert torch.equal(ys[0], y0)


class ForTorchsde:
    """An SDE of ours as torchsde wants it."""

    sde_type = "ito"

    def __init__(self, sde):
        self.sde, self.noise_type = sde, sde.noise_type

    def f(self, t, y):
        return self.sde.drift(t, y, self.sde.params)

    def g(self, t, y):
        g = self.sde.diffusion(t, y, self.sde.params)
        return g.expand(len(y), *g.shape) if self.noise_type == "additive" else g


class Increments(torchsde.BaseBrownian):
    """Increments (N, B, m) that are known on a grid, as a Brownian motion of torchsde."""

    def __init__(self, dW, t0, h):
        super().__init__()
        self.dW, self.t0, self.h = dW, t0, h

    def __call__(self, ta, tb=None, return_U=False, return_A=False):
        return self.dW[round((float(ta) - self.t0) / self.h) : round((float(tb) - self.t0) / self.h)].sum(0)

    def __repr__(self):
        return "Increments"

    dtype, device = F64, CPU
    shape = property(lambda self: self.dW.shape[1:])
    levy_area_approximation = "none"


@every_noise
def test_sdeint_equals_torchsde_on_the_same_increments(name):
    sde, y0, h = EQUATIONS[name], rand(B, 2), (T1 - T0) / N
    source = Philox(8)
    dW = normals(source, B, N, WIDTH[name]) * math.sqrt(h)
    ts = torch.tensor([T0, T0 + 6 * h, T1], dtype=F64)
    bm = Increments(dW, T0, h)
    theirs = torchsde.sdeint(ForTorchsde(sde), y0, ts, bm=bm, method="euler", dt=h)
    for noise in (source, dW, bm):  # our noise to them, and theirs to us
        assert torch.allclose(sdeint(sde, y0, ts, n_steps=N, bm=noise), theirs, rtol=1e-13, atol=1e-14)
    assert torch.allclose(sdeint(ForTorchsde(sde), y0, ts, n_steps=N, bm=dW), theirs, rtol=1e-13, atol=1e-14)


def test_a_brownian_interval_of_torchsde_can_be_the_noise():
    sde, y0, h = EQUATIONS["general"], rand(B, 2), (T1 - T0) / N
    bm = torchsde.BrownianInterval(T0, T1, size=(B, 3), dtype=F64, entropy=3)
    dW = torch.stack([bm(T0 + n * h, T0 + (n + 1) * h) for n in range(N)])
    ys = sdeint(sde, y0, (T0, T1), n_steps=N, bm=bm)
    assert torch.allclose(ys[-1], loop(sde, y0, T0, T1, dW)[-1], rtol=1e-12)


@every_noise
def test_intermediate_outputs_are_the_states_of_the_grid(name):
    sde, y0, h = EQUATIONS[name], rand(B, 2), (T1 - T0) / N
    every = torch.linspace(T0, T1, N + 1, dtype=F64)
    whole = sdeint(sde, y0, every, n_steps=N, seed=3)
    for chosen in ([0, N], [0, 1, 2, N], [0, 5, 16, 17, N], list(range(0, N + 1, 4))):
        assert torch.equal(sdeint(sde, y0, every[chosen], n_steps=N, seed=3), whole[chosen])
        assert torch.equal(sdeint(sde, y0, every[chosen], dt=h, seed=3), whole[chosen])


def test_a_shorter_run_is_the_beginning_of_a_longer_one():
    sde, y0 = EQUATIONS["diagonal"], rand(B, 2)
    long = sdeint(sde, y0, (0.0, 0.5, 1.0), n_steps=32, seed=3)
    assert torch.equal(sdeint(sde, y0, (0.0, 0.5), n_steps=16, seed=3)[-1], long[1])
    assert torch.equal(sdeint(sde, y0[:2], (0.0, 0.5, 1.0), n_steps=32, seed=3), long[:, :2])


@pytest.mark.parametrize("event", [(1,), (3,), (2, 3), (1, 2, 2)])
def test_diagonal_noise_takes_any_event_shape(event):
    sde = SDE(lambda t, y, p: -y * t, lambda t, y, p: 0.3 * torch.cos(y))
    y0 = rand(5, *event)
    ys = sdeint(sde, y0, (0.0, 0.5, 1.0), n_steps=8, seed=1)
    assert ys.shape == (3, 5, *event)
    flat = sdeint(sde, y0.flatten(1), (0.0, 0.5, 1.0), n_steps=8, seed=1)
    assert torch.equal(ys.flatten(2), flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_dtype_is_that_of_the_state(dtype):
    def solve(dtype):
        seen = []

        def drift(t, y, p):
            seen.append(t.dtype)
            return p["a"] * y

        sde = SDE(drift, lambda t, y, p: p["s"] * y, {k: v.to(dtype) for k, v in P.items()})
        ys = sdeint(sde, torch.ones(50, 2, dtype=dtype), (0.0, 1.0), n_steps=20, seed=1)
        assert set(seen) == {dtype}
        assert ys.dtype == dtype
        return ys.double()

    # float32 sees the same noise: 20 steps of a few roundings, on states below 10
    assert float((solve(dtype) - solve(F64)).abs().max()) < 20 * 20 * torch.finfo(dtype).eps


def test_long_float32_runs_stay_on_the_grid():
    # times are integers times a float64 step: 1,000 steps of 1e-3 end at 1 and none is short
    seen = []
    sde = SDE(lambda t, y, p: (seen.append(float(t)), 0 * y)[1], lambda t, y, p: torch.ones_like(y))
    sdeint(sde, torch.zeros(1, 1), (0.0, 1.0), dt=1e-3, seed=1, check=False)
    times = np.array(seen[-1000:])
    assert np.array_equal(times, (np.arange(1000) * 1e-3).astype(np.float32))


# orders of convergence, against the exact solution on the same Brownian path


MU, SIGMA = 0.6, 0.8
GBM = SDE(lambda t, y, p: MU * y, lambda t, y, p: SIGMA * y)
ADDITIVE = SDE(lambda t, y, p: MU * torch.sin(y), lambda t, y, p: SIGMA * torch.ones_like(y))
FINE, FACTORS = 512, (1, 2, 4, 8, 16)


def slope(errors):
    h = [f / FINE for f in FACTORS]
    return float(np.polyfit(np.log(h), np.log(errors), 1)[0])


def final(sde, source, paths, steps):
    return sdeint(sde, torch.ones(paths, 1, dtype=F64), (0.0, 1.0), n_steps=steps, bm=source)[-1, :, 0]


def test_strong_order_is_one_half():
    paths, source = 4000, Philox(5)
    W = normals(source, paths, FINE, 1).sum((0, 2)) / math.sqrt(FINE)
    exact = torch.exp((MU - SIGMA**2 / 2) + SIGMA * W)
    errors = [
        float((final(GBM, Coarsened(source, f), paths, FINE // f) - exact).square().mean().sqrt()) for f in FACTORS
    ]
    # 4,000 paths fix the slope to about 0.02; the rest is the next order at the coarsest step
    assert abs(slope(errors) - 0.5) < 0.06
    # negative control: paths that are not on the same Brownian motion do not converge
    apart = [float((final(GBM, Philox(6 + f), paths, FINE // f) - exact).square().mean().sqrt()) for f in FACTORS]
    assert abs(slope(apart)) < 0.1


def test_strong_order_is_one_for_additive_noise():
    source, paths = Philox(5), 2000
    exact = final(ADDITIVE, source, paths, 2048)
    errors = [
        float((final(ADDITIVE, Coarsened(source, 4 * f), paths, FINE // f) - exact).square().mean().sqrt())
        for f in FACTORS[1:]
    ]
    fitted = np.polyfit(np.log(FACTORS[1:]), np.log(errors), 1)[0]
    assert abs(fitted - 1.0) < 0.12  # the reference has 1/8 of the smallest step: 0.08 of it shows in the slope


def test_weak_order_is_one():
    # E X_T of the scheme is (1 + mu h)^N; the difference to exp(mu) is measured against the exact path, whose mean is known,
    # so that the noise of both cancels.
    paths, source = 40_000, Antithetic(Philox(9))
    errors = []
    for f in (8, 16, 32, 64):
        steps = FINE // f
        W = normals(source, paths, steps, 1).sum((0, 2)) / math.sqrt(steps)
        gap = final(GBM, source, paths, steps) - torch.exp((MU - SIGMA**2 / 2) + SIGMA * W)
        wanted = (1 + MU / steps) ** steps - math.exp(MU)
        pairs = gap.unflatten(0, (-1, 2)).mean(1)
        z = (float(pairs.mean()) - wanted) / float(pairs.std()) * math.sqrt(len(pairs))
        assert abs(z) < stats.norm.isf(1e-6 / 2 / 4)  # four comparisons, false alarm 1e-6 in all
        errors.append(abs(wanted))
    assert abs(np.polyfit(np.log([8, 16, 32, 64]), np.log(errors), 1)[0] - 1.0) < 0.05


def test_weak_error_is_measured_with_order_one():
    # E X_T^2 and E X_T by simulation only. Standard error of the fit: the control exact - scheme leaves a spread of about
    # sqrt(h), so each error is known to 2 per cent or better here and the slope to 0.03.
    paths, errors, steps_list = 400_000, [], (4, 8, 16)
    for steps in steps_list:
        source = Philox(12)
        W = normals(source, paths, steps, 1).sum((0, 2)) / math.sqrt(steps)
        exact = torch.exp((MU - SIGMA**2 / 2) + SIGMA * W)
        gap = final(GBM, source, paths, steps) - exact
        assert float(gap.std()) / math.sqrt(paths) < 0.03 * abs(float(gap.mean()))
        errors.append(abs(float(gap.mean())))
    assert abs(np.polyfit(np.log(1 / np.array(steps_list)), np.log(errors), 1)[0] - 1.0) < 0.15


# derivatives


def small(name, y0, a, s, t1=None, n=5):
    sde = EQUATIONS[name].with_params(a=a, s=s)
    ts = (0.0, 1.0) if t1 is None else torch.stack((torch.zeros_like(t1), t1))
    return sdeint(sde, y0, ts, n_steps=n, seed=2)[-1]


@every_noise
def test_autograd_agrees_with_differences(name):
    inputs = [x.clone().requires_grad_() for x in (rand(3, 2), P["a"], P["s"], torch.tensor(1.2, dtype=F64))]
    assert torch.autograd.gradcheck(lambda *x: small(name, *x), inputs)


def test_second_derivatives_agree_with_differences():
    inputs = [x.clone().requires_grad_() for x in (rand(2, 2), P["a"], P["s"])]
    assert torch.autograd.gradgradcheck(lambda *x: small("general", *x, n=3), inputs)


def test_the_horizon_moves_every_time_in_proportion():
    # x_{n+1} = x_n + t_n h: X_T = sum t_n h = T^2 (N - 1) / (2 N), so d/dT = T (N - 1) / N; the outputs scale with T
    sde = SDE(lambda t, y, p: t.expand_as(y), lambda t, y, p: 0 * y)
    t1 = torch.tensor(3.0, dtype=F64, requires_grad=True)
    ts = torch.stack((torch.zeros(()), torch.tensor(1.5), t1))
    ys = sdeint(sde, torch.zeros(1, 1, dtype=F64), ts, n_steps=6, seed=0)
    (at_end,) = torch.autograd.grad(ys[-1].sum(), t1, retain_graph=True)
    (at_middle,) = torch.autograd.grad(ys[1].sum(), t1)
    assert float(at_end) == pytest.approx(3 * 5 / 6, rel=1e-13)
    assert float(at_middle) == pytest.approx(2 * 3 * (0.5**2) * 2 / 6, rel=1e-13)


def test_torch_func_agrees_with_autograd():
    y0 = rand(4, 2)

    def loss(a, s):
        return (small("general", y0, a, s) ** 2).sum()

    leaves = [P["a"].clone().requires_grad_(), P["s"].clone().requires_grad_()]
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    for transform in (grad, jacfwd, jacrev):
        for got, want in zip(transform(loss, argnums=(0, 1))(P["a"], P["s"]), wanted, strict=True):
            assert torch.allclose(got, want, rtol=1e-12)
    hessian = jacfwd(grad(loss))(P["a"], P["s"])
    step = 1e-5
    difference = (grad(loss)(P["a"] + step, P["s"]) - grad(loss)(P["a"] - step, P["s"])) / (2 * step)
    assert float(hessian) == pytest.approx(float(difference), rel=1e-6)


@every_noise
def test_vmap_over_parameters_equals_a_loop(name):
    y0, values = rand(4, 2), torch.linspace(0.2, 1.4, 5, dtype=F64)
    together = vmap(lambda a: small(name, y0, a, P["s"]))(values)
    assert torch.allclose(together, torch.stack([small(name, y0, a, P["s"]) for a in values]), rtol=1e-13)
    gradients = vmap(grad(lambda a: small(name, y0, a, P["s"]).sum()))(values)
    alone = torch.stack([grad(lambda a: small(name, y0, a, P["s"]).sum())(a) for a in values])
    assert torch.allclose(gradients, alone, rtol=1e-12)


def test_vmap_over_states_and_increments():
    sde, y0, dW = EQUATIONS["general"], rand(3, 4, 2), rand(3, 6, 4, 3) - 0.5
    together = vmap(lambda y, w: sdeint(sde, y, (0.0, 1.0), n_steps=6, bm=w))(y0, dW)
    assert torch.allclose(together[1], sdeint(sde, y0[1], (0.0, 1.0), n_steps=6, bm=dW[1]), rtol=1e-13)


def test_the_derivative_in_the_noise_is_there():
    sde, y0 = EQUATIONS["general"], rand(2, 2)
    dW = (rand(4, 2, 3) - 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: sdeint(sde, y0, (0.0, 1.0), n_steps=4, bm=w)[-1], dW)


def test_closures_can_be_transformed():
    def loss(a):
        sde = SDE(lambda t, y, p: a * y, lambda t, y, p: 0.2 * y)
        return sdeint(sde, torch.ones(3, 1, dtype=F64), (0.0, 1.0), n_steps=4, seed=0)[-1].sum()

    values = torch.tensor([0.1, 0.4], dtype=F64)
    assert torch.allclose(vmap(grad(loss))(values), torch.stack([grad(loss)(a) for a in values]))


def test_a_hundred_thousand_steps_with_a_gradient_through_them():
    # no recursion anywhere. X' = X (1 + a h + s dW): dX_T / da = X_T sum_n h / (1 + a h + s dW_n)
    n, a = 100_000, torch.tensor(0.1, dtype=F64, requires_grad=True)
    sde = SDE(lambda t, y, p: p["a"] * y, lambda t, y, p: 0.2 * y, {"a": a})
    x = sdeint(sde, torch.ones(2, 1, dtype=F64), (0.0, 1.0), n_steps=n, seed=1, check=False)[-1]
    (gradient,) = torch.autograd.grad(x.sum(), a)
    dW = normals(Philox(1), 2, n, 1) / math.sqrt(n)
    factors = 1 + 0.1 / n + 0.2 * dW
    wanted = (factors.prod(0) * (1 / factors).sum(0) / n).sum()
    assert float(gradient) == pytest.approx(float(wanted), rel=1e-9)  # 1e5 roundings
    assert float(x.detach().sum()) == pytest.approx(float(factors.prod(0).sum()), rel=1e-9)


# the noise of a run


def test_solving_again_gives_the_same_bits():
    sde, y0 = EQUATIONS["diagonal"], rand(B, 2)
    for noise in ({"seed": 4}, {"bm": Philox(4)}, {"bm": Antithetic(Philox(4))}, {"bm": GivenNoise(rand(N, B, 2))}):
        first, second = (sdeint(sde, y0, (T0, T1), n_steps=N, **noise) for _ in range(2))
        assert torch.equal(first, second)
    assert torch.equal(sdeint(sde, y0, (T0, T1), n_steps=N, seed=4), sdeint(sde, y0, (T0, T1), n_steps=N, bm=Philox(4)))


@pytest.mark.parametrize("check", [True, False])
def test_checks_change_nothing(check):
    sde, y0 = EQUATIONS["diagonal"], rand(B, 2)
    before, kept = torch.get_rng_state(), y0.clone()
    ys = sdeint(sde, y0, (T0, T1), n_steps=N, seed=4, check=check)
    assert torch.equal(ys, sdeint(sde, y0, (T0, T1), n_steps=N, seed=4))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(y0, kept)


def test_without_a_seed_every_call_is_new_and_the_global_generator_is_left_alone():
    sde, y0 = EQUATIONS["diagonal"], rand(B, 2)
    results = []
    for _ in range(3):
        torch.manual_seed(0)  # must not matter
        before = torch.get_rng_state()
        results.append(sdeint(sde, y0, (T0, T1), n_steps=4))
        assert torch.equal(before, torch.get_rng_state())
    assert not any(torch.equal(results[i], results[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_seeds_and_paths_differ():
    sde, y0 = EQUATIONS["diagonal"], torch.ones(B, 2, dtype=F64)
    one, other = (sdeint(sde, y0, (T0, T1), n_steps=4, seed=s)[-1] for s in (1, 2))
    assert torch.stack((one, other)).unique().numel() == 2 * one.numel()


# paths that blow up: x' = x^2 from x leaves every number after a known number of steps


def explosive(x0, **options):
    sde = SDE(lambda t, y, p: y**2, lambda t, y, p: 0 * y)
    y0 = torch.tensor(x0, dtype=F64)[:, None]
    return sdeint(sde, y0, (1.0, 3.0), n_steps=20, seed=0, **options)


def first_bad_step(x, h):
    for n in range(1, 21):
        x = x + x * x * h
        if not np.isfinite(x):
            return n
    return None


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_blow_up_is_reported_with_path_step_and_time():
    steps = [first_bad_step(np.float64(x), 0.1) for x in (0.1, 50.0, 0.2, 1e5)]
    assert steps[0] is None
    assert steps[2] is None
    assert steps[3] < steps[1]
    with pytest.raises(NonFiniteError, match=r"2 of 4 paths became NaN or infinite; first path 3 in step") as caught:
        explosive([0.1, 50.0, 0.2, 1e5])
    error = caught.value
    assert (error.paths, error.n_bad, error.step) == ((1, 3), 2, steps[3])
    assert error.time == pytest.approx(1.0 + 0.1 * steps[3])
    assert "raise `n_steps`" in str(error)
    assert isinstance(error, ArithmeticError)


def test_check_off_returns_the_infinities():
    assert not torch.isfinite(explosive([50.0, 1e5], check=False)[-1]).any()


def test_many_bad_paths_are_counted_and_a_few_are_named():
    with pytest.raises(NonFiniteError) as caught:
        explosive([0.1] + [1e5] * 30)
    assert caught.value.n_bad == 30
    assert caught.value.paths == tuple(range(1, 9))
