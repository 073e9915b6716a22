"""The table of routes: right verdicts for right numbers, and wrong numbers caught."""

import dataclasses
import json
import math
import sys

import pytest
import torch

from sdesens import SDE, Answer, Problem, crosscheck, sensitivity
from sdesens.errors import ArgumentError, NonFiniteError, SdesensError, ZeroGradientWarning
from sdesens.models import MODELS, barrier, gbm, gbm_digital, ou
from sdesens.sensitivity.adjoint import adjoint
from sdesens.sensitivity.pathwise import pathwise

module = sys.modules["sdesens.crosscheck"]  # the package has a function of that name

SMALL = {"n_paths": 1000, "refine_paths": 500, "progress": False}


def verdicts(check, method):
    return {c.name: c.ok for c in check.comparisons if c.method == method}


def test_every_route_agrees_on_gbm():
    known = gbm(n_steps=32)
    answers = {
        "scheme": Answer(*known.answers("scheme"), of_scheme=True),
        "sde": Answer(*known.answers("exact"), of_scheme=False),
    }
    check = crosscheck(known.problem, answers=answers, **SMALL)
    assert check.ok
    along = {"pathwise", "forward", "adjoint", "torchsde_adjoint", "finite_difference"}
    assert set(check.results) == along
    assert len(check.comparisons) == 3 * (5 + 2) + 2  # three parameters by five routes and two answers; two values
    for method in ("adjoint", "torchsde_adjoint"):
        # 500 paths, heavy tails of x^2: the fitted order scatters by about 0.05 around 1/2
        assert check.refinement.order(method) == pytest.approx(0.5, abs=0.15)
        assert check.refinement.order(method, "error") == pytest.approx(0.5, abs=0.15)
    assert check.refinement.order("pathwise", "error") == pytest.approx(0.5, abs=0.15)


def test_a_wrong_parameter_is_not_hidden_by_another(monkeypatch):
    def skewed(tile, theta):
        found = adjoint(tile, theta)
        return dataclasses.replace(found, gradients={**found.gradients, "s": found.gradients["s"] * 0.9})

    one = torch.ones(1, dtype=torch.float64)
    params = {"mu": 0.5 * one[0], "k": 0.8 * one[0], "s": 0.3 * one[0]}
    sde = SDE(lambda t, y, p: p["mu"] * y + p["s"], lambda t, y, p: p["k"] * y, params)
    problem = Problem(sde, lambda ys, p: ys[-1, :, 0] ** 2, one, (0.0, 1.0), 64)
    assert crosscheck(problem, methods=("pathwise", "adjoint"), **SMALL).ok
    monkeypatch.setitem(module.METHODS, "adjoint", skewed)
    assert verdicts(crosscheck(problem, methods=("pathwise", "adjoint"), **SMALL), "adjoint")["s"] is False


@pytest.mark.parametrize(
    ("name", "broken", "caught"),
    [
        ("forward", lambda tile, theta: _scaled(pathwise(tile, theta), 1 + 1e-9), "not the same number"),
        ("finite_difference", lambda tile, theta: _scaled(pathwise(tile, theta), 1.02), "not the same derivative"),
        ("adjoint", lambda tile, theta: adjoint(tile, theta, corrected=False), "does not converge"),
    ],
)
def test_wrong_route_is_caught(monkeypatch, name, broken, caught):
    monkeypatch.setitem(module.METHODS, name, broken)
    check = crosscheck(gbm(n_steps=32, sigma=0.5).problem, methods=("pathwise", name), wrt=("mu",), **SMALL)
    assert not check.ok
    assert caught in next(c.verdict for c in check.comparisons if c.method == name)


@pytest.mark.parametrize("of_scheme", [True, False])
def test_wrong_answer_is_caught(of_scheme):
    known = ou(n_steps=16)
    value, gradient = known.answers("scheme" if of_scheme else "exact")
    wrong = {k: v * 1.5 for k, v in gradient.items()}
    check = crosscheck(known.problem, answers={"wrong": Answer(value, wrong, of_scheme)}, methods="pathwise", **SMALL)
    assert verdicts(check, "pathwise") == dict.fromkeys(gradient, True)
    # 1000 paths resolve half of these gradients at more than 4.5 standard errors
    assert verdicts(check, "wrong")["m"] is False
    assert verdicts(check, "wrong")["value"] is True


def test_silent_zero_of_a_jump_fails():
    with pytest.warns(Warning, match="exactly zero on every path"):
        check = crosscheck(gbm_digital(n_steps=16).problem, wrt=("sigma",), methods=("pathwise", "forward"), **SMALL)
    assert verdicts(check, "pathwise") == {"sigma": False}
    assert check.audit.kind == "jump"
    assert "refused: it misses the jump" in repr(check)


def test_a_jump_is_answered_by_what_applies():
    known = gbm_digital(n_steps=16)
    with pytest.warns(Warning, match="exactly zero on every path"):
        check = crosscheck(
            known.problem, answers={"closed form": Answer(*known.answers(), of_scheme=False)}, n_paths=20_000
        )
    assert check.ok
    assert check.reference == "conditional"
    names = ("r", "sigma", "s0")
    for method in ("pathwise", "forward"):
        assert verdicts(check, method) == dict.fromkeys(names)  # shown, not judged
    for method in ("vibrato", "malliavin", "likelihood_ratio"):
        assert verdicts(check, method) == dict.fromkeys(names, True)
    assert check.refinement is None
    # negative control: a closed form that is off by a tenth is a dozen standard errors off
    value, gradient = known.answers()
    wrong = Answer(value, {k: 1.1 * v for k, v in gradient.items()}, of_scheme=False)
    with pytest.warns(Warning, match="exactly zero on every path"):
        assert not crosscheck(known.problem, answers={"wrong": wrong}, n_paths=400_000, wrt="s0").ok


def test_a_barrier_watched_at_output_times_is_another_number():
    known = barrier(n_steps=8)
    answers = {"closed form": Answer(*known.answers(), of_scheme=False)}
    check = crosscheck(known.problem, answers=answers, n_paths=20_000, wrt=("s0", "sigma"))
    assert check.ok
    assert verdicts(check, "likelihood_ratio") == {"s0": None, "sigma": None}
    assert "another number" in repr(check)


def double_well():
    """Langevin motion in a double well: the state run backwards leaves every bound."""
    a = torch.tensor(4.0, dtype=torch.float64)
    sde = SDE(lambda t, y, p: -p["a"] * y * (y * y - 1), lambda t, y, p: 0.7 * torch.ones_like(y), {"a": a})
    return Problem(sde, lambda ys, p: ys[-1, :, 0] ** 2, 0.5 * torch.ones(1, dtype=torch.float64), (0.0, 4.0), 128)


@pytest.mark.filterwarnings("ignore::sdesens.HighVarianceWarning")  # some paths all but change wells
def test_adjoint_that_is_not_finite_fails():
    with pytest.raises(NonFiniteError, match=r"the adjoint gradient with respect to 'a'.*use method='pathwise'"):
        sensitivity(double_well(), n_paths=2000, method="adjoint")
    check = crosscheck(double_well(), methods=("pathwise", "forward", "adjoint"), n_paths=2000, refine_paths=200)
    assert verdicts(check, "forward") == {"a": True}
    assert verdicts(check, "adjoint") == {"a": False}
    assert "not finite" in repr(check)


def test_float32_network_agrees_and_many_components_skip_differences():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    params = {k.replace(".", "_"): v.detach() for k, v in net.named_parameters()}

    def drift(t, y, p):
        return torch.tanh(y @ p["0_weight"].T + p["0_bias"]) @ p["2_weight"].T + p["2_bias"]

    sde = SDE(drift, lambda t, y, p: 0.3 * torch.ones_like(y), params)
    problem = Problem(sde, lambda ys, p: ys[-1, :, 0] ** 2, torch.ones(1), (0.0, 1.0), 16)
    assert crosscheck(problem, methods=("pathwise", "forward", "finite_difference"), refine=False, n_paths=1000).ok
    wide = {"0_weight": torch.randn(64, 1), "0_bias": torch.zeros(64), "2_weight": torch.randn(1, 64) / 64}
    wide["2_bias"] = torch.zeros(1)
    problem = dataclasses.replace(problem, sde=SDE(drift, sde.diffusion, wide))
    assert "193 components" in crosscheck(problem, refine=False, n_paths=100).skipped["finite_difference"]


def test_two_steps_and_a_gradient_that_vanishes_on_some_components():
    # in two steps from v0 = theta, kappa has not moved anything that log S sees
    with pytest.warns(ZeroGradientWarning, match="'kappa'"):
        check = crosscheck(MODELS["heston"](n_steps=2).problem, n_paths=200, refine_paths=50)
    assert verdicts(check, "pathwise")["kappa"] is False
    assert verdicts(check, "forward")["kappa"] is None
    assert verdicts(check, "forward")["xi"] is True


def test_adjoint_is_not_judged_without_refinement():
    problem = gbm(n_steps=16).problem
    check = crosscheck(problem, methods=("pathwise", "adjoint"), wrt="mu", refine=False, n_paths=200)
    assert set(verdicts(check, "adjoint").values()) == {None}
    assert check.refinement is None
    assert check.ok


def test_reference_is_the_first_method_where_pathwise_is_left_out():
    check = crosscheck(ou(n_steps=16).problem, methods=("forward", "finite_difference"), refine=False, n_paths=200)
    assert check.reference == "forward"
    assert check.ok


def test_horizon_leaves_out_torchsde_and_says_so():
    check = crosscheck(gbm(n_steps=16).problem, wrt=("mu", "t1"), refine=False, n_paths=200)
    assert "torchsde_adjoint" not in check.results
    assert "t1" in check.skipped["torchsde_adjoint"]
    assert "torchsde_adjoint left out" in repr(check)


def test_tensor_parameter_shows_its_worst_component():
    check = crosscheck(MODELS["ou-nd"](n_steps=8).problem, methods=("pathwise", "forward"), refine=False, n_paths=200)
    names = {c.name for c in check.comparisons}
    assert any(name.startswith("A[") for name in names)
    assert check.ok


def test_refinement_starts_at_the_grid_itself_where_it_cannot_be_coarsened():
    problem = dataclasses.replace(gbm(n_steps=9).problem, ts=(0.0, 1 / 9, 1.0))
    study = crosscheck(problem, methods=("pathwise", "adjoint"), wrt=("mu",), **SMALL).refinement
    assert study.n_steps == (9, 18, 36)


def test_prints_and_serialises():
    check = crosscheck(ou(n_steps=16).problem, methods=("pathwise", "adjoint"), **SMALL)
    text = repr(check)
    assert "kappa" in text
    assert "adjoint" in text
    assert "16 steps" in text
    data = json.loads(json.dumps(check.to_dict()))
    assert data["ok"] is True
    assert data["results"]["pathwise"]["gradient"]["kappa"]["n"] == 1000
    assert math.isclose(data["refinement"]["orders"]["adjoint"]["deviation"], check.refinement.order("adjoint"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"methods": ("pathwyse",)}, "pathwyse.*pathwise"), ({"methods": ()}, "`methods` is empty")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        crosscheck(gbm(n_steps=8).problem, n_paths=10, **arguments)


def test_peak_memory_sees_an_allocation():
    measure = module.PeakMemory()
    block = torch.ones(8_000_000, dtype=torch.float64)  # 61 MiB
    del block
    rise = measure.bytes()
    if rise is None:
        pytest.skip("the platform does not report peak memory")
    assert 55 * 2**20 < rise < 90 * 2**20


def test_float32_problem_agrees():
    assert crosscheck(ou(n_steps=16, dtype=torch.float32).problem, **SMALL).ok


def _scaled(contributions, factor):
    return dataclasses.replace(contributions, gradients={k: v * factor for k, v in contributions.gradients.items()})


def test_problem_type_is_kept():
    assert isinstance(gbm(n_steps=8).problem, Problem)


def test_a_comparison_is_answered_without_routes_along_the_path():
    """A bare comparison cuts F off from the graph: nothing along the path to show, and the methods for jumps apply."""
    known = gbm_digital(log=True, n_steps=4)
    bare = dataclasses.replace(known.problem, functional=lambda ys, p: (ys[-1, :, 0] > math.log(100.0)).double())
    check = crosscheck(bare, n_paths=4000, wrt=("s0", "sigma"))
    assert check.ok
    assert check.reference == "vibrato"
    assert set(check.results) == {"vibrato", "malliavin", "likelihood_ratio"}
    with pytest.raises(SdesensError, match="method='auto'"):
        sensitivity(bare, n_paths=100, wrt="s0")
