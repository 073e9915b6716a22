"""What must be refused, and how: the typed error, the name of the argument, and what to do instead."""

import math

import numpy as np
import pytest
import torch

from sdesens import METHODS, SDE, Antithetic, Estimate, GivenNoise, Philox, Problem, sdeint, sensitivity
from sdesens.errors import (
    ArgumentError,
    ArgumentTypeError,
    CalculusError,
    DetachedError,
    DtypeError,
    GridError,
    NoiseStructureError,
    NonFiniteError,
    NotAFunctionError,
    SdesensError,
    ShapeError,
    UnknownParameterError,
    UnusedParameterError,
    ZeroGradientWarning,
)

F64, NAN = torch.float64, math.nan
PARAMS = {"mu": torch.tensor(0.05, dtype=F64), "sigma": torch.tensor(0.2, dtype=F64)}


def ones(*shape, dtype=F64):
    return torch.ones(shape, dtype=dtype)


def gbm(**changes):
    given = {
        "drift": lambda t, y, p: p["mu"] * y,
        "diffusion": lambda t, y, p: p["sigma"] * y,
        "params": PARAMS,
        **changes,
    }
    return SDE(**given)


def solve(y0=None, ts=(0.0, 1.0), n_steps=8, seed=1, sde=None, **changes):
    """sdeint on a sound problem with something changed: an argument of sdeint, or of the SDE."""
    options = {k: changes.pop(k) for k in ("dt", "bm", "method", "check") if k in changes}
    sde = gbm(**changes) if sde is None else sde
    return sdeint(sde, ones(3, 2) if y0 is None else y0, ts, n_steps=n_steps, seed=seed, **options)


def problem(functional=None, y0=None, ts=(0.0, 1.0), n_steps=8, **changes):
    functional = (lambda ys, p: ys[-1].sum(-1)) if functional is None else functional
    return Problem(gbm(**changes), functional, ones(2) if y0 is None else y0, ts, n_steps)


def run(functional=None, y0=None, ts=(0.0, 1.0), n_steps=8, n_paths=100, **changes):
    """sensitivity on a sound problem with something changed."""
    names = ("method", "wrt", "seed", "noise", "first_path", "bias", "tile_paths", "executor", "audit")
    options = {k: changes.pop(k) for k in names if k in changes}
    return sensitivity(problem(functional, y0, ts, n_steps, **changes), n_paths=n_paths, **options)


def refuses(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, SdesensError)
    return caught.value


def test_the_sound_problem_is_accepted():
    assert solve().shape == (2, 3, 2)
    assert set(run().gradient) == {"mu", "sigma"}


# SDE and Problem, when they are made


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"drift": "mu"}, ArgumentTypeError, r"`drift` must be a function of \(t, y, p\), got 'mu'"),
        ({"diffusion": None}, ArgumentTypeError, r"`diffusion` must be a function of \(t, y, p\), got None"),
        ({"drift": lambda t, y: y}, ArgumentTypeError, r"`drift` must be a function of \(t, y, p\), .*\(t, y\)"),
        ({"diffusion": lambda *, t: t}, ArgumentTypeError, r"`diffusion` must be a function of \(t, y, p\)"),
        ({"noise_type": "Diagonal"}, ArgumentError, "`noise_type` must be one of 'diagonal', .*got 'Diagonal'"),
        ({"noise_type": None}, ArgumentError, "`noise_type` must be one of .*got None"),
        ({"sde_type": "strat"}, ArgumentError, "`sde_type` must be one of 'ito', 'stratonovich', got 'strat'"),
        ({"noise_dim": 0}, ArgumentError, "`noise_dim` must be a positive int, got 0: leave it out"),
        ({"noise_dim": True}, ArgumentError, "`noise_dim` must be a positive int, got True"),
        ({"noise_dim": 2.0}, ArgumentError, "`noise_dim` must be a positive int, got 2.0"),
        ({"params": [1.0]}, ArgumentTypeError, "`params` must map names to tensors, got list: use {"),
        ({"params": None}, ArgumentTypeError, "`params` must map names to tensors, got NoneType"),
        ({"params": {1: ones()}}, ArgumentTypeError, "`params` must have strings for names, got 1: use '1'"),
        ({"params": {"mu": 0.1}}, ArgumentTypeError, r"parameter `mu` must be a tensor, got 0.1: use torch.tensor"),
        ({"params": {"mu": np.ones(2)}}, ArgumentTypeError, "parameter `mu` must be a tensor, got array"),
        ({"params": {"mu": torch.tensor(1)}}, DtypeError, "parameter `mu` must be .*got torch.int64: use torch.float64"),
        ({"params": {"mu": torch.tensor(True)}}, DtypeError, "parameter `mu` must be .*got torch.bool"),
        ({"params": {"mu": ones(dtype=torch.complex64)}}, DtypeError, "parameter `mu` must be real and floating"),
        ({"params": {"mu": ones(0)}}, ShapeError, r"parameter `mu` is empty, shape \(0,\): leave it out"),
        ({"params": {"y0": ones()}}, ArgumentError, "may not be called `y0`.*rename it"),
        ({"params": {"t1": ones()}}, ArgumentError, "may not be called `t1`.*rename it"),
    ],
)  # fmt: skip
def test_an_equation_that_makes_no_sense(changes, error, message):
    refuses(lambda: gbm(**changes), error, message)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"nu": ones()}, UnknownParameterError, "`nu` is not a parameter of this SDE; it has `mu`, `sigma`"),
        ({"mu": 1.0}, ArgumentTypeError, "parameter `mu` must be a tensor, got 1.0"),
        ({"mu": ones(2)}, ShapeError, r"parameter `mu` has shape \(\), got \(2,\).*make a new SDE"),
        ({"mu": torch.tensor(1)}, DtypeError, "parameter `mu` must be real and floating"),
    ],
)
def test_other_parameter_values_that_do_not_fit(value, error, message):
    refuses(lambda: gbm().with_params(**value), error, message)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"functional": 3}, ArgumentTypeError, r"`functional` must be a function of \(ys, p\), got 3"),
        ({"functional": lambda ys: ys}, ArgumentTypeError, r"`functional` must be a function of \(ys, p\).*\(ys\)"),
        ({"y0": [1.0, 2.0]}, ArgumentTypeError, r"`y0` must be a tensor or a function of p, got list: use torch.tensor"),
        ({"y0": torch.tensor(1.0)}, ShapeError, r"`y0` must have shape \(d,\).*got \(\): use y0\[None\]"),
        ({"y0": ones(0)}, ShapeError, r"`y0` must have shape \(d,\) with no empty axis, got \(0,\)"),
        ({"y0": torch.tensor([1, 2])}, DtypeError, "`y0` must be real and floating, got torch.int64: use torch.float64"),
        ({"y0": torch.tensor([1.0, NAN])}, NonFiniteError, "`y0` holds NaN or infinite values.*must be finite"),
        ({"y0": lambda: ones(2)}, ArgumentTypeError, r"`y0` must be a function of \(p\)"),
        ({"y0": lambda p: None}, ArgumentTypeError, r"`y0\(p\)` must be a tensor, got NoneType: use torch.tensor"),
        ({"y0": lambda p: [1.0]}, ArgumentTypeError, r"`y0\(p\)` must be a tensor, got list"),
        ({"y0": lambda p: p["mu"]}, ShapeError, r"`y0\(p\)` must have shape \(d,\).*use y0\[None\]"),
        ({"y0": lambda p: torch.tensor([1])}, DtypeError, r"`y0\(p\)` must be real and floating, got torch.int64"),
        ({"y0": lambda p: p["mu"][None].log() * NAN}, NonFiniteError, r"`y0\(p\)` holds NaN"),
        ({"y0": lambda p: torch.randn(2)}, NotAFunctionError, r"`y0\(p\)` returned two different results.*give a tensor"),
        ({"n_steps": True}, ArgumentTypeError, "`n_steps` must be an int, got True"),
    ],
)  # fmt: skip
def test_a_question_that_makes_no_sense(changes, error, message):
    refuses(lambda: problem(**changes), error, message)


def test_a_problem_needs_an_sde():
    refuses(
        lambda: Problem("x", len, ones(2), (0.0, 1.0), 2), ArgumentTypeError, r"`sde` must be an SDE.*as_sde\(module\)"
    )
    refuses(
        lambda: sdeint("x", ones(3, 2), (0.0, 1.0), n_steps=2), ArgumentTypeError, r"`module` \(str\) needs methods f"
    )


# the grid, through sdeint and through Problem


@pytest.mark.parametrize("entry", [solve, problem])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_steps": 0}, GridError, "`n_steps` must be at least 1, got 0"),
        ({"n_steps": -3}, GridError, "`n_steps` must be at least 1, got -3"),
        ({"n_steps": 8.0}, ArgumentTypeError, r"`n_steps` must be an int, got 8.0: use int"),
        ({"n_steps": np.int64(8)}, ArgumentTypeError, r"`n_steps` must be an int, got np.int64\(8\): use int"),
        ({"n_steps": "8"}, ArgumentTypeError, "`n_steps` must be an int, got '8'"),
        ({"n_steps": True}, ArgumentTypeError, "`n_steps` must be an int, got True"),
        ({"ts": (1.0, 0.0)}, GridError, r"`ts` must increase strictly.*ts\[0\] = 1.0.*sort the times"),
        ({"ts": (0.0, 0.5, 0.5, 1.0)}, GridError, r"`ts` must increase strictly.*ts\[1\] = 0.5.*drop repeats"),
        ({"ts": (0.0, 0.0)}, GridError, "`ts` must increase strictly"),
        ({"ts": (0.0, NAN)}, GridError, "`ts` must be finite.*give each time as a number"),
        ({"ts": (0.0, math.inf)}, GridError, "`ts` must be finite"),
        ({"ts": (0.0, 0.3, 1.0)}, GridError, r"ts\[1\] = 0.3 lies at step 2.4 of 8.*nothing is interpolated. Choose `n_steps`"),
        ({"ts": (0.0, 1e-5, 1.0)}, GridError, r"ts\[1\] = 1e-05 lies at step 8e-05 of 8"),
        ({"ts": (1.0,)}, GridError, r"`ts` must hold at least two times.*got shape \(1,\): use \(t0, t1\)"),
        ({"ts": 1.0}, GridError, r"`ts` must hold at least two times.*got shape \(\)"),
        ({"ts": torch.zeros(1, 2)}, GridError, r"`ts` must hold at least two times.*got shape \(1, 2\)"),
        ({"ts": "ab"}, ArgumentTypeError, r"`ts` must be a sequence of times or a tensor, got str: use \(t0, t1\)"),
        ({"ts": None}, ArgumentTypeError, "`ts` must be a sequence of times or a tensor, got NoneType"),
        ({"ts": ones(2, dtype=torch.complex64)}, DtypeError, "`ts` must hold real numbers, got torch.complex64: use"),
        ({"ts": torch.tensor([False, True])}, DtypeError, "`ts` must hold real numbers, got torch.bool"),
        (
            {"ts": (0.0, torch.tensor(1.0, requires_grad=True))},
            ArgumentTypeError,
            r"`ts` is a sequence that holds a tensor which requires grad; its gradient would be lost: use torch.stack",
        ),
    ],
)  # fmt: skip
def test_a_grid_that_makes_no_sense(entry, changes, error, message):
    refuses(lambda: entry(**changes), error, message)


@pytest.mark.parametrize(
    "ts",
    [(0, 1), [0, 0.5, 1], np.array([0.0, 0.25, 1.0]), torch.tensor([0, 1]), torch.tensor([0.0, 0.125, 1.0])],
    ids=str,
)
def test_times_of_every_kind_mean_the_same_grid(ts):
    assert torch.equal(solve(ts=ts)[-1], solve()[-1])


def test_float32_times_lie_on_a_decimal_grid():
    ts = torch.arange(0, 1001, 10, dtype=torch.float32) / 1000  # 0.01, 0.02, ... are off by 1e-8
    assert solve(ts=ts, n_steps=1000).shape == (101, 3, 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_steps": None}, ArgumentTypeError, "give one of `dt` and `n_steps`"),
        ({"dt": 0.125}, ArgumentTypeError, "give one of `dt` and `n_steps`"),
        ({"n_steps": None, "dt": 0.3}, GridError, r"`dt` = 0.3 does not divide the span 1.0 of `ts`.*choose dt = span / n"),
        ({"n_steps": None, "dt": 2.0}, GridError, "`dt` = 2.0 does not divide the span"),
        ({"n_steps": None, "dt": 0.0}, GridError, "`dt` must be a positive number.*got 0.0: or give `n_steps`"),
        ({"n_steps": None, "dt": -0.5}, GridError, "`dt` must be a positive number.*got -0.5"),
        ({"n_steps": None, "dt": NAN}, GridError, "`dt` must be a positive number.*got nan"),
        ({"n_steps": None, "dt": math.inf}, GridError, "`dt`.*inf"),
        ({"n_steps": None, "dt": 1e-300}, GridError, "`dt` must be a positive number that fits the span"),
        ({"n_steps": None, "dt": "a"}, ArgumentTypeError, "`dt` must be a float, got 'a': use float"),
        ({"n_steps": None, "dt": True}, ArgumentTypeError, "`dt` must be a float, got True"),
        ({"n_steps": None, "dt": torch.tensor(0.125)}, ArgumentTypeError, r"`dt` must be a float, got tensor\(0.1250\)"),
        ({"method": "milstein"}, ArgumentError, "`method` must be one of 'euler', got 'milstein'"),
        ({"method": None}, ArgumentError, "`method` must be one of 'euler', got None"),
        ({"bm": Philox(0)}, ArgumentError, "give `bm` or `seed`, not both"),
        ({"seed": True}, ArgumentTypeError, "`seed` must be an int, got True"),
        ({"seed": 1.0}, ArgumentTypeError, r"`seed` must be an int, got 1.0 \(float\): use int"),
        ({"seed": 2**64}, ArgumentError, "`seed` must lie in"),
        ({"sde_type": "stratonovich"}, CalculusError, r"declares sde_type='stratonovich'.*pass to_ito\(sde\)"),
    ],
)  # fmt: skip
def test_options_of_sdeint_that_make_no_sense(changes, error, message):
    refuses(lambda: solve(**changes), error, message)


@pytest.mark.parametrize(
    ("y0", "error", "message"),
    [
        (ones(2), ShapeError, r"`y0` must have shape \(B, d\), one row a path.*got \(2,\): use y0.expand\(B, -1\)"),
        (ones(), ShapeError, r"`y0` must have shape \(B, d\).*got \(\)"),
        (ones(0, 2), ShapeError, r"`y0` must have shape \(B, d\).*no empty axis, got \(0, 2\)"),
        (ones(3, 0), ShapeError, r"`y0` .*no empty axis, got \(3, 0\)"),
        ([[1.0, 2.0]], ArgumentTypeError, r"`y0` must be a tensor, got list: use torch.tensor"),
        (np.ones((3, 2)), ArgumentTypeError, "`y0` must be a tensor, got ndarray"),
        (ones(3, 2, dtype=torch.int64), DtypeError, "`y0` must be real and floating, got torch.int64: use torch.float64"),
        (ones(3, 2, dtype=torch.bool), DtypeError, "`y0` must be real and floating, got torch.bool"),
        (ones(3, 2, dtype=torch.complex128), DtypeError, "`y0` must be real and floating, got torch.complex128"),
        (torch.ones(3, 2).to(torch.float8_e4m3fn), DtypeError, "`y0` must be real and floating, got torch.float8"),
        (ones(3, 2) * NAN, NonFiniteError, r"`y0` holds NaN or infinite values: \[nan.*every entry must be finite"),
        (ones(3, 2) / 0, NonFiniteError, "`y0` holds NaN or infinite values"),
    ],
)  # fmt: skip
def test_initial_states_that_make_no_sense(y0, error, message):
    refuses(lambda: solve(y0=y0), error, message)


INCREMENTS = r"`bm` must hold increments of shape \(n_steps, B, m\) = \(8, 3, 2\), got "


@pytest.mark.parametrize(
    ("bm", "error", "message"),
    [
        (ones(8, 5, 2), ShapeError, INCREMENTS + r"\(8, 5, 2\): give one for"),  # more paths than states
        (ones(8, 2, 2), ShapeError, INCREMENTS),
        (ones(8, 3, 1), ShapeError, INCREMENTS),
        (ones(7, 3, 2), ShapeError, INCREMENTS),
        (ones(9, 3, 2), ShapeError, INCREMENTS),
        (ones(3, 2), ShapeError, INCREMENTS),
        (ones(8, 3, 2, dtype=torch.int64), ShapeError, "`dW` must be a floating tensor of increments"),
        (ones(8, 3, 2) * NAN, ArgumentError, "NaN or infinite"),
        (np.ones((8, 3, 2)), ArgumentTypeError, r"`bm` must be a noise source, .*torch.as_tensor\(...\) for an array"),
        ("x", ArgumentTypeError, r"`bm` must be a noise source, a tensor of increments or bm\(ta, tb\), got str: use"),
        (Philox, ArgumentTypeError, r"`bm` must be a noise source.*use Philox\(seed\)"),
        (lambda a, b: None, ShapeError, r"`bm\(ta, tb\)` must return the increment, a tensor \(B, m\) = \(3, 2\), got NoneType"),
        (lambda a, b: ones(5, 2), ShapeError, r"`bm\(ta, tb\)` must return .*got torch.float64 of shape \(5, 2\)"),
        (lambda a, b: ones(3), ShapeError, r"`bm\(ta, tb\)` must return .*got torch.float64 of shape \(3,\)"),
        (GivenNoise(ones(8, 2, 2)), ArgumentError, "the given noise holds 2 paths x 8 steps.*give more noise"),
        (GivenNoise(ones(7, 3, 2)), ShapeError, "`bm` holds 7 steps, but the grid has 8: give noise made for this grid"),
        (GivenNoise(ones(16, 3, 2)), ShapeError, "`bm` holds 16 steps, but the grid has 8"),  # it is of another step
        (GivenNoise(ones(8, 3, 1)), ShapeError, r"the given noise has 1 components.*give z of shape \(N, B, 2\)"),
    ],
)  # fmt: skip
def test_a_brownian_motion_that_does_not_fit(bm, error, message):
    refuses(lambda: solve(bm=bm, seed=None), error, message)


# coefficients, through sdeint and through sensitivity


DRIFT_SHAPE = r"`drift\(t, y, p\)` returned shape .*must have the shape of y. Keep the state axis"


@pytest.mark.parametrize("entry", [solve, run])
@pytest.mark.parametrize(
    ("drift", "error", "message"),
    [
        (lambda t, y, p: p["mu"] * y[:, 0], ShapeError, DRIFT_SHAPE),
        (lambda t, y, p: p["mu"] * y[:1], ShapeError, DRIFT_SHAPE),
        (lambda t, y, p: p["mu"] * y[0], ShapeError, DRIFT_SHAPE),
        (lambda t, y, p: p["mu"] * y[:, :1], ShapeError, DRIFT_SHAPE),
        (lambda t, y, p: p["mu"], ShapeError, DRIFT_SHAPE),
        (lambda t, y, p: p["mu"] * y[:, :, None], ShapeError, DRIFT_SHAPE),
        (lambda t, y, p: p["mu"] * y.T, ShapeError, DRIFT_SHAPE),
        (lambda t, y, p: (p["mu"] * y).squeeze(0), ShapeError, r"`drift.*for one path.*Do not squeeze\(\) it"),
        (lambda t, y, p: p["mu"] * y if len(y) > 1 else y[0], ShapeError, "`drift.*keep axis 0 whatever the number of"),
        (lambda t, y, p: None, ShapeError, r"`drift\(t, y, p\)` must return a tensor, got NoneType: use torch.ones_like"),
        (lambda t, y, p: y.detach().numpy(), ShapeError, "`drift.*must return a tensor, got ndarray"),
        (lambda t, y, p: (y,), ShapeError, "`drift.*must return a tensor, got tuple"),
        (lambda t, y, p: 0.0, ShapeError, "`drift.*must return a tensor, got float"),
        (lambda t, y, p: (p["mu"] * y).float(), DtypeError, r"`drift.*returned torch.float32, .*torch.float64: give `y0` and"),
        (lambda t, y, p: (y > 0).long(), DtypeError, r"`drift.*returned torch.int64"),
        (lambda t, y, p: p["mu"] * y + 0j, DtypeError, r"`drift.*returned torch.complex128"),
        (lambda t, y, p: p["mu"] * (y - y.mean(0)), NotAFunctionError, r"`drift.*mixes paths.*reduce over dim=1"),
        (lambda t, y, p: p["mu"] * y.flip(0), NotAFunctionError, r"`drift.*mixes paths"),
        (lambda t, y, p: p["mu"] * torch.rand_like(y), NotAFunctionError, r"`drift.*two different results.*module.eval\(\)"),
        (
            lambda t, y, p: p["mu"] * torch.nn.functional.dropout(y),
            NotAFunctionError,
            r"`drift.*two different results.*dropout.*into the noise",
        ),
        (lambda t, y, p: y.mul_(0.5) * p["mu"], NotAFunctionError, r"`drift\(t, y, p\)` writes into y: work on a copy, y.clone"),
    ],
)  # fmt: skip
def test_drifts_that_make_no_sense(entry, drift, error, message):
    refuses(lambda: entry(drift=drift), error, message)


class Counter:
    """A drift that keeps state."""

    calls = 0

    def __call__(self, t, y, p):
        self.calls += 1
        return p["mu"] * y * self.calls


def test_a_drift_that_remembers_is_refused():
    refuses(lambda: solve(drift=Counter()), NotAFunctionError, "two different results.*keeps state")


def test_a_batch_norm_mixes_paths():
    norm = torch.nn.BatchNorm1d(2, track_running_stats=False).double()
    refuses(lambda: solve(drift=lambda t, y, p: norm(y) if len(y) > 1 else 0 * y), NotAFunctionError, "mixes paths")


@pytest.mark.parametrize("entry", [solve, run])
def test_a_parameter_with_an_axis_of_paths_is_refused(entry):
    for rows in (3, 4):  # as many as there are paths here, or in the check
        refuses(
            lambda n=rows: entry(params={**PARAMS, "mu": ones(n, 1)}), ShapeError, "`drift.*(axis of paths|broadcast)"
        )


def test_a_parameter_that_broadcasts_over_the_state_is_refused():
    y0, params = ones(3, 1), {**PARAMS, "mu": ones(2)}
    refuses(lambda: solve(y0=y0, params=params), ShapeError, "let no parameter broadcast over it")


@pytest.mark.parametrize("where", ["drift", "diffusion"])
def test_a_written_state_does_not_reach_the_caller(where):
    y0 = ones(3, 2)
    refuses(
        lambda: solve(y0=y0, **{where: lambda t, y, p: y.clamp_(min=2)}), NotAFunctionError, f"`{where}.*writes into y"
    )
    assert torch.equal(y0, ones(3, 2))


DIFFUSION_SHAPES = [
    (
        "diagonal",
        lambda y: y[:, :, None],
        r"\(4, 2, 1\).*noise_type='diagonal' needs \(B, \*event\).*declare noise_type=",
    ),
    ("diagonal", lambda y: torch.diag_embed(y), "declare noise_type='general'"),
    ("diagonal", lambda y: y[:, :1], r"needs \(B, \*event\).*use torch.ones_like\(y\)"),
    ("diagonal", lambda y: y[0], r"needs \(B, \*event\)"),
    ("diagonal", lambda y: y[:, 0], r"needs \(B, \*event\)"),
    ("scalar", lambda y: y, r"needs \(B, d, 1\): add the noise axis, g.unsqueeze\(-1\)"),
    ("scalar", lambda y: torch.diag_embed(y), r"needs \(B, d, 1\): declare noise_type='general'"),
    ("scalar", lambda y: y[:, :1, None], r"needs \(B, d, 1\)"),
    ("scalar", lambda y: y[0, :, None], r"needs \(B, d, 1\)"),
    ("additive", lambda y: ones(3, 2), r"needs \(B, d, m\) or \(d, m\)"),
    ("additive", lambda y: torch.ones_like(y), r"needs \(B, d, m\) or \(d, m\): add the noise axis"),
    ("additive", lambda y: ones(2), r"needs \(B, d, m\) or \(d, m\)"),
    ("additive", lambda y: ones(1, 2, 3), r"needs \(B, d, m\) or \(d, m\)"),
    ("general", lambda y: y, r"needs \(B, d, m\): add the noise axis"),
    ("general", lambda y: ones(2, 3), r"needs \(B, d, m\)"),
    ("general", lambda y: y[:, None, :], r"needs \(B, d, m\)"),
    ("general", lambda y: y[:1, :, None], r"needs \(B, d, m\)"),
    ("general", lambda y: y[:, :, None, None], r"needs \(B, d, m\)"),
]


@pytest.mark.parametrize(("noise_type", "g", "message"), DIFFUSION_SHAPES)
def test_a_diffusion_whose_shape_contradicts_its_noise_type(noise_type, g, message):
    changes = {"noise_type": noise_type, "diffusion": lambda t, y, p: p["sigma"] * g(y)}
    refuses(lambda: solve(y0=ones(4, 2), **changes), ShapeError, r"`diffusion\(t, y, p\)` returned shape .*" + message)
    refuses(lambda: run(**changes), ShapeError, r"`diffusion\(t, y, p\)` returned shape .*" + message)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_a_diagonal_diffusion_declared_additive_is_refused_for_every_batch(batch):
    # (B, d) with B = d would pass for (d, m) with m = d, and every path would see the same matrix
    changes = {"noise_type": "additive", "diffusion": lambda t, y, p: p["sigma"] * torch.ones_like(y)}
    for d in (1, 2, 4):
        refuses(lambda d=d: solve(y0=ones(batch, d), **changes), ShapeError, "add the noise axis")
        refuses(lambda d=d: run(y0=ones(d), **changes), ShapeError, "add the noise axis")


@pytest.mark.parametrize("noise_type", ["scalar", "additive", "general"])
def test_matrix_noise_needs_vector_states(noise_type):
    changes = {"noise_type": noise_type, "diffusion": lambda t, y, p: y[..., None]}
    refuses(
        lambda: solve(y0=ones(3, 2, 2), **changes),
        ShapeError,
        r"needs states of shape \(d,\); diagonal noise takes any",
    )


@pytest.mark.parametrize("entry", [solve, run])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"noise_dim": 3}, ShapeError, r"`noise_dim` is 3, but `diffusion.* has 2 components: leave it out"),
        ({"diffusion": lambda t, y, p: 0.2}, ShapeError, r"`diffusion\(t, y, p\)` must return a tensor, got float"),
        ({"diffusion": lambda t, y, p: (p["sigma"] * y).float()}, DtypeError, "`diffusion.*returned torch.float32"),
        ({"diffusion": lambda t, y, p: p["sigma"] * y.mean(0) * ones(len(y), 1)}, NotAFunctionError, "`diffusion.*mixes paths"),
        ({"diffusion": lambda t, y, p: p["sigma"] * torch.rand_like(y)}, NotAFunctionError, "`diffusion.*two different"),
        ({"diffusion": lambda t, y, p: p["sigma"] * y.flip(1)}, NoiseStructureError, "noise_type='diagonal'.*diag_embed"),
        (
            {"diffusion": lambda t, y, p: p["sigma"] * torch.stack((y[:, 0], y[:, 1] * (1 + 1e-3 * y[:, 0])), 1)},
            NoiseStructureError,
            r"component 0 enters the entry of another.*torch.diag_embed\(g\).*noise_type='general'",
        ),
        (
            {"diffusion": lambda t, y, p: p["sigma"] * y[:, :, None], "noise_type": "additive"},
            NoiseStructureError,
            "noise_type='additive'.*does not depend on y, but it does: declare 'general'",
        ),
        (
            {"diffusion": lambda t, y, p: (p["sigma"] * (1 + 1e-6 * y.sin()))[:, :, None], "noise_type": "additive"},
            NoiseStructureError,
            "declare 'general'",
        ),
        ({"params": {**PARAMS, "mu": torch.tensor(NAN, dtype=F64)}}, NonFiniteError, "parameter `mu` holds NaN.*be finite"),
        (
            {"params": {**PARAMS, "sigma": torch.tensor([0.1, math.inf], dtype=F64)}},
            NonFiniteError,
            r"parameter `sigma` holds NaN or infinite values: \[0.1, inf\]",
        ),
        ({"params": {k: ones(2, dtype=torch.float32) for k in PARAMS}, "y0": None}, None, ""),  # promoted to the state's
        ({"sde_type": "stratonovich"}, CalculusError, r"sde_type='stratonovich'.*to_ito\(sde\)"),
    ],
)  # fmt: skip
def test_equations_that_contradict_themselves(entry, changes, error, message):
    if error is None:
        entry(**changes)
    else:
        refuses(lambda: entry(**changes), error, message)


def test_a_float64_parameter_does_not_widen_a_float32_state():
    params = {k: v.expand(2) for k, v in PARAMS.items()}
    message = "`drift.*returned torch.float64, but the state is torch.float32: give `y0` and the parameters one dtype"
    refuses(lambda: solve(y0=ones(3, 2, dtype=torch.float32), params=params), DtypeError, message)
    refuses(lambda: run(y0=ones(2, dtype=torch.float32), params=params), DtypeError, message)


@pytest.mark.parametrize(
    ("noise_type", "diffusion"),
    [
        ("diagonal", lambda t, y, p: p["sigma"] * torch.sqrt(y.clamp(min=0))),
        ("diagonal", lambda t, y, p: p["sigma"] * torch.ones_like(y)),
        ("scalar", lambda t, y, p: p["sigma"] * y.flip(1)[..., None]),
        ("additive", lambda t, y, p: p["sigma"] * torch.ones_like(y)[..., None] * t),
        ("additive", lambda t, y, p: p["sigma"] * torch.ones(2, 3, dtype=y.dtype)),
        ("general", lambda t, y, p: p["sigma"] * torch.diag_embed(y.flip(1))),
    ],
)
def test_equations_that_tell_the_truth_pass(noise_type, diffusion):
    solve(noise_type=noise_type, diffusion=diffusion)


def test_a_structure_that_cannot_be_seen_is_left_to_the_run():
    error = refuses(
        lambda: solve(diffusion=lambda t, y, p: torch.log(y - 1)), NonFiniteError, "3 of 3 paths.*in step 1 of 8"
    )
    assert (error.n_bad, error.step) == (3, 1)


# functionals


PER_PATH = r"one number a path, shape \(4,\) for ys of shape \(2, 4, 2\)"


@pytest.mark.parametrize("method", ["pathwise", "forward"])
@pytest.mark.parametrize(
    ("functional", "error", "message"),
    [
        (lambda ys, p: ys[-1, :, :1], ShapeError, r"`functional\(ys, p\)` returned shape \(4, 1\).*" + PER_PATH),
        (lambda ys, p: ys[-1], ShapeError, r"`functional.*returned shape \(4, 2\).*a terminal value is ys\[-1, :, 0\]"),
        (lambda ys, p: ys[-1].sum(), ShapeError, r"`functional.*returned shape \(\).*without a mean over paths"),
        (lambda ys, p: ys[:, 0, 0], ShapeError, r"`functional.*returned shape \(2,\)"),
        (lambda ys, p: None, ShapeError, r"`functional.*must return a tensor.*got NoneType"),
        (lambda ys, p: 1.0, ShapeError, r"`functional.*must return a tensor.*got float"),
        (lambda ys, p: [1.0] * 4, ShapeError, r"`functional.*must return a tensor.*got list"),
        (lambda ys, p: ys[-1, :, 0] > 1, DetachedError, r"`functional.*returned torch.bool: a comparison.*Return floating"),
        (lambda ys, p: ys[-1, :, 0].long(), DetachedError, r"`functional.*returned torch.int64"),
        (lambda ys, p: ys[-1, :, 0] + 0j, DetachedError, r"`functional.*returned torch.complex128"),
        (lambda ys, p: ys[-1, :, 0].detach(), DetachedError, r"`functional.*cut off from the path.*detach\(\)"),
        (lambda ys, p: (ys[-1, :, 0] > 1).double(), DetachedError, r"`functional.*cut off.*a comparison"),
        (lambda ys, p: ys[-1, :, 0] - ys[-1, :, 0].mean(), NotAFunctionError, r"`functional.*mixes paths or is random.*dim 1"),
        (lambda ys, p: ys[-1, :, 0].sort().values, NotAFunctionError, "`functional.*mixes paths"),
        (lambda ys, p: ys[-1, :, 0] * torch.rand(ys.shape[1]), NotAFunctionError, "`functional.*is random"),
        (lambda ys, p: ys[-1, :, 0].squeeze() if ys.shape[1] > 1 else ys[-1, 0, 0], ShapeError, "`functional.*one path"),
    ],
)  # fmt: skip
def test_functionals_that_make_no_sense(method, functional, error, message):
    refuses(lambda: run(functional, method=method), error, message)


def test_a_squeezed_functional_is_refused_before_it_meets_a_tile_of_one_path():
    refuses(lambda: run(lambda ys, p: ys[-1].squeeze(), y0=ones(1)), ShapeError, "`functional.*one path.*squeeze")


@pytest.mark.filterwarnings("ignore::sdesens.HighVarianceWarning")  # a logarithm near 0 is steep
@pytest.mark.parametrize("method", ["pathwise", "forward", "finite_difference"])
def test_a_functional_outside_its_domain(method):
    refused = refuses(
        lambda: run(lambda ys, p: torch.log(ys[-1, :, 0] - 1), method=method, n_paths=60),
        NonFiniteError,
        r"`functional\(ys, p\)` is NaN or infinite on \d+ of \d+ paths, though the paths are finite.*Check its domain",
    )
    ys = sdeint(gbm(), ones(60, 2), (0.0, 1.0), n_steps=8, seed=0)
    bad = (ys[-1, :, 0] <= 1).nonzero().flatten().tolist()
    assert refused.paths == tuple(bad[:8])
    assert (refused.n_bad, refused.step, refused.time) == (len(bad), None, None)


def test_an_indicator_is_warned_about():
    with pytest.warns(ZeroGradientWarning, match="'mu', 'sigma' is exactly zero on every path.*'auto'"):
        run(lambda ys, p: (ys[-1, :, 0] > 1).double() + 0 * ys[-1, :, 0], audit=False)


# sensitivity


def unused(**changes):
    return run(params={**PARAMS, "idle": torch.tensor(1.0, dtype=F64)}, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"wrt": "nu"}, UnknownParameterError, "`wrt` names 'nu', which is none of 'mu', 'sigma', 'y0', 't1'"),
        ({"wrt": ("mu", "Sigma")}, UnknownParameterError, "`wrt` names 'Sigma'"),
        ({"wrt": [1]}, UnknownParameterError, "`wrt` names 1"),
        ({"wrt": ("mu", "mu")}, ArgumentError, "`wrt` names 'mu' twice: name each once"),
        ({"wrt": ("t1", "y0", "t1")}, ArgumentError, "`wrt` names 't1' twice"),
        ({"wrt": 5}, ArgumentTypeError, "`wrt` must be a name or a tuple of names, got 5"),
        ({"wrt": {"mu"}}, ArgumentTypeError, "`wrt` must be a name or a tuple of names, got {'mu'}"),  # no order
        ({"wrt": ()}, ArgumentError, "nothing to differentiate in: name parameters in `wrt`"),
        ({"wrt": "y0", "y0": lambda p: ones(2)}, UnknownParameterError, "'y0', but `y0` is computed.*give a tensor"),
        ({"wrt": "t1", "method": "torchsde_adjoint"}, ArgumentError, "'t1', which torchsde does not.*leave out method"),
        ({"method": "reverse"}, ArgumentError, "`method` must be one of 'pathwise', .*got 'reverse'"),
        ({"method": None}, ArgumentError, "`method` must be one of"),
        ({"n_paths": 1}, ArgumentError, "`n_paths` must be at least 2, got 1"),
        ({"n_paths": 0}, ArgumentError, "`n_paths` must be at least 2, got 0"),
        ({"n_paths": 1e3}, ArgumentTypeError, "`n_paths` must be an int, got 1000.0"),
        ({"n_paths": True}, ArgumentTypeError, "`n_paths` must be an int, got True"),
        ({"n_paths": "9"}, ArgumentTypeError, "`n_paths` must be an int"),
        ({"first_path": -1}, ArgumentError, "`first_path` must be at least 0, got -1"),
        ({"first_path": 0.0}, ArgumentTypeError, "`first_path` must be an int"),
        ({"first_path": 2**63 - 50}, ArgumentError, "lie outside"),
        ({"tile_paths": 0}, ArgumentError, "`tile_paths` must be at least 1, got 0"),
        ({"tile_paths": 2.5}, ArgumentTypeError, "`tile_paths` must be an int"),
        ({"seed": 1, "noise": Philox(1)}, ArgumentError, "give `seed` or `noise`, not both"),
        ({"seed": 1.5}, ArgumentTypeError, "`seed` must be an int, got 1.5"),
        ({"seed": 2**65}, ArgumentError, "`seed` must lie in"),
        ({"noise": 3}, ArgumentTypeError, r"`noise` must be a noise source such as Philox\(seed\), got int"),
        ({"noise": ones(8, 100, 2)}, ArgumentTypeError, "`noise` must be a noise source"),
        ({"noise": Philox}, ArgumentTypeError, r"`noise` must be a noise source such as Philox\(seed\)"),
        ({"noise": Antithetic(Philox(0)), "n_paths": 101}, ArgumentError, "come in pairs: `n_paths` = 101.*must be even"),
        ({"noise": Antithetic(Philox(0)), "first_path": 1}, ArgumentError, "come in pairs.*`first_path` must be even"),
        ({"noise": GivenNoise(ones(8, 10, 2))}, ArgumentError, "holds 10 paths x 8 steps.*n_paths <= 10"),
        ({"noise": GivenNoise(ones(16, 100, 2))}, ArgumentError, "holds 16 steps.*n_steps = 8"),
        ({"noise": GivenNoise(ones(4, 100, 2))}, ArgumentError, "holds 4 steps.*n_steps = 8"),
        ({"noise": GivenNoise(ones(8, 100, 1))}, ShapeError, r"has 1 components.*give z of shape \(N, B, 2\)"),
        ({"noise": GivenNoise(ones(8, 100, 2)), "bias": True}, ArgumentError, "needs noise for any grid"),
    ],
)  # fmt: skip
def test_runs_that_make_no_sense(changes, error, message):
    refuses(lambda: run(**changes), error, message)


def test_a_run_needs_a_problem():
    refuses(lambda: sensitivity(gbm(), n_paths=10), ArgumentTypeError, "`problem` must be a Problem, got SDE")


@pytest.mark.parametrize("method", [m for m in METHODS if m != "conditional"])  # which the functional does not declare
def test_a_parameter_that_the_result_cannot_depend_on(method):
    message = "the result cannot depend on 'idle'.*Remove it from `wrt`"
    refuses(lambda: unused(method=method), UnusedParameterError, message)
    assert set(unused(method=method, wrt=("mu", "sigma")).gradient) == {"mu", "sigma"}


@pytest.mark.parametrize(
    "drift",
    [lambda t, y, p: p["idle"].detach() * y, lambda t, y, p: p["idle"].item() * y, lambda t, y, p: PARAMS["mu"] * y],
)
def test_a_parameter_that_is_cut_off(drift):
    refuses(
        lambda: unused(drift=drift, wrt="idle"),
        (UnusedParameterError, DetachedError),
        "cannot depend on 'idle'|cut off",
    )


def test_a_parameter_of_one_stretch_of_time_is_not_called_unused():
    params = {**PARAMS, **{f"mu{i}": torch.tensor(0.1 * i, dtype=F64) for i in range(4)}}
    result = run(
        params=params, drift=lambda t, y, p: p[f"mu{int(4 * t)}"] * y, wrt=[f"mu{i}" for i in range(4)], n_steps=16
    )
    assert all(float(g.mean) > 0.1 for g in result.gradient.values())


def test_nothing_to_differentiate_in():
    sde = SDE(lambda t, y, p: y, lambda t, y, p: y)
    question = Problem(sde, lambda ys, p: ys[-1, :, 0], ones(1), (0.0, 1.0), 4)
    refuses(
        lambda: sensitivity(question, n_paths=10),
        ArgumentError,
        "nothing to differentiate in: name parameters in `wrt`",
    )
    assert set(sensitivity(question, n_paths=10, wrt=("y0", "t1")).gradient) == {"y0", "t1"}


def explosive(method, x0):
    sde = SDE(lambda t, y, p: p["k"] * y**2, lambda t, y, p: 0.01 * torch.ones_like(y), {"k": ones()})
    question = Problem(sde, lambda ys, p: ys[-1, :, 0], x0 * ones(1), (1.0, 3.0), 20)
    return lambda: sensitivity(question, n_paths=40, method=method, first_path=100)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "conditional"])
def test_a_run_that_blows_up_names_path_step_and_time(method):
    # x' = x^2 from 50 with h = 0.1: 50, 300, 9300, ... squares past 1e308 within 10 steps, noise or no noise
    step = next(n for n in range(1, 21) if not math.isfinite(_deterministic(n)))
    error = refuses(explosive(method, 50.0), NonFiniteError, "40 of 40 paths became NaN or infinite.*raise `n_steps`")
    assert (error.n_bad, error.paths, error.step) == (40, tuple(range(100, 108)), step)
    assert error.time == pytest.approx(1.0 + 0.1 * step)


def _deterministic(n, x=50.0):
    for _ in range(n):
        x = x + 0.1 * x * x if x < 1e200 else math.inf
    return x


def test_tensors_that_require_grad_are_taken_as_values():
    plain = run(wrt=("mu", "y0"))
    live = run(
        y0=ones(2).requires_grad_(),
        params={k: v.clone().requires_grad_() for k, v in PARAMS.items()},
        wrt=("mu", "y0"),
    )
    for name in ("mu", "y0"):
        assert torch.equal(plain.gradient[name].mean, live.gradient[name].mean)
        assert not live.gradient[name].mean.requires_grad


@pytest.mark.parametrize(
    "call",
    [
        lambda: sdeint(gbm(), ones(3, 2), (0.0, 1.0), n_steps=8, sead=3),
        lambda: sensitivity(problem(), n_paths=4, n_path=4),
    ],
)
def test_unknown_keywords_are_type_errors(call):
    with pytest.raises(TypeError, match=r"'sead'|`n_path`; did you mean `n_paths`"):
        call()


def test_errors_are_also_of_the_builtin_kind():
    # code that expects a ValueError, TypeError or ArithmeticError keeps working
    for error, builtin in (
        (ShapeError, ValueError),
        (GridError, ValueError),
        (DtypeError, TypeError),
        (ArgumentTypeError, TypeError),
        (NonFiniteError, ArithmeticError),
    ):
        assert issubclass(error, builtin)
    with pytest.raises(ArgumentError, match="level"):
        Estimate.from_samples(ones(3)).confidence_interval(95)
