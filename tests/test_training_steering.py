"""Steering: gradients of its objective by three ways, tilted laws it should reach, what it remembers, and the command."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from sdesens import sensitivity
from sdesens.cli.training import _reward
from sdesens.diffusion import EDM, VP, Denoiser, Gaussian, GaussianMixture, remembered
from sdesens.errors import (
    ArgumentError,
    ArgumentTypeError,
    HighVarianceWarning,
    MemoryWarning,
    NonFiniteError,
    ShapeError,
)
from sdesens.training import load_best, load_data, make_network, open_run, recipe, train
from sdesens.training.steer import METHODS, steer
from sdesens.training.steer_objective import LinearReward, Sampling, objective_problem, steering_grid
from sdesens.training.steer_report import derivatives, moments, moments_of, picked, predicted, reweighted, tilted
from sdesens.training.steer_run import steer_run

D = torch.float64
SAMPLING = Sampling(steering_grid(EDM(), 16), (1,))


def network(seed=0, width=16, scale=0.0):
    """A preconditioned network for data N(0, 1): with its last layer zero, as it starts, it is exact."""
    net = make_network("mlp", (1,), width, 1, seed=seed).double()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net.last.weight.data.normal_(0, scale)
    return Denoiser(net.eval(), EDM(), sigma_data=1.0)


def test_three_ways_to_the_gradient_agree():
    """Of E[r] - KL, away from the optimum: pathwise, likelihood ratios, and central differences of the pathwise values' mean."""
    base, tuned = network(), network(scale=0.3)
    problem = objective_problem(tuned, base, SAMPLING, LinearReward([0.7]))
    found = {
        m: sensitivity(problem, n_paths=4000, wrt=("net.last.*",), method=m, seed=3, audit=False, check=False)
        for m in ("pathwise", "likelihood_ratio", "finite_difference")
    }
    for name, exact in found["pathwise"].gradient.items():
        fd = found["finite_difference"].gradient[name].mean
        assert torch.allclose(exact.mean, fd, rtol=1e-5, atol=1e-7)  # the same noise; differences of order h^2
        other = found["likelihood_ratio"].gradient[name]
        error = torch.sqrt(exact.standard_error**2 + other.standard_error**2)
        # the two share noise, so this is too wide if anything; 17 numbers at 4 standard errors: false alarm 1e-3
        assert bool(((exact.mean - other.mean).abs() < 4 * error).all()), name


def test_what_a_round_leaves_in_the_weights_is_the_gradient():
    """`gradient` of many rounds of few paths against one pathwise run: the leave-one-out mean does not bias it."""
    from sdesens.noise import Philox
    from sdesens.training.steer import Task, gradient

    base, tuned = network(), network(scale=0.3)
    reward = LinearReward([0.7])
    exact = sensitivity(objective_problem(tuned, base, SAMPLING, reward), n_paths=8000, wrt=("net.last.bias",), seed=5, audit=False, check=False)  # fmt: skip
    slopes = []
    for k in range(400):
        tuned.net.zero_grad()
        gradient(Task(tuned, base, SAMPLING, reward, Philox(9)), 10, 10 * k)
        slopes.append(-tuned.net.last.bias.grad.clone() / 10)
    slopes = torch.cat(slopes)
    want = exact.gradient["net.last.bias"]
    error = math.sqrt(float(slopes.var()) / 400 + float(want.standard_error) ** 2)
    assert abs(float(slopes.mean()) - float(want.mean)) < 4 * error
    assert abs(float(want.mean)) > 10 * error  # negative control: zero would be noticed


@pytest.mark.parametrize("method", METHODS)
def test_a_gaussian_is_moved_by_its_slope(method):
    """p e^(a x) of N(0, 1) is N(a, 1); of the 16-step chain it is what weighted samples say, and that is what the chain is tuned to."""
    base, reward = network(), LinearReward([0.8])
    tuned = steer(base, SAMPLING, reward, method=method, steps=80, batch=64, lr=2e-2)
    assert not bool(base.net.last.weight.detach().any())  # the caller's network is left alone
    after = moments(tuned, SAMPLING, reward, n=20_000, seed=7)
    off = after.deviation(predicted(base, SAMPLING, reward, seed=8))
    # a share of 4 standard errors for sampling, and what 80 rounds leave
    assert float(off["mean"].mean) < 4 * float(off["mean"].standard_error) + 0.04
    assert float(off["cov"].mean) < 4 * float(off["cov"].standard_error) + 0.08
    exact = tilted(Gaussian([0.0], [1.0]), reward).mean.mean
    fine = predicted(base, Sampling(steering_grid(EDM(), 128), (1,)), reward, seed=8).mean
    assert (
        float((fine.mean - exact).abs()) < 4 * float(fine.standard_error) + 0.02
    )  # and the chain's tilt goes to the law's
    again = steer(base, SAMPLING, reward, method=method, steps=3, batch=8, lr=2e-2)
    same = steer(base, SAMPLING, reward, method=method, steps=3, batch=8, lr=2e-2)
    other = steer(base, SAMPLING, reward, method=method, steps=3, batch=8, lr=2e-2, seed=1)
    found, repeated, seeded = ([p.detach() for p in m.net.parameters()] for m in (again, same, other))
    assert all(torch.equal(p, q) for p, q in zip(found, repeated, strict=True))
    assert not torch.equal(found[-1], seeded[-1])


def test_two_modes_change_their_weights():
    """A mixture 3 standard deviations apart, its exact denoiser steered by a network beside it."""
    law = GaussianMixture([0.5, 0.5], [[-1.5], [1.5]], 0.25)
    exact, net = law.denoiser(EDM()), make_network("mlp", (1,), 32, 2).double()

    class Beside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            r = t[:, None]
            return exact.x0(x, t) + 1.6 * r / torch.sqrt(r**2 + 2.5) * self.net(x / torch.sqrt(r**2 + 2.5), t.log() / 4)

    base, reward = Denoiser(Beside(), EDM(), "x0"), LinearReward([0.6])
    grid = steering_grid(EDM(), 24, data_std=1.6)
    tuned = steer(base, Sampling(grid, (1,)), reward, steps=100, batch=128, lr=1e-2)
    fine = Sampling(steering_grid(EDM(), 96, data_std=1.6), (1,))
    target = tilted(law, reward)
    off = moments(tuned, fine, reward, n=8000, seed=7).deviation(target)
    assert float(off["mean"].mean) < 4 * float(off["mean"].standard_error) + 0.06  # 100 rounds
    far = moments(base, fine, reward, n=8000, seed=7).deviation(target)
    assert float(far["mean"].mean) > 0.9  # negative control: the base has mean 0


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_what_is_remembered_is_not_tilted(eta):
    """The predicted shift of Gaussian data is a (1 - remembered); steering reaches that, and not the tilt."""
    start = 1.5  # so little noise that a start is remembered
    grid = steering_grid(EDM(), 64, r_max=start)
    sampling = Sampling(grid, (1,), eta=eta, start=math.sqrt(1 + start**2))
    kept = remembered(EDM(), eta, data_std=1.0, t=start)
    base, reward = network(), LinearReward([0.8])
    found = predicted(base, sampling, reward, n_starts=500, n_each=50)
    want = 0.8 * (1 - kept)
    assert abs(float(found.mean.mean) - want) < 4 * float(found.mean.standard_error) + 0.02  # 64 steps of order 1
    coarse = Sampling(steering_grid(EDM(), 16, r_max=start), (1,), eta=eta, start=math.sqrt(1 + start**2))
    with pytest.warns(MemoryWarning, match="remember"):
        tuned = steer(base, coarse, reward, steps=80, batch=64, lr=2e-2)
    after = moments(tuned, sampling, reward, n=10_000, seed=7)
    allowed = 4 * float(after.mean.standard_error) + 0.04 * 0.8
    assert abs(float(after.mean.mean) - want) < allowed
    assert abs(float(after.mean.mean) - 0.8) > allowed  # it is the predicted bias, not the tilt


def test_tilted_moments_are_those_of_weighted_draws():
    ring, reward = GaussianMixture.ring(), LinearReward([0.5, 0.25])
    exact, x = tilted(ring, reward), ring.sample(40_000, 3)
    w = torch.softmax(x @ reward.slopes, 0)
    mean = w @ x
    error = torch.sqrt((w.square()[:, None] * (x - mean).square()).sum(0))
    assert bool(((mean - exact.mean.mean).abs() < 4 * error).all())
    assert float(exact.reward.mean) == pytest.approx(float(exact.mean.mean @ reward.slopes), rel=1e-12)
    C = torch.einsum("n,nd,ne->de", w, x - mean, x - mean)
    # the variance of a variance of two-dimensional data of size 2, with some 20,000 effective draws
    assert torch.allclose(C, exact.cov.mean, atol=4 * 2 * 2 / math.sqrt(20_000))
    with pytest.raises(ArgumentTypeError, match="LinearReward"):
        tilted(ring, lambda x: x[:, 0])


def test_samples_by_weights_have_the_tilted_law():
    """Weighted samples of a mixture, and those picked by their weights, beside the closed form; 4 standard errors: 6e-5 each number."""
    law, reward = GaussianMixture.ring(), LinearReward([0.5, 0.25])
    x = law.sample(40_000, seed=5)
    found, exact = reweighted(x, reward), tilted(law, reward)
    for name in ("reward", "mean", "cov"):
        own, wanted = getattr(found, name), getattr(exact, name)
        assert bool(((own.mean - wanted.mean).abs() < 4 * own.standard_error).all()), name
    assert float(found.reward.standard_error) < 0.01 * float(exact.reward.mean)
    few = moments_of(picked(x, reward, 4000), reward)  # systematic: never noisier than independent picks
    noise = torch.hypot(few.mean.standard_error, found.mean.standard_error)
    assert bool(((few.mean.mean - exact.mean.mean).abs() < 4 * noise).all())
    assert abs(float(reward(x).mean() - exact.reward.mean)) > 50 * float(found.reward.standard_error)  # and without
    with pytest.warns(HighVarianceWarning, match="take a smaller reward"):
        reweighted(x, LinearReward([40.0, 0.0]))
    with pytest.raises(NonFiniteError, match=r"for 1 of 40000 samples, the first is sample 7"):
        reweighted(x, lambda x: torch.where(torch.arange(len(x)) == 7, torch.nan, x[:, 0]))


def test_derivatives_of_guidance_are_their_formula():
    """Unit variances: d E[x_0]/dw = mu (1 - alpha_T^2) for the reverse SDE, path by path, but for the steps of order 1."""
    from sdesens.diffusion import Guided, uniform_grid

    c, u = (Gaussian([m], [1.0]).denoiser(VP()) for m in (1.5, 0.0))
    sampling = Sampling(uniform_grid(VP(), 400), (1,))
    found = derivatives(Guided(c, u, 2.0), sampling, LinearReward([1.0]), n_paths=200)
    assert set(found.results["pathwise"].gradient) == {"eta", "guidance", "beta_min", "beta_max"}
    for result in found.results.values():
        assert float(result.gradient["guidance"].mean) == pytest.approx(1.5, rel=0.01)
    table = found.table()
    assert [c.header for c in table.columns] == ["parameter", "pathwise", "finite_difference"]
    assert json.dumps(found.to_dict())


def test_bad_input():
    base, reward = network(), LinearReward([1.0])
    cases = [
        (ArgumentError, "`method` must be one of", {"method": "reinforce"}),
        (ArgumentError, "`steps`", {"steps": 0}),
        (ArgumentError, "`batch`", {"batch": 1}),
        (ArgumentError, "multiple of `accumulate`", {"batch": 9, "accumulate": 2}),
        (ArgumentError, "`lr`", {"lr": 0.0}),
    ]
    for error, words, options in cases:
        with pytest.raises(error, match=words):
            steer(base, SAMPLING, reward, **{"steps": 1, "batch": 8, **options})
    small = {"steps": 1, "batch": 8}
    with pytest.raises(ShapeError, match="`slopes` must have the shape of one sample"):
        steer(base, SAMPLING, LinearReward([1.0, 2.0]), **small)
    with pytest.raises(ShapeError, match="one real number a sample"):
        steer(base, SAMPLING, lambda x: x, **small)
    with pytest.raises(NonFiniteError, match="infinite or NaN in round 0"):
        steer(base, SAMPLING, lambda x: x[:, 0] / 0, **small)
    with pytest.raises(ArgumentTypeError, match="whose weights are tuned"):
        steer(Gaussian([0.0], [1.0]).denoiser(EDM()), SAMPLING, reward, **small)
    with pytest.raises(ArgumentError, match="without noise there is nothing to control"):
        Sampling(steering_grid(EDM(), 16), (1,), eta=0.0)


def run_cli(*words, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "sdesens", *words], cwd=cwd, env=environment, capture_output=True, text=True)  # fmt: skip


def test_the_command_writes_a_run_that_is_sampled_and_not_trained(tmp_path):
    config = recipe("gmm8", steps=30, width=16, depth=1, batch=64)
    train(config, tmp_path / "run", tensorboard=False, progress=False)
    few = ("--rounds", "3", "--batch", "16", "--steps", "6")
    done = run_cli("steer", "run", "--reward", "linear:0.5,0.25", *few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "target, exact" in done.stdout
    assert "d/d eta" in done.stdout
    out = tmp_path / "run-steered"
    assert {p.name for p in out.iterdir()} == {".lock", "run.json", "checkpoints", "steer.json", "steer.png"}
    found = json.loads((out / "steer.json").read_text())
    exact = tilted(GaussianMixture.ring(), LinearReward([0.5, 0.25]))
    assert found["target"]["reward"]["mean"] == pytest.approx(float(exact.reward.mean))
    tuned, base = open_run(out).denoiser().weights, open_run(tmp_path / "run").denoiser().weights
    assert any(not torch.equal(v, base[k]) for k, v in tuned.items())
    assert load_best(out / "checkpoints").step == 3
    sampled = run_cli("sample", "run-steered", "-n", "5", cwd=tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    assert np.load(out / "sample-heun.npz")["x"].shape == (5, 2)
    with pytest.raises(ArgumentError, match="was steered"):
        train(config, out, tensorboard=False, progress=False)
    with pytest.raises(ArgumentError, match="another directory"):
        steer_run(open_run(tmp_path / "run"), LinearReward([0.5, 0.25]), tmp_path / "run")
    (tmp_path / "mine.py").write_text("def closeness(x):\n    return -x.square().sum(1)\n\nradius = 2\n")
    mine = run_cli("steer", "run", "--reward", "mine.py:closeness", *few, "--out", "mine", "--json", cwd=tmp_path)
    assert mine.returncode == 0, mine.stderr
    assert json.loads(mine.stdout)["exact"] is False
    for words, message in (
        (f"{tmp_path}/mine.py:radius", "that file has closeness"),
        ("linear:a", "linear:NUMBER"),
        ("linear:1,2,3", "takes 2 numbers, one an entry of a sample, got 3"),
        ("mine", "FILE.py:NAME"),
        ("none.py:f", "there is no file"),
    ):
        with pytest.raises(ArgumentError, match=message):
            _reward(words, load_data("gmm8").form)
