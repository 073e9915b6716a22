"""Gradients that autograd would get wrong in silence are refused before a run."""

import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import torch

from sdesens import SDE, GivenNoise, Philox, Problem, as_sde, merge, sdeint, sensitivity, tangent_paths
from sdesens.errors import ArgumentError, ArgumentTypeError, DetachedError, UnknownParameterError, ZeroGradientWarning

ONE = torch.ones(1, dtype=torch.float64)
PARAMS = {"r": 0.05 * ONE[0], "sigma": 0.2 * ONE[0]}


def problem(drift=None, functional=None, y0=ONE, params=PARAMS):
    drift = drift or (lambda t, y, p: p["r"] * y)
    functional = functional or (lambda ys, p: torch.exp(-p["r"]) * ys[-1, :, 0])
    sde = SDE(drift, lambda t, y, p: p["sigma"] * y, params)
    return Problem(sde, functional, y0, (0.0, 1.0), 8)


class Halved(torch.autograd.Function):
    """The identity, with a backward that is wrong by half."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g / 2


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({"drift": lambda t, y, p: p["r"].detach().item() * y}, "r"),
        ({"drift": lambda t, y, p: p["r"].detach() * y}, "r"),
        ({"drift": lambda t, y, p: float(p["r"].detach()) * y}, "r"),
        ({"drift": lambda t, y, p: Halved.apply(p["r"]) * y}, "r"),
        ({"functional": lambda ys, p: ys[-1, :, 0] * (p["r"] + p["sigma"].detach())}, "sigma"),
        ({"functional": lambda ys, p: p["r"] * ys[-1, :, 0].detach() + ys[0, :, 0]}, "sigma"),
    ],
)
def test_detached_part_is_refused(part, name):
    with pytest.raises(DetachedError, match=rf"'{name}' moves the result by .* but autograd sees"):
        sensitivity(problem(**part), n_paths=4)
    # central differences do not go through autograd, and get it right
    result = sensitivity(problem(**part), n_paths=400, method="finite_difference")
    assert bool(torch.isfinite(result.gradient[name].mean))


@pytest.mark.parametrize(
    "drift",
    [
        lambda t, y, p: torch.relu(p["r"] * y),
        lambda t, y, p: (p["r"] * y).abs(),
        lambda t, y, p: torch.sigmoid(300 * p["r"] * y),
        lambda t, y, p: p["r"] * y.round(),
    ],
)
@pytest.mark.parametrize("r", [0.0, 0.05])
def test_kinks_steep_slopes_and_rounding_are_not_taken_for_it(drift, r):
    params = {"r": r * ONE[0], "sigma": PARAMS["sigma"]}
    for y0 in (ONE, 0.0 * ONE):
        functional = lambda ys, p: (ys[-1, :, 0] + p["r"] + p["sigma"]).clamp(min=0)  # noqa: E731
        sensitivity(problem(drift, functional, y0, params), n_paths=4, audit=False)


def test_detached_functional_is_told_of_differences():
    jump = problem(functional=lambda ys, p: (ys[-1, :, 0] > 1.0).double())
    with pytest.raises(DetachedError, match=r"finite_difference.*relative_step"):
        sensitivity(jump, n_paths=4)
    found = sensitivity(jump, n_paths=20_000, method="finite_difference", relative_step=0.05, wrt="sigma")
    # P(X_8 > 1) by the same bumps of the chain's own law, 20,000 paths of another seed: within 4.5 joint standard errors
    again = sensitivity(jump, n_paths=20_000, method="finite_difference", relative_step=0.05, wrt="sigma", seed=1)
    a, b = found.gradient["sigma"], again.gradient["sigma"]
    assert float(a.standard_error) > 0
    assert abs(float(a.mean - b.mean)) < 4.5 * float((a.standard_error**2 + b.standard_error**2).sqrt())


def test_missing_parameter_is_named():
    with pytest.raises(
        UnknownParameterError, match=r"`drift\(t, y, p\)` asks for p\['nu'\], but `params` has 'r', 'sigma'"
    ):
        sensitivity(problem(lambda t, y, p: p["nu"] * y), n_paths=4)


def test_options_belong_to_the_method():
    with pytest.raises(ArgumentTypeError, match="did you mean `relative_step`"):
        sensitivity(problem(), n_paths=4, method="finite_difference", relativ_step=0.1)
    with pytest.raises(ArgumentTypeError, match="no argument `relative_step`"):
        sensitivity(problem(), n_paths=4, method="forward", relative_step=0.1)


@pytest.mark.parametrize("other", [{"seed": 2}, {"noise": Philox(0, stream=1)}])
def test_merge_refuses_other_noise(other):
    a = sensitivity(problem(), n_paths=100, wrt="r")
    with pytest.raises(ArgumentError, match="one problem on one noise"):
        merge(a, sensitivity(problem(), n_paths=100, first_path=100, wrt="r", **other))


@pytest.mark.parametrize("change", [{"y0": 2 * ONE}, {"params": {**PARAMS, "r": 0.06 * ONE[0]}}])
def test_merge_refuses_another_problem(change):
    a = sensitivity(problem(), n_paths=100, wrt="r")
    with pytest.raises(ArgumentError, match="one problem on one noise"):
        merge(a, sensitivity(problem(**change), n_paths=100, first_path=100, wrt="r"))
    with pytest.raises(ArgumentTypeError, match=r"merge\(\*results\)"):
        merge([a])


def test_executors_that_cannot_work():
    with pytest.raises(ArgumentTypeError, match=r"`executor` must be a concurrent.futures.Executor, got 2"):
        sensitivity(problem(), n_paths=4, executor=2)
    with ProcessPoolExecutor(1) as pool, pytest.raises(ArgumentError, match=r"`problem` does not pickle.*not lambdas"):
        sensitivity(problem(), n_paths=4, executor=pool)


def test_bias_is_printed_with_the_estimate():
    assert ", bias " in repr(sensitivity(problem(), n_paths=100, bias=True))


class Module(torch.nn.Module):
    noise_type, sde_type = "diagonal", "ito"

    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(1.0 * ONE[0])

    def f(self, t, y):
        return -self.rate * y

    def g(self, t, y):
        return 0.3 * torch.ones_like(y)


@pytest.mark.parametrize("method", ["pathwise", "forward", "finite_difference", "adjoint"])
def test_threads_share_a_module(method):
    module = Module()
    shared = Problem(as_sde(module), lambda ys, p: ys[-1, :, 0] ** 2, ONE, (0.0, 1.0), 6)
    alone = sensitivity(shared, n_paths=40_000, method=method)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change places as often as they can
    try:
        with ThreadPoolExecutor(4) as pool:
            together = sensitivity(shared, n_paths=40_000, method=method, executor=pool)
    finally:
        sys.setswitchinterval(interval)
    assert torch.equal(together.gradient["rate"].mean, alone.gradient["rate"].mean)
    assert type(module.rate) is torch.nn.Parameter


def test_module_is_read_as_it_is_at_the_call():
    module = Module()
    sde = as_sde(module)
    problem = Problem(sde, lambda ys, p: ys[-1, :, 0] ** 2, ONE, (0.0, 1.0), 6)
    before = sensitivity(problem, n_paths=100).value.mean
    module.rate = torch.nn.Parameter(2.0 * ONE[0])  # the SDE keeps the parameters it was made with
    assert torch.equal(sensitivity(problem, n_paths=100).value.mean, before)


def test_inference_mode_does_not_matter():
    expected = sensitivity(problem(), n_paths=100)
    with torch.inference_mode():
        assert torch.equal(sensitivity(problem(), n_paths=100).gradient["r"].mean, expected.gradient["r"].mean)
        assert sdeint(problem().sde, torch.ones(3, 1, dtype=torch.float64), (0.0, 1.0), n_steps=4).shape == (2, 3, 1)


def test_zero_component_of_a_vector_is_named():
    vector = {"a": torch.tensor([0.05, 0.2], dtype=torch.float64)}
    sde = SDE(lambda t, y, p: p["a"][0] * y, lambda t, y, p: 0.2 * y, vector)
    with pytest.warns(ZeroGradientWarning, match=r"'a' \(1 of its 2 components\)"):
        sensitivity(Problem(sde, lambda ys, p: ys[-1, :, 0], ONE, (0.0, 1.0), 4), n_paths=10)


def test_differences_keep_the_sign_of_a_small_parameter():
    tiny = {"v": torch.tensor(1e-9, dtype=torch.float64)}
    sde = SDE(lambda t, y, p: -y, lambda t, y, p: p["v"].sqrt() * torch.ones_like(y), tiny)
    small = Problem(sde, lambda ys, p: ys[-1, :, 0], ONE, (0.0, 1.0), 8)
    a, b = (sensitivity(small, n_paths=50, method=m).gradient["v"].mean for m in ("pathwise", "finite_difference"))
    # F ~ 1 over a bump of 1.2e-14 rounds to 2e-2; the derivative is of the order of 1e3
    torch.testing.assert_close(a, b, rtol=1e-3, atol=0)


def test_value_and_bias_have_independent_errors():
    # 150 seeds of a value and the bias of its step: correlation of independent numbers has standard deviation 0.08
    pairs = []
    for seed in range(150):
        result = sensitivity(problem(), n_paths=100, wrt="r", seed=seed, bias=True)
        pairs.append((float(result.value.mean), float(result.bias["value"].mean)))
    correlation = float(torch.corrcoef(torch.tensor(pairs).T)[0, 1])
    assert abs(correlation) < 4.5 / 150**0.5  # false alarm 7e-6


def test_paths_with_tangents_are_checked():
    for change, message in (({"n_paths": 0}, "`n_paths`"), ({"noise": GivenNoise(torch.zeros(20, 3, 1))}, "20 steps")):
        with pytest.raises(ArgumentError, match=message):
            tangent_paths(problem(), **{"n_paths": 3, **change})


def test_vmap_over_increments_needs_no_switch():
    sde = SDE(lambda t, y, p: -y, lambda t, y, p: 0.2 * torch.ones_like(y))
    bm = Philox(1).normals(0, 15, 0, 8, 1, dtype=torch.float64, device=torch.device("cpu")).view(8, 5, 3, 1)
    y0 = torch.ones(3, 1, dtype=torch.float64)
    together = torch.func.vmap(lambda dW: sdeint(sde, y0, (0.0, 1.0), n_steps=8, bm=dW), in_dims=1)(bm)
    alone = torch.stack([sdeint(sde, y0, (0.0, 1.0), n_steps=8, bm=bm[:, i]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-14, atol=0)  # rounding
