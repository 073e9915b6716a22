"""What the estimators refuse, and in which words: every message names the argument and the remedy."""

import math
import warnings

import pytest
import torch
import torch.distributions as td
from problems import F64, scalar

from sdesens import SDE, Antithetic, GivenNoise, Philox, Problem
from sdesens.errors import (
    ArgumentError,
    ArgumentTypeError,
    DetachedError,
    DtypeError,
    JumpError,
    MethodError,
    NonFiniteError,
    NotAFunctionError,
    ShapeError,
    UnknownParameterError,
    UnusedParameterError,
)
from sdesens.estimators import (
    Bernoulli,
    Categorical,
    LogNormal,
    MultivariateNormal,
    Normal,
    Reparameterised,
    Sampler,
    compare,
    decompose,
    expectation_gradient,
    sample_tangents,
    surrogate,
    variance_study,
)
from sdesens.estimators.exact import normal_variances
from sdesens.jumps import jumps

P = {"mean": scalar(1.0), "scale": scalar(1.0)}
COIN = {"logits": scalar(0.2)}
CHOICE = {"logits": torch.zeros(3, dtype=F64)}
EYE = torch.eye(2, dtype=F64)


def square(z, p):
    return z.reshape(len(z), -1).square().sum(1)


def ask(model=Normal, f=square, params=None, **options):
    return lambda: expectation_gradient(model, f, P if params is None else params, **{"n_samples": 100, **options})


def values(n):
    return torch.linspace(0.1, 0.9, n, dtype=F64)


def straight_through_coin(e, p):
    soft = torch.sigmoid((p["mean"] - e[:, 0]) / 0.5)
    return (e[:, 0] < p["mean"]).to(e.dtype) + soft - soft.detach()


REFUSED = {
    # methods and options
    "no such method": (ask(method="magic"), ArgumentError, "or 'auto' in"),
    "no such option": (ask(method="pathwise", temperature=1.0), ArgumentTypeError, "'temperature' is not an option"),
    "options for auto": (ask(baseline="optimal"), ArgumentTypeError, "takes no options"),
    "temperature 0": (ask(Bernoulli, params=COIN, method="gumbel_softmax", temperature=0.0), ArgumentError, "`temperature`"),
    "temperature nan": (ask(Bernoulli, params=COIN, method="straight_through", temperature=float("nan")), ArgumentError, "`temperature`"),
    "baseline": (ask(method="score_function", baseline="mean"), ArgumentError, "`baseline` must be one of"),
    "baseline inf": (ask(method="score_function", baseline=float("inf")), ArgumentError, "`baseline`"),
    "group 3 of 100": (ask(method="rloo", group=3), ArgumentError, "divides n_samples = 100"),
    "group 1": (ask(method="rloo", group=1), ArgumentError, "`group` must be an int in 2"),
    "group of all": (ask(method="rloo", group=100), ArgumentError, "one group has no standard error"),
    "prime number of draws": (ask(method="rloo", n_samples=101), MethodError, "make it even"),
    "group without leave one out": (ask(method="score_function", group=2), ArgumentError, "leave_one_out"),
    "support too large": (ask(Bernoulli, params={"logits": torch.zeros(20)}, method="enumerate"), MethodError, "1048576 values"),
    "max_states": (ask(Bernoulli, params=COIN, method="enumerate", max_states=1), MethodError, "more than max_states = 1"),
    # methods that a law does not have
    "pathwise of a coin": (ask(Bernoulli, params=COIN, method="pathwise"), MethodError, "a draw has no derivative: write it as z = g"),
    "pathwise of a choice": (ask(Categorical, params=CHOICE, method="pathwise"), MethodError, "'score_function', 'rloo'"),
    "pathwise of poisson": (ask(td.Poisson, params={"rate": scalar(2.0)}, method="pathwise"), MethodError, "a draw has no derivative"),
    "pathwise of a sampler": (
        ask(Sampler(lambda n, p: torch.poisson(p["r"].expand(n)), lambda z, p: z * p["r"].log() - p["r"]), params={"r": scalar(2.0)}, method="pathwise"),
        MethodError, "Unbiased methods that apply: 'score_function', 'rloo'"),
    "measure valued of gamma": (ask(td.Gamma, params={"concentration": scalar(2.0), "rate": scalar(1.0)}, method="measure_valued"), MethodError, "it is written for"),
    "arm of a normal": (ask(method="arm"), MethodError, "Bernoulli"),
    "gumbel of a normal": (ask(method="gumbel_softmax"), MethodError, "Categorical"),
    "enumerate a normal": (ask(method="enumerate"), MethodError, "cannot be enumerated"),
    "no log_prob": (ask(Reparameterised(lambda e, p: p["mean"] + e[:, 0], 1), method="score_function"), MethodError, "no `log_prob`"),
    "sampler without log_prob": (ask(Sampler(lambda n, p: torch.poisson(p["r"].expand(n))), params={"r": scalar(2.0)}), MethodError, "no `log_prob`"),
    "moving support": (ask(td.Uniform, params={"low": scalar(0.0), "high": scalar(1.0)}, method="score_function"), MethodError, "support of Uniform moves"),
    # laws
    "probability above 1": (ask(Bernoulli, params={"probs": scalar(1.2)}), ArgumentError, r"`probs` must lie in \[0, 1\]"),
    "probability below 0": (ask(Categorical, params={"probs": torch.tensor([-0.1, 1.1], dtype=F64)}), ArgumentError, "`probs` must lie"),
    "probabilities that do not sum to 1": (ask(Categorical, params={"probs": torch.tensor([0.5, 0.1], dtype=F64)}), ArgumentError, "`probs` must sum to 1"),
    "one outcome": (ask(Categorical, params={"logits": torch.zeros(1, dtype=F64)}), ShapeError, "K >= 2"),
    "both": (ask(Bernoulli, params={"probs": scalar(0.5), "logits": scalar(0.0)}), ArgumentError, "one of `probs` and `logits`, got both"),
    "neither": (ask(Bernoulli), ArgumentError, "got neither"),
    "scale 0": (ask(params={"mean": scalar(0.0), "scale": scalar(0.0)}), ArgumentError, "`scale` must be positive"),
    "scale missing": (ask(params={"mean": scalar(0.0)}), ArgumentError, "Normal needs 'mean', 'scale'"),
    "shapes of a normal": (ask(params={"mean": torch.zeros(2), "scale": torch.ones(3)}), ShapeError, "do not fit each other"),
    "log normal": (ask(LogNormal, params={"mean": scalar(0.0), "scale": scalar(-1.0)}), ArgumentError, "`scale` must be positive"),
    "factor": (ask(MultivariateNormal, params={"mean": torch.zeros(2, dtype=F64), "scale_tril": -EYE}), ArgumentError, "diagonal"),
    "factor's shape": (ask(MultivariateNormal, params={"mean": torch.zeros(3, dtype=F64), "scale_tril": EYE}), ShapeError, r"\(\.\.\., d, d\)"),
    "torch's own complaint": (ask(td.Gamma, params={"concentration": scalar(-1.0), "rate": scalar(1.0)}), ArgumentError, "Gamma"),
    "without torch's checks": (ask(lambda p: td.Gamma(p["mean"], -p["scale"], validate_args=False)), ArgumentError, "`rate` of Gamma must satisfy GreaterThan"),
    "a model that is no law": (ask(lambda p: p["mean"]), ArgumentTypeError, "`model` must give a law"),
    "a model that is nothing": (ask(3), ArgumentTypeError, "`model` must be"),
    "noise shape": (lambda: Reparameterised(lambda e, p: e, 0), ShapeError, "`noise_shape`"),
    "g": (lambda: Reparameterised(3, 1), ArgumentTypeError, "`g` must be a function"),
    "rows of g": (ask(Reparameterised(lambda e, p: p["mean"], 1)), ShapeError, "a row for each"),
    # f
    "f gives a mean": (ask(f=lambda z, p: z.mean()), ShapeError, "one number a draw"),
    "f keeps components": (ask(params={"mean": torch.zeros(2), "scale": torch.ones(2)}, f=lambda z, p: z), ShapeError, "sum over the components"),
    "f gives a float": (ask(f=lambda z, p: 1.0), ArgumentTypeError, "must return a tensor"),
    "f gives booleans": (ask(f=lambda z, p: z > 0), DtypeError, "torch.bool"),
    "f takes one argument": (ask(f=lambda z: z), ArgumentTypeError, r"`f` must be a function of \(z, p\)"),
    "f is missing": (ask(f=None), ArgumentTypeError, "`f` must be a function"),
    "f mixes draws": (ask(f=lambda z, p: z - z.mean()), NotAFunctionError, "mixes draws"),
    "f is random": (ask(f=lambda z, p: z + torch.rand_like(z)), NotAFunctionError, "two different results"),
    "a model that draws": (ask(Reparameterised(lambda e, p: p["mean"] + torch.randn(len(e), dtype=F64), 1)), NotAFunctionError, "may not draw random"),
    "f is NaN": (ask(f=lambda z, p: torch.log(z), method="score_function"), NonFiniteError, "`f` is NaN or infinite"),
    "f is cut off": (ask(f=lambda z, p: (z > 0).to(z.dtype), method="pathwise"), DetachedError, "cut off from z"),
    "f is detached": (ask(f=lambda z, p: z.detach() ** 2 + p["mean"], method="pathwise"), DetachedError, "cut off from z"),
    "f is cut off in part": (ask(f=lambda z, p: z * z.detach(), method="pathwise"), DetachedError, "a part of it is detached"),
    "a parameter of f is detached in part": (ask(f=lambda z, p: p["mean"] * p["mean"].detach() * z, method="score_function"), DetachedError, "`f` depends on 'mean'"),
    "a parameter of the law is detached in part": (ask(lambda p: Normal(p["mean"] * p["mean"].item(), p["scale"]), method="pathwise"), DetachedError, "the law depends on 'mean'"),
    "the same by its density": (ask(lambda p: Normal(p["mean"] * p["mean"].item(), p["scale"]), method="score_function"), DetachedError, "the law depends on 'mean'"),
    "f jumps in small steps": (ask(f=lambda z, p: z * torch.floor(1000 * z) / 1000, method="pathwise"), JumpError, "along z"),
    "f jumps": (ask(f=lambda z, p: torch.round(z) * z, method="pathwise"), JumpError, "'score_function', 'rloo', 'measure_valued'"),
    "f jumps in a parameter": (ask(f=lambda z, p: torch.sign(z - p["a"]) * p["a"], params={**P, "a": scalar(0.5)}, method="score_function"), JumpError, "parameters themselves"),
    # parameters
    "unused": (ask(params={**P, "a": scalar(0.0)}), UnusedParameterError, "cannot depend on 'a'"),
    "unknown": (ask(wrt="b"), UnknownParameterError, "'b'"),
    "twice": (ask(wrt=("mean", "mean")), ArgumentError, "each once"),
    "none": (ask(params={}), ArgumentTypeError, "`params`"),
    "a number": (ask(params={"mean": 1.0, "scale": scalar(1.0)}), ArgumentTypeError, "must be a tensor"),
    "integers": (ask(params={"mean": torch.tensor(1), "scale": torch.tensor(1)}), DtypeError, "floating"),
    "two dtypes": (ask(params={"mean": torch.tensor(1.0), "scale": scalar(1.0)}), DtypeError, "share one dtype"),
    "not finite": (ask(params={"mean": scalar(float("nan")), "scale": scalar(1.0)}), NonFiniteError, "`mean`"),
    # draws and noise
    "one draw": (ask(n_samples=1), ArgumentError, "at least 2"),
    "half a draw": (ask(n_samples=1.5), ArgumentTypeError, "must be an int"),
    "seed and noise": (ask(seed=1, noise=Philox(1)), ArgumentError, "not both"),
    "noise that is none": (ask(noise=3), ArgumentTypeError, "noise source"),
    "weights": (ask(noise=GivenNoise(torch.zeros(1, 100, 1, dtype=F64), torch.full((100,), 0.01, dtype=F64))), ArgumentError, "path weights"),
    "too little noise": (ask(noise=GivenNoise(torch.zeros(1, 50, 1, dtype=F64)), method="pathwise", check=False), ArgumentError, "50 paths"),
    "noise for torch's sampler": (
        ask(td.Gamma, params={"concentration": scalar(2.0), "rate": scalar(1.0)}, method="pathwise", noise=GivenNoise(torch.zeros(1, 100, 1, dtype=F64))),
        ArgumentError, "give `seed`"),
    "constant from given noise": (ask(noise=GivenNoise(torch.randn(1, 100, 1, dtype=F64)), method="score_function", baseline="optimal"), ArgumentError, "other noise"),
    # items
    "g that mixes rows": (ask(Reparameterised(lambda e, p: p["mean"] + p["scale"] * (e[:, 0] - e[:, 0].mean()), 1)), NotAFunctionError, "mixes rows of its noise"),
    "density without its constant": (ask(Sampler(lambda n, p: torch.poisson(p["r"].expand(n)), lambda z, p: z * p["r"].log()), params={"r": scalar(2.0)}, method="score_function"), MethodError, "no log density"),
    "density of another law": (ask(Reparameterised(lambda e, p: p["mean"] + e[:, 0], 1, lambda z, p: -((z - p["mean"]) ** 2)), params={"mean": scalar(1.0)}, method="score_function"), MethodError, "does not belong"),
    "draws that torch clamps": (ask(td.Beta, params={"concentration0": scalar(0.01), "concentration1": scalar(0.01)}, f=lambda z, p: z, method="rloo"), MethodError, "torch clamps draws"),
    "a sampler with its own seed": (ask(Sampler(lambda n, p: p["mean"] + torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=F64), lambda z, p: 0 * z * p["mean"]), params={"mean": scalar(0.0)}), NotAFunctionError, "torch's generator"),
    "score at a probability of 0": (ask(Categorical, params={"probs": torch.tensor([0.0, 0.5, 0.5], dtype=F64)}, method="rloo"), MethodError, "never drawn"),
    "arm at a probability of 1": (ask(Bernoulli, params={"probs": scalar(1.0)}, method="arm"), MethodError, "never drawn"),
    "a support that moves inside a transform": (
        ask(lambda p: td.TransformedDistribution(td.Exponential(torch.ones((), dtype=F64)), [td.AffineTransform(p["mean"], 1.0)]), params={"mean": scalar(1.0)}, f=lambda z, p: torch.sin(z), method="score_function"),
        MethodError, "a support that does not"),
    "a density without its scale": (ask(Reparameterised(lambda e, p: p["mean"] + p["scale"] * e[:, 0], 1, lambda z, p: -0.5 * ((z - p["mean"]) / p["scale"]) ** 2), method="rloo"), MethodError, "normalising constant"),
    "leave one out of pairs": (ask(method="rloo", noise=Antithetic(Philox(1))), ArgumentError, "antithetic"),
    "leave one out of pairs, in a loop": (lambda: surrogate(Normal, square, P, n_samples=8, method="rloo", noise=Antithetic(Philox(1))), ArgumentError, "antithetic"),
    "a threshold at 0": (ask(f=lambda z, p: torch.where(z > p["a"], 1 + p["a"], 0 * z), params={**P, "a": scalar(0.0)}, wrt="a", method="score_function"), JumpError, "parameters themselves"),
    "jumps where the items are": (
        ask(lambda x, p: Normal(p["mean"] + 100 * x[:, 0], p["scale"].expand(len(x))), f=lambda z, x, p: ((z - 100 * x[:, 0]) > 0).to(z.dtype) + z, x=torch.linspace(0, 1000, 11, dtype=F64)[:, None], method="pathwise"),
        JumpError, "along z"),
    "a jump in the small component": (
        ask(params={"mean": torch.zeros(2, dtype=F64), "scale": torch.tensor([1.0, 1e4], dtype=F64)}, f=lambda z, p: (z[:, 0] > 0).to(z.dtype) + 1e-4 * z[:, 1] + z[:, 0], method="pathwise"),
        JumpError, "along z"),
    "a jump under heavy tails": (ask(lambda p: td.StudentT(torch.ones((), dtype=F64), p["mean"], 1.0), params={"mean": scalar(0.0)}, f=lambda z, p: (z > 0.1).to(z.dtype) + torch.sin(z), method="pathwise"), JumpError, "along z"),
    "a coin as a function of noise": (ask(Reparameterised(lambda e, p: (e[:, 0] < p["mean"]).to(e.dtype) + 0 * p["mean"], 1), params={"mean": scalar(0.3)}, f=lambda z, p: z + p["mean"], method="pathwise"), (JumpError, DetachedError), "jumps|detached|cut off"),
    "a straight-through coin": (ask(Reparameterised(straight_through_coin, 1), params={"mean": scalar(0.6)}, f=lambda z, p: z**3, method="pathwise"), (JumpError, DetachedError), "jumps|detached|cut off"),
    "a jump on a large offset in float32": (ask(params={"mean": torch.tensor(0.0), "scale": torch.tensor(1.0)}, f=lambda z, p: 1e4 + (z > 0).to(z.dtype) + z, method="pathwise"), JumpError, "along z"),
    "f writes into z": (ask(f=lambda z, p: z.abs_(), method="score_function"), NotAFunctionError, "writes into z"),
    "a model that draws once": (ask(lambda p: Normal(p["mean"] + torch.randn((), dtype=F64), p["scale"])), NotAFunctionError, "two different results"),
    "bfloat16": (ask(Bernoulli, params={"logits": torch.zeros(2, dtype=torch.bfloat16)}), DtypeError, "float32 or float64"),
    "nothing applies": (ask(Reparameterised(lambda e, p: p["mean"] + e[:, 0], 1), params={"mean": scalar(0.1)}, f=lambda z, p: torch.where(z > 0, z + 1, z)), MethodError, "no unbiased method can answer"),
    "items with a class": (ask(x=torch.zeros(3, 1, dtype=F64), f=lambda z, x, p: z), ArgumentTypeError, r"\(x, p\) -> law"),
    "a law that ignores the items": (
        ask(lambda x, p: Normal(p["mean"], p["scale"]), f=lambda z, x, p: z, x=torch.zeros(3, 1, dtype=F64)), ShapeError, "first axis runs over the 3 items"),
    "no items": (ask(lambda x, p: Normal(x[:, 0], p["scale"]), f=lambda z, x, p: z, x=torch.zeros(0, 1, dtype=F64)), ShapeError, "`x` must be"),
    "f without items": (ask(lambda x, p: Normal(x[:, 0], p["scale"]), x=torch.zeros(3, 1, dtype=F64)), ArgumentTypeError, r"\(z, x, p\)"),
    # the other functions
    "tangents of a coin": (lambda: sample_tangents(Bernoulli, COIN, n_samples=3), MethodError, "a draw has no derivative"),
    "tangents of gamma": (lambda: sample_tangents(td.Gamma, {"concentration": scalar(2.0), "rate": scalar(1.0)}, n_samples=3), MethodError, "rsample"),
    "surrogate without draws": (lambda: surrogate(Normal, square, P, n_samples=0, seed=1), ArgumentError, "`n_samples`"),
    "surrogate with a pilot": (lambda: surrogate(Normal, square, P, n_samples=4, method="score_function", baseline="optimal", seed=1), MethodError, "pilot"),
    "surrogate without a seed": (lambda: surrogate(Normal, square, P), ArgumentError, "give `seed`"),
    "surrogate by auto": (lambda: surrogate(Normal, square, P, method="auto", seed=1), ArgumentError, "in expectation_gradient"),
    "no methods": (lambda: compare(Normal, square, P, methods=()), ArgumentError, "`methods` is empty"),
    "exact for some": (lambda: compare(Normal, square, P, n_samples=100, exact={"mean": 2.0}), ArgumentError, "no 'scale'"),
    "exact of another shape": (lambda: compare(Normal, square, P, n_samples=100, exact={"mean": torch.zeros(2), "scale": 2.0}), ArgumentError, "the shape"),
    "integral of a coin": (lambda: decompose(Bernoulli, square, COIN), ArgumentError, "discrete"),
    "integral in three dimensions": (lambda: decompose(Normal, square, {"mean": torch.zeros(3), "scale": torch.ones(3)}), ArgumentError, "one or two numbers"),
    "integral without a density": (lambda: decompose(Reparameterised(lambda e, p: p["mean"] + e[:, 0], 1), square, P), ArgumentError, "no density"),
    "integral of a poisson": (lambda: decompose(td.Poisson, square, {"rate": scalar(2.0)}), ArgumentError, "discrete"),
    "integral of a density that is none": (lambda: decompose(Reparameterised(lambda e, p: (p["mean"] * e[:, 0]).abs(), 1, lambda z, p: -0.5 * (z / p["mean"]) ** 2 - p["mean"].log() + 0.5 * math.log(2 / math.pi)), square, {"mean": scalar(1.0)}), ArgumentError, "integrates to 2"),
    "integral of a spike": (lambda: decompose(Normal, lambda z, p: 1e3 * torch.exp(-0.5 * ((z - 1.2345) / 1e-3) ** 2), P), ArgumentError, "contradict"),
    "integral of two far peaks": (
        lambda: decompose(lambda p: td.MixtureSameFamily(td.Categorical(torch.tensor([0.5, 0.5], dtype=F64)), td.Normal(p["mean"] + torch.tensor([-1000.0, 1000.0], dtype=F64), torch.ones(2, dtype=F64))), square, {"mean": scalar(0.5)}),
        ArgumentError, "integrates to"),
    "variances of what oscillates too fast": (lambda: normal_variances(lambda z: torch.cos(3000 * z), 1.0, 1.0), ArgumentError, "too rough"),
    "integral of a jump in a parameter": (lambda: decompose(Normal, lambda z, p: torch.where(z > p["mean"], z + 1, z), P), JumpError, "parameters themselves"),
    "study of odd draws": (lambda: variance_study(n_samples=2001), ArgumentError, "even"),
    "study of another cost": (lambda: variance_study(costs=("tan",)), ArgumentError, "'tan'"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_with_a_reason(case):
    call, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        call()


def chain(noise_type="diagonal", diffusion=lambda t, y, p: p["s"] * torch.ones_like(y)):
    sde = SDE(lambda t, y, p: -p["k"] * y, diffusion, {"k": scalar(0.5), "s": scalar(0.3)}, noise_type=noise_type)
    return Problem(sde, lambda ys, p: ys[-1].sum(1), torch.ones(2, dtype=F64), (0.0, 1.0), 4)


def test_a_problem_has_its_own_functional():
    with pytest.raises(ArgumentError, match="has its own functional"):
        expectation_gradient(chain(), square, P, n_samples=100)


@pytest.mark.parametrize(
    ("noise_type", "diffusion"),
    [
        ("scalar", lambda t, y, p: p["s"] * torch.ones_like(y)[..., None]),
        ("diagonal", lambda t, y, p: p["s"] * torch.tensor([1.0, 0.0], dtype=F64) * torch.ones_like(y)),
    ],
)
def test_a_chain_with_a_noiseless_direction_has_no_density(noise_type, diffusion):
    problem = chain(noise_type, diffusion)
    with pytest.raises(MethodError, match="no noise of its own"):
        expectation_gradient(problem, n_samples=100, method="score_function")
    assert expectation_gradient(problem, n_samples=100, wrt="k").method == "pathwise"


def test_a_silent_zero_is_warned_about_where_nothing_else_notices():
    """A jump too small in probability to be seen on the probe: z > 6 under N(0, 1)."""
    from sdesens.errors import ZeroGradientWarning

    with pytest.warns(ZeroGradientWarning, match="exactly zero"):
        expectation_gradient(
            Normal, lambda z, p: (z > 6).to(z.dtype) * (0 * z + 1), P, n_samples=100, method="pathwise"
        )


def test_what_is_not_refused_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model, params in ((Normal, P), (Bernoulli, COIN), (Categorical, CHOICE)):
            for method in ("auto", "score_function"):
                expectation_gradient(model, square if model is Normal else lambda z, p: square(z, p) + z.reshape(len(z), -1)[:, 0], params, n_samples=64, method=method)  # fmt: skip
        expectation_gradient(Bernoulli, lambda z, p: z, {"probs": scalar(1.0)}, n_samples=64, method="enumerate")


# The audit behind it: (function of z, whether it jumps), z ~ N(0, 1) shifted

JUMPS = {
    "indicator": (lambda z: (z > 0.3).double(), True),
    "round": (torch.round, True),
    "floor": (lambda z: torch.floor(3 * z), True),
    "sign": (torch.sign, True),
    "sign in a smooth function": (lambda z: torch.sin(z) + 0.05 * torch.sign(z), True),
    "jump times a factor that vanishes elsewhere": (lambda z: z * (z > 1).double(), True),
    "integer cast": (lambda z: z.long().double(), True),
    "argmax": (lambda z: (torch.stack((z, z**2), 1).argmax(1)).double(), True),
    "where": (lambda z: torch.where(z > 0, z + 1, z), True),
    "fine rounding": (lambda z: torch.round(100 * z), True),
    "finer rounding than any step that is always tried": (lambda z: z + torch.round(1e4 * z) / 1e4, True),
    "relu": (torch.relu, False),
    "absolute value": (torch.abs, False),
    "square": (torch.square, False),
    "linear": (lambda z: 3 * z, False),
    "constant": (torch.zeros_like, False),
    "where without a jump": (lambda z: torch.where(z > 0, z, 0.5 * z), False),
    "jump that is multiplied away": (lambda z: z * torch.sign(z), False),
    "steep sigmoid": (lambda z: torch.sigmoid(50 * z), False),
    "steep cosine": (lambda z: torch.cos(100 * z), False),
    "steeper cosine": (lambda z: torch.cos(1e4 * z), False),
    "a detour through float32": (lambda z: torch.sin(z.float()).double(), False),
    "steep exponential": (lambda z: torch.exp(5 * z), False),
    "huge numbers": (lambda z: 1e12 + z, False),
    "tiny numbers": (lambda z: 1e-12 * z**3, False),
    "NaN": (lambda z: torch.sqrt(z - 10), False),
}


@pytest.mark.parametrize("name", list(JUMPS))
def test_jumps_are_told_from_kinks_and_steep_slopes(name):
    """On 20 samples of 8,192: none may be misjudged."""
    f, truth = JUMPS[name]
    for seed in range(20):
        z = Philox(seed).normals(0, 8192, 0, 1, 1, dtype=F64, device=torch.device("cpu")).flatten()
        assert jumps(lambda e, z=z: f(z + e)) is truth
