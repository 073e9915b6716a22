"""Jumps, kinks and what is smooth, from values alone: `zoom` on plain functions, `audit` on the problems of `audit_cases`.

Each path's own function of one number is followed to its roughest spot, so a verdict hardly depends on the seed: over 50
seeds (`python tests/audit_cases.py`) no jump passes for anything else and nothing smooth for a jump. Here a few.
"""

import math
import os
from dataclasses import replace

import pytest
import torch
from audit_cases import CASES, X, above, brownian, gbm
from problems import F64, scalar

from sdesens import SDE, Philox, Problem
from sdesens.audit import Audit, audit, look, rows_function
from sdesens.errors import ArgumentError, ArgumentTypeError, UnknownParameterError
from sdesens.functionals import Call, Digital, Moment
from sdesens.zoom import STAGES, examine, paths_looked_at

SEEDS = range(int(os.environ.get("AUDIT_SEEDS", "3")))
ROWS = 20_000
Z = torch.linspace(-3, 3, paths_looked_at(ROWS), dtype=F64)


# zoom, on functions of one number

PLAIN = {
    "line": (lambda x: 3 * x, "smooth", None),
    "cubic": (lambda x: x**3, "smooth", 3),
    "sine": (torch.sin, "smooth", 3),
    "jump of the second derivative": (lambda x: x.relu() ** 2, "smooth", 2),
    "kink": (torch.relu, "kink", 1),
    "root": (lambda x: (x - 0.3).abs().sqrt(), "kink", 0.5),
    "third root": (lambda x: (x - 0.3).abs() ** (1 / 3), "kink", 1 / 3),
    "jump": (lambda x: above(x, 0.3), "jump", 0),
    "jump of 1e-3": (lambda x: x**2 + 1e-3 * above(x, 0.3), "jump", 0),
    "logarithm": (lambda x: (x - 0.3).abs().log(), "jump", None),
    "pole": (lambda x: 1 / (x - 0.3), "jump", None),
    "staircase of float32": (lambda x: (x + 2).float().to(F64) ** 2, "smooth", None),
    "jump of 1e-7": (lambda x: x + 1e-7 * above(x, 0.3), "smooth", None),
}


@pytest.mark.parametrize("name", PLAIN)
def test_exponents_of_plain_functions(name):
    f, kind, exponent = PLAIN[name]
    found = examine(lambda e, i: f(Z[i] + e), rows=ROWS)
    assert found.kind == kind
    # D / delta^a lies within a factor of 2, and the last two stages divide delta by 150: a third at most, a median less
    assert exponent is None or found.exponent == pytest.approx(exponent, abs=0.2)


def test_the_part_of_the_paths_that_jump():
    """Paths z in [-3, 3] that jump at 0.3, and sections that reach over 5/3 in all."""
    found = examine(lambda e, i: above(Z[i] + e, 0.3), rows=ROWS)
    assert found.share == pytest.approx(
        5 / 18, rel=0.05
    )  # a jump in an outermost section shows half as large beside it
    assert found.size == 1


@pytest.mark.parametrize("f", [torch.relu, lambda x: above(x), torch.sin])
def test_each_pass_has_so_many_rows(f):
    asked = []

    def F(e, i):
        assert e.dtype == F64
        assert int(i.max()) < paths_looked_at(ROWS)
        asked.append(len(e))
        return f(Z[i] + e)

    found = examine(F, rows=ROWS)
    assert len(asked) == found.passes <= 1 + STAGES
    assert max(asked) <= ROWS
    assert sum(asked) == found.rows


def test_paths_that_are_not_finite_are_left_out():
    assert examine(lambda e, i: (Z[i] + e).log(), rows=ROWS).kind == "smooth"
    assert examine(lambda e, i: torch.where(Z[i] > 0, above(Z[i] + e, 1.0), math.nan), rows=ROWS).kind == "jump"
    assert examine(lambda e, i: Z[i] * math.nan, rows=ROWS).kind == "unknown"


def test_a_jump_that_lies_on_the_base_point_itself():
    """Such as a threshold that is the parameter's own value: every path jumps at e = 0."""
    assert examine(lambda e, i: Z[i] + above(e), rows=ROWS).kind == "jump"


# audit, on problems


@pytest.mark.parametrize("name", CASES)
def test_cases(name):
    case = CASES[name]
    for seed in SEEDS:
        found = audit(case.problem, wrt=case.wrt, seed=seed)
        assert case.right(found), (seed, found)
        assert found.passes <= 6
        assert found.rows <= 6 * ROWS


@pytest.mark.parametrize("name", ["jump: digital", "jump: round", "kink: call", "smooth: exp", "steep: sigmoid 50"])
def test_fewer_paths(name):
    case = CASES[name]
    found = audit(case.problem, n_paths=4000, seed=3)
    assert case.right(found)
    assert found.rows <= 6 * 4000


def test_what_it_costs():
    """Steps solved, counted where the user's code is: at most six forward runs, and a look at what each step is made of."""
    steps = 32
    drifts = []

    def drift(t, y, p):
        drifts.append(y.shape)
        return p["mu"].expand_as(y)

    plain = brownian(lambda ys, p: X(ys).relu())
    problem = replace(plain, sde=replace(plain.sde, drift=drift), n_steps=steps)
    found = audit(problem, n_paths=5000)
    assert {tuple(shape) for shape in drifts} <= {
        (1, 1),
        (2, 1),
        (4, 1),
    }  # one path a row, vectorised; and a few probes
    # six runs and two of a few hundred paths to measure speed, of 32 steps each; the closer look takes three times five calls
    assert len(drifts) <= (found.passes + 2) * steps + 3 * 5 + 20
    assert found.passes <= 6
    assert found.rows <= 6 * 5000


def test_rows_are_paths_at_moved_parameters():
    """Against a plain solution at the same parameters and noise."""
    problem, noise = gbm(Moment(2)), Philox(5)
    theta = problem.leaves(("mu", "y0"))
    direction = {"mu": torch.tensor([0.01, -0.02], dtype=F64), "y0": torch.tensor([[3.0], [1.0]], dtype=F64)}
    e, paths = torch.tensor([0.0, 0.5, -1.0, 0.25], dtype=F64), torch.tensor([2, 0, 3, 3])
    F = rows_function(problem, theta, direction, noise, 1)(e, paths)
    z = noise.normals(0, 4, 0, problem.n_steps, 1, dtype=F64, device=torch.device("cpu"))
    for r in range(4):
        i = int(paths[r])
        at = {k: theta[k] + e[r] * direction[k][i % 2] for k in theta}
        y, h = at["y0"], problem.dt
        for n in range(problem.n_steps):
            y = y + at["mu"] * y * h + problem.sde.params["sigma"] * y * math.sqrt(h) * z[n, i]
        assert float(F[r]) == pytest.approx(float(y**2), rel=1e-12)  # rounding of 32 steps


def test_the_same_seed_gives_the_same_finding():
    problem = gbm(Call(100.0))
    assert audit(problem, seed=4) == audit(problem, seed=4)
    assert audit(problem, seed=4).share != audit(problem, seed=5).share


def test_other_numbers_of_a_path():
    """What the indicator sees held at the parameters' own values leaves no jump; what it multiplies held leaves one."""
    problem = gbm(lambda ys, p: X(ys) * above(X(ys), 100.0))
    theta = problem.leaves()
    held = look(problem, theta, 1, evaluate=lambda ys, ys0, th: X(ys) * above(X(ys0), 100.0))
    moving = look(problem, theta, 1, evaluate=lambda ys, ys0, th: X(ys0) * above(X(ys), 100.0))
    assert (held.kind, moving.kind) == ("smooth", "jump")


def _loud(x):
    """x, by a way that cannot be vectorised."""
    return x if float(x.sum()) > -math.inf else -x


@pytest.mark.parametrize(
    ("f", "kind"),
    [(lambda x: above(x, 100.0), "jump"), (lambda x: (x - 100).relu(), "kink"), (lambda x: x.square(), "smooth")],
)
def test_without_vectorisation(f, kind):
    for seed in range(3):
        found = audit(gbm(lambda ys, p: f(_loud(X(ys)))), seed=seed)
        assert found.kind == kind
        assert found.rows <= 6 * ROWS


def test_more_parameters_than_can_be_copied():
    """A drift of 9,000 numbers: all paths share them."""
    width = 94
    weights = {"a": torch.full((width, 1), width**-0.5, dtype=F64), "b": torch.eye(width, dtype=F64)}
    sde = SDE(lambda t, y, p: -(y @ p["a"].mT) @ p["b"] @ p["a"], lambda t, y, p: 0.5 + 0 * y, weights)
    for f, kind in ((lambda ys, p: above(X(ys), 0.9), "jump"), (lambda ys, p: X(ys), "smooth")):
        found = audit(Problem(sde, f, torch.ones(1, dtype=F64), (0.0, 1.0), 8))
        assert found.kind == kind


def test_parameters_that_may_not_be_moved():
    def stubborn(t, y, p):
        if not torch.equal(p["mu"], torch.tensor(0.05, dtype=F64)):
            raise ArgumentError("mu is 0.05")
        return p["mu"] * y

    found = audit(gbm(Moment(1), drift=stubborn))
    assert found.kind == "unknown"
    assert "mu is 0.05" in found.reason


def test_half_precision_hides_everything():
    assert audit(gbm(lambda ys, p: above(X(ys), 100.0), dtype=torch.bfloat16)).kind == "unknown"


def test_what_never_changes():
    assert audit(gbm(lambda ys, p: 0 * X(ys) + 2)).reason.startswith("it is constant")
    found = audit(gbm(lambda ys, p: above(X(ys), 100.0), extra=1.0), wrt="extra")
    assert found.kind == "unknown"
    assert "does not depend" in found.reason


def test_the_worse_of_declared_and_seen():
    class Declared(Moment):
        kind = "jump"

    found = audit(gbm(Declared(1)))
    assert found.kind == "jump"
    assert "declares" in found.reason
    assert "smooth" in found.reason

    class Modest(Digital):
        kind = "smooth"

    assert audit(gbm(Modest(100.0))).kind == "jump"
    assert audit(gbm(Digital(100.0), dtype=torch.bfloat16)).kind == "jump"  # where nothing can be seen


def test_reads_well():
    found = audit(gbm(Digital(100.0)), wrt="sigma")
    assert repr(found).startswith("jump: it jumps along sigma on 0.")
    assert found.to_dict()["kind"] == "jump"
    assert isinstance(found, Audit)
    root = audit(gbm(lambda ys, p: (X(ys) - 100).abs().sqrt()))
    assert root.singular
    assert "infinite variance" in repr(root)
    assert "steep" in repr(audit(CASES["steep: sigmoid 50"].problem))


def test_what_is_refused():
    problem = gbm(Call(100.0))
    for wrong, error in (
        (lambda: audit("problem"), ArgumentTypeError),
        (lambda: audit(problem, n_paths=10), ArgumentError),
        (lambda: audit(problem, n_paths=2e4), ArgumentTypeError),
        (lambda: audit(problem, wrt="nu"), UnknownParameterError),
        (lambda: audit(problem, wrt=()), ArgumentError),
        (lambda: audit(problem, seed="1"), ArgumentTypeError),
    ):
        with pytest.raises(error):
            wrong()


def test_gradients_stay_as_they_were():
    """Parameters that require grad are looked at, not recorded."""
    mu = scalar(0.05).requires_grad_()
    sde = SDE(lambda t, y, p: p["mu"] * y, lambda t, y, p: 0.2 * y, {"mu": mu})
    audit(Problem(sde, Call(100.0), scalar(100.0)[None], (0.0, 1.0), 8))
    assert mu.grad is None
    assert torch.is_grad_enabled()
