"""Compiled kernels: the same numbers as the plain functions, compiled once, and never where it is not worth it.

Compiled and plain runs do the same arithmetic on the same normals, but the elementary functions of the transform differ by
a few units in the last place, and sums over a group are taken in another order: float64 results agree to about 1e-12 of
their size, and that is what is asked, with a factor of ten to spare.
"""

import functools
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import sdesens as ss
import sdesens.integrate.kernel as kernel_module
from sdesens.errors import ArgumentError, SlowPathWarning
from sdesens.integrate.compiled import LEAST, REPAYS, kernel_length, wanted
from sdesens.integrate.kernel import Kernel, _identity, _say_once
from sdesens.noise import Antithetic, Coarsened, GivenNoise, Philox, elementary
from sdesens.noise.source import fused

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"
)
F64, CPU = torch.float64, torch.device("cpu")
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def words(n: int = 200_000) -> torch.Tensor:
    ends = torch.tensor([-(2**31), 2**31 - 1, 0, -1, 1, 2**30, -(2**30), 2**29, -1257966797], dtype=torch.int64)
    random = torch.from_numpy(np.random.default_rng(1).integers(-(2**31), 2**31, n))
    return torch.cat((ends, random)).to(torch.int32)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_elementary_functions_against_extended_precision(dtype):
    """-2 log u to 3 units of its own last place; cos and sin to 2 of the last place of 1, where they are radii's factors."""
    s, eps = words(), torch.finfo(dtype).eps
    u = (s.numpy().astype(np.longdouble) + np.longdouble(0.5)) / np.longdouble(2) ** 32
    log = -2 * np.log(u - np.floor(u))
    got = elementary.minus_two_log(s, dtype).numpy().astype(np.longdouble)
    assert float(np.max(np.abs(got - log) / log)) < 3 * eps
    turn = 2 * np.pi * u.astype(np.float64)  # rounded: 3e-16 in the angle, within the tolerance
    for got, exact in zip(elementary.cos_sin(s, dtype), (np.cos(turn), np.sin(turn)), strict=True):
        assert float(np.max(np.abs(got.double().numpy() - exact))) < 2 * eps + 4e-16


SOURCES = [Philox(7, 3), Antithetic(Philox(-5)), Coarsened(Philox(9), 2), Coarsened(Antithetic(Philox(2**63)), 3)]


@pytest.mark.parametrize("source", SOURCES, ids=repr)
@pytest.mark.parametrize(("dim", "steps"), [(1, 4), (2, 2), (3, 4), (10, 2), (10, 4)])
def test_noise_inside_a_kernel_is_the_noise_outside(source, dim, steps):
    draw, key = fused(source, CPU)
    inside = draw(key, 100 + torch.arange(37), torch.tensor(8), steps, dim, F64)
    outside = source.normals(100, 37, 8, steps, dim, dtype=F64, device=CPU)
    assert torch.equal(torch.stack(inside), outside)


def test_given_noise_has_no_form_inside_a_kernel():
    assert fused(GivenNoise(torch.zeros(4, 2, 1)), CPU) is None


@pytest.mark.parametrize(("dim", "least"), [(1, 4), (2, 2), (3, 4), (4, 1), (6, 2), (8, 1), (10, 2)])
def test_kernels_take_whole_philox_calls(dim, least):
    assert kernel_length(dim) == least
    assert kernel_length(dim, rows=16) == 8  # a small batch takes more steps a call
    assert kernel_length(dim, rows=10**6) == least


def drift(t, y, p):
    return p["mu"] * y * torch.cos(t)


def diffusion(t, y, p):
    return p["sigma"] * y


def functional(ys, p):
    return ys[-1, :, 0] ** 2 + ys[1, :, 0] * p["mu"]


def problem(n_steps=10, ts=(0.0, 0.7, 1.0), mu=0.1, **changes) -> ss.Problem:
    """Ten steps in kernels of four: a part of one is left over, and an output lies inside another."""
    params = {"mu": torch.tensor(mu, dtype=F64), "sigma": torch.tensor(0.2, dtype=F64)}
    sde = ss.SDE(changes.pop("drift", drift), diffusion, params)
    return ss.Problem(sde, functional, torch.ones(1, dtype=F64), ts, n_steps, **changes)


ALL = ("mu", "sigma", "y0", "t1")


def compare(question: ss.Problem, **how) -> ss.Sensitivity:
    plain = ss.sensitivity(question, compile=False, **how)
    fast = ss.sensitivity(question, compile=True, **how)
    torch.testing.assert_close(fast.value.mean, plain.value.mean, **CLOSE)
    torch.testing.assert_close(fast.value.standard_error, plain.value.standard_error, **CLOSE)
    for name in plain.gradient:
        tolerance = dict(CLOSE)
        if how.get("method") == "finite_difference":  # a difference of numbers that agree to 1e-15, over 2 h = 1e-5
            tolerance = {"rtol": 1e-8, "atol": 1e-9}
        torch.testing.assert_close(fast.gradient[name].mean, plain.gradient[name].mean, **tolerance)
        torch.testing.assert_close(fast.gradient[name].standard_error, plain.gradient[name].standard_error, **tolerance)
    return fast


@pytest.mark.parametrize("method", ["pathwise", "forward", "finite_difference"])
def test_methods_agree_with_their_plain_selves(method):
    """10,450 paths: a full block, then two groups of 200, then an odd group of 50."""
    compare(problem(), n_paths=10_450, method=method, wrt=ALL, seed=3)


@pytest.mark.parametrize("method", ["pathwise", "forward", "adjoint"])
def test_states_inside_a_kernel_have_their_derivatives(method):
    """Coefficients without the time, outputs at steps 2, 3, 5: torch once compiled wrong tangents of all but a chunk's end."""
    sde = ss.SDE(lambda t, y, p: p["mu"] * y, diffusion, problem().sde.params)
    outputs = ss.Problem(
        sde, lambda ys, p: ys[1:, :, 0].mean(0), torch.ones(1, dtype=F64), (0.0, 0.2, 0.3, 0.5, 1.0), 10
    )
    compare(outputs, n_paths=600, method=method, seed=3)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_kernel_that_computes_something_else_is_not_used(wrong):
    """Compared at the first call with the function it was made of; the same kernel, unspoilt, raises no warning."""

    def double(sde, rest, theta, clock, at, y, *, draw, dim, length):
        return 2 * y, y.new_zeros(3)

    tried = Kernel(
        double, {"draw": None, "dim": 1, "length": 4}, (double, (Kernel, wrong), (Kernel, wrong)), frozenset()
    )

    def compiled(*a):
        kernel_module._LAST.new = True  # as the compiler does
        return (2.01 if wrong else 2) * a[6], a[6].new_zeros(3)

    tried.fast = compiled
    one = torch.ones(5, 1, dtype=F64)
    arguments = (None, {}, {}, torch.zeros(3), torch.zeros(4, dtype=torch.int64), None, one)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(tried(*arguments)[0], 2 * one)
    assert [w.category for w in caught] == [SlowPathWarning] * wrong


def test_the_adjoint_agrees_with_its_plain_self():
    compare(problem(ts=(0.0, 0.8, 1.0)), n_paths=10_050, method="adjoint", wrt=("mu", "sigma"), seed=3)


def test_noise_from_outside():
    z = Philox(11).normals(0, 600, 0, 10, 1, dtype=F64, device=CPU)
    compare(problem(ts=(0.0, 0.8, 1.0)), n_paths=600, wrt="mu", noise=GivenNoise(z))


def test_antithetic_noise_through_finite_differences():
    compare(problem(), n_paths=600, wrt="mu", noise=Antithetic(Philox(4)), method="finite_difference")


def two_dimensional() -> ss.Problem:
    """Two components, two Brownian motions, noise that does not commute, a time in the coefficients, a matrix parameter."""
    params = {"A": torch.tensor([[-0.5, 0.2], [0.1, -0.3]], dtype=F64), "s": torch.tensor(0.3, dtype=F64)}

    def b(t, y, p):
        return y @ p["A"].T + torch.sin(t)

    def g(t, y, p):
        a, c = y[:, 0], y[:, 1]
        return p["s"] * torch.stack((torch.stack((1 + 0 * a, c), 1), torch.stack((torch.sin(a), 1 + 0.1 * c), 1)), 1)

    sde = ss.SDE(b, g, params, noise_type="general")
    y0 = torch.tensor([0.1, 0.2], dtype=F64)
    return ss.Problem(sde, lambda ys, p: (ys[-1] ** 2).sum(1) * p["s"], y0, (0.0, 1.0), 7)


@pytest.mark.parametrize("method", ["pathwise", "forward"])
def test_general_noise(method):
    compare(two_dimensional(), n_paths=300, method=method, wrt=("A", "s", "y0"), seed=2)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_nothing_compiles_twice():
    """Not for a seed, a value, a step count, a horizon, a number of paths or an odd last block; but for a dtype."""
    run = {"method": "pathwise", "compile": True, "progress": False}
    ss.sensitivity(problem(n_steps=8, ts=(0.0, 1.0)), n_paths=10_400, seed=1, **run)
    before = graphs()
    ss.sensitivity(problem(n_steps=8, ts=(0.0, 1.0)), n_paths=10_400, seed=2, **run)
    ss.sensitivity(problem(n_steps=8, ts=(0.0, 1.0), mu=0.3), n_paths=10_400, seed=2, **run)
    ss.sensitivity(problem(n_steps=11, ts=(0.0, 1.0)), n_paths=10_400, seed=2, **run)
    ss.sensitivity(problem(n_steps=8, ts=(0.5, 3.0)), n_paths=20_017, seed=2, **run)
    assert graphs() == before
    ss.sensitivity(problem(n_steps=8, ts=(0.0, 1.0)), n_paths=10_400, seed=1, **{**run, "method": "finite_difference"})
    assert graphs() == before  # the same forward kernel
    params = {k: v.float() for k, v in problem().sde.params.items()}
    single = ss.Problem(ss.SDE(drift, diffusion, params), functional, torch.ones(1), (0.0, 1.0), 8)
    ss.sensitivity(single, n_paths=10_400, seed=1, **run)
    assert graphs() > before  # the control: this counter does count


def test_the_bits_do_not_depend_on_tiles_merging_or_threads():
    question = problem(n_steps=8, ts=(0.0, 1.0))
    run = {"compile": True, "progress": False, "seed": 5}
    whole = ss.sensitivity(question, n_paths=30_000, **run)
    parts = [ss.sensitivity(question, n_paths=10_000, first_path=k * 10_000, **run) for k in range(3)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        other = ss.sensitivity(question, n_paths=30_000, **run)
    finally:
        torch.set_num_threads(threads)
    small = ss.sensitivity(question, n_paths=30_000, tile_paths=3_200, **run)
    for result in (ss.merge(*parts), other, small):
        assert torch.equal(result.value.mean, whole.value.mean)
        for name, estimate in whole.gradient.items():
            assert torch.equal(result.gradient[name].mean, estimate.mean)
            assert torch.equal(result.gradient[name].standard_error, estimate.standard_error)


def test_sdeint_agrees_and_is_differentiable():
    mu = torch.tensor(0.1, dtype=F64, requires_grad=True)
    t1 = torch.tensor(1.0, dtype=F64, requires_grad=True)
    y0 = torch.linspace(0.5, 1.5, 50, dtype=F64)[:, None].requires_grad_()
    sde = ss.SDE(drift, diffusion, {"mu": mu, "sigma": torch.tensor(0.2, dtype=F64)})
    found = []
    for choice in (False, True):
        ts = torch.stack((torch.zeros((), dtype=F64), t1))
        ys = ss.sdeint(sde, y0, ts, n_steps=10, seed=3, compile=choice)
        found.append((ys.detach(), *torch.autograd.grad((ys[-1] ** 2).sum(), (mu, t1, y0))))
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, **CLOSE)


class Net(torch.nn.Module):
    noise_type, sde_type = "diagonal", "ito"

    def __init__(self):
        super().__init__()
        self.b = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
        self.level = torch.nn.Parameter(torch.tensor(0.1, dtype=F64))

    def f(self, t, y):
        return self.b(y)

    def g(self, t, y):
        return self.level + 0.1 * torch.sigmoid(y)


def test_a_module_trains_through_compiled_chunks(capsys):
    """And compiling is announced, once."""
    torch.manual_seed(0)
    _say_once.cache_clear()
    net, losses = Net(), []
    optimiser = torch.optim.Adam(net.parameters(), 0.02)
    y0 = torch.zeros(64, 3, dtype=F64)
    for k in range(30):
        grads = []
        for choice in (True, False) if k == 0 else (True,):
            optimiser.zero_grad()
            loss = ((ss.sdeint(net, y0, (0.0, 1.0), n_steps=20, seed=k, compile=choice)[-1] - 1) ** 2).mean()
            loss.backward()
            grads.append([w.grad.clone() for w in net.parameters()])
        if k == 0:
            torch.testing.assert_close(*grads, **CLOSE)
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert capsys.readouterr().err.count("sdesens: compiling") == 1


def test_what_tells_coefficients_apart():
    """One that cannot be compiled must not keep another from it; and a number caught in a closure is part of the kernel."""

    class Other(Net):
        pass

    def scaled(x):
        return lambda t, y, p: x * y

    def recursive(t, y, p):
        return recursive

    same = [ss.as_sde(Net()).drift, scaled(2.0), functools.partial(scaled, 1.0)]
    again = [ss.as_sde(Net()).drift, scaled(2.0), functools.partial(scaled, 1.0)]
    others = [ss.as_sde(Other()).drift, scaled(3.0), functools.partial(scaled, 2.0)]
    for one, two, other in zip(same, again, others, strict=True):
        assert _identity(one) == _identity(two) != _identity(other)
    assert hash(_identity(recursive))


def test_forward_mode_runs_uncompiled():
    """A compiled graph would lose the tangent without a word."""

    def solve(k, compile):
        sde = ss.SDE(lambda t, y, p: -p["k"] * y, lambda t, y, p: 0.2 * y, {"k": k})
        return ss.sdeint(sde, torch.ones(6, 1, dtype=F64), (0.0, 1.0), n_steps=8, seed=3, compile=compile)[-1].sum()

    k = torch.tensor(0.5, dtype=F64, requires_grad=True)
    gradient = torch.autograd.grad(solve(k, False), k)[0]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(k.detach(), torch.ones((), dtype=F64))
        tangent = torch.autograd.forward_ad.unpack_dual(solve(dual, True)).tangent
    torch.testing.assert_close(tangent, gradient, **CLOSE)


@torch.compiler.disable
def opaque(y):
    return -y


def test_what_cannot_be_traced_runs_uncompiled_with_one_warning():
    question = problem(drift=lambda t, y, p: p["mu"] * opaque(y))
    sde, y0 = question.sde, torch.ones(20, 1, dtype=F64)
    with pytest.warns(SlowPathWarning, match="torch.compile cannot make a kernel") as caught:
        fast = ss.sdeint(sde, y0, (0.0, 1.0), n_steps=10, seed=3, compile=True)
    assert len(caught) == 1
    again = ss.sdeint(sde, y0, (0.0, 1.0), n_steps=10, seed=3, compile=True)  # silent: it has been said
    plain = ss.sdeint(sde, y0, (0.0, 1.0), n_steps=10, seed=3, compile=False)
    torch.testing.assert_close(fast, plain, **CLOSE)
    assert torch.equal(again, fast)


WITHOUT = """
import warnings, torch, sdesens as ss
from sdesens.errors import SlowPathWarning
sde = ss.SDE(lambda t, y, p: -y, lambda t, y, p: 0.1 * y)
y0 = torch.ones(20, 1, dtype=torch.float64)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fast = ss.sdeint(sde, y0, (0.0, 1.0), n_steps=8, seed=3, compile=True)
torch.testing.assert_close(fast, ss.sdeint(sde, y0, (0.0, 1.0), n_steps=8, seed=3, compile=False), rtol=1e-12, atol=0)
print(sum(issubclass(w.category, SlowPathWarning) for w in caught))
"""


def test_a_missing_compiler_is_one_warning(tmp_path):
    env = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]


def test_errors_of_the_coefficients_are_not_swallowed(monkeypatch):
    def explode(*args):
        raise ZeroDivisionError("mine")

    monkeypatch.setattr(Kernel, "__call__", explode)
    with pytest.raises(ZeroDivisionError, match="mine"):
        ss.sdeint(problem().sde, torch.ones(3, 1, dtype=F64), (0.0, 1.0), n_steps=4, seed=1, compile=True)


def test_auto_compiles_only_where_it_pays():
    assert not wanted("auto", LEAST - 1, 10**6)
    assert not wanted("auto", LEAST, 1)
    assert wanted("auto", REPAYS, 1)
    assert wanted("auto", LEAST, REPAYS // LEAST)
    assert wanted(True, 1)
    assert not wanted(False, 10 * REPAYS)


@pytest.mark.parametrize("value", ["yes", None, 1, 2.0, torch.tensor(True)])
def test_other_answers_are_refused(value):
    with pytest.raises(ArgumentError, match="`compile` must be 'auto', True or False"):
        ss.sensitivity(problem(), n_paths=100, compile=value)
