"""Gradients that autograd would get wrong in silence are refused before a run."""

from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from sdesens import SDE, Philox, Problem, merge, sensitivity
from sdesens.errors import ArgumentError, ArgumentTypeError, DetachedError, UnknownParameterError

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
        sensitivity(problem(drift, functional, y0, params), n_paths=4)


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
