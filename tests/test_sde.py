"""The equation: shapes of noise, torchsde-style objects, Ito and Stratonovich, running integrals, correlation."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from sdesens import SDE, Philox, as_sde, correlated_noise, sdeint, to_ito, to_stratonovich, with_running_integral
from sdesens.errors import ArgumentError, ArgumentTypeError, CalculusError, ShapeError
from sdesens.rewrite import ito_correction
from sdesens.sde import noise_product

F64 = torch.float64
T = torch.tensor(0.3, dtype=F64)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64) + 0.2


# Functions of a module, so that they pickle. `matrix` couples its components, its columns do not commute, and the
# Jacobian of no column is symmetric.

P = {"a": torch.tensor(0.7, dtype=F64), "b": torch.tensor(-0.4, dtype=F64), "c": torch.tensor([0.3, 0.9], dtype=F64)}


def drift(t, y, p):
    return p["a"] * torch.sin(y) - p["c"] * y.flip(-1) + t


def diagonal(t, y, p):
    return p["c"] * y**2 * (1 + t)


def matrix(t, y, p):
    y1, y2 = y.unbind(-1)
    first = torch.stack((p["a"] * y1 * y2, p["b"] * torch.sin(y1)), -1)
    second = torch.stack((p["c"][0] * y2**2, p["c"][1] * y1), -1)
    return torch.stack((first, second), -1) * (1 + t)


def one_column(t, y, p):
    return matrix(t, y, p)[..., :1]


def constant(t, y, p):
    return torch.stack((p["c"], p["a"] * p["c"].flip(0), torch.stack((p["a"], p["b"]))), -1) * (
        1 + t
    )  # (d, m) = (2, 3)


def constant_per_path(t, y, p):
    return constant(t, y, p).expand(y.shape[0], 2, 3)


DIFFUSIONS = {
    "diagonal": ("diagonal", diagonal),
    "scalar": ("scalar", one_column),
    "additive (d, m)": ("additive", constant),
    "additive (B, d, m)": ("additive", constant_per_path),
    "general": ("general", matrix),
    "general m=1": ("general", one_column),
}
every_noise = pytest.mark.parametrize(("noise_type", "diffusion"), DIFFUSIONS.values(), ids=list(DIFFUSIONS))


# noise_product


@every_noise
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_noise_product_is_the_sum_over_brownian_motions(noise_type, diffusion, batch):
    sde = SDE(drift, diffusion, P, noise_type)
    g = diffusion(T, rand(batch, 2), P)
    full = torch.diag_embed(g) if noise_type == "diagonal" else g.expand(batch, 2, -1)
    dW = rand(batch, full.shape[-1], seed=1) - 0.7
    out = noise_product(sde, g, dW)
    assert out.shape == (batch, 2)
    assert torch.allclose(out, torch.einsum("bij,bj->bi", full, dW), rtol=1e-14, atol=1e-15)


def test_diagonal_noise_takes_any_event_shape():
    g, dW = rand(4, 2, 3), rand(4, 6, seed=1)
    assert torch.equal(noise_product(SDE(drift, diagonal), g, dW), g * dW.reshape(4, 2, 3))


# Ito and Stratonovich


def scalar_correction(y, p, scale):
    """(ds/dx) s of the first column of `matrix`, by hand."""
    y1, y2 = y.unbind(-1)
    s1, s2 = p["a"] * y1 * y2, p["b"] * torch.sin(y1)
    return torch.stack((p["a"] * (y2 * s1 + y1 * s2), p["b"] * torch.cos(y1) * s1), -1) * scale**2


def general_correction(y, p, scale):
    """The same plus the second column's, (ds/dx) s = (2 c0 y2 c1 y1, c1 c0 y2^2)."""
    y1, y2 = y.unbind(-1)
    c0, c1 = p["c"]
    return scalar_correction(y, p, scale) + torch.stack((2 * c0 * c1 * y1 * y2, c0 * c1 * y2**2), -1) * scale**2


CORRECTIONS = {
    "diagonal": lambda y, p, scale: 2 * p["c"] ** 2 * y**3 * scale**2,
    "scalar": scalar_correction,
    "additive (d, m)": lambda y, p, scale: torch.zeros_like(y),
    "additive (B, d, m)": lambda y, p, scale: torch.zeros_like(y),
    "general": general_correction,
    "general m=1": scalar_correction,
}


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_the_ito_correction_is_the_one_derived_by_hand(name):
    noise_type, diffusion = DIFFUSIONS[name]
    y = rand(5, 2)
    wanted = CORRECTIONS[name](y, P, 1 + T)
    stratonovich = SDE(drift, diffusion, P, noise_type, "stratonovich")
    assert torch.allclose(ito_correction(stratonovich, T, y, P), wanted, rtol=1e-13, atol=1e-15)
    ito = to_ito(stratonovich)
    assert (ito.sde_type, ito.noise_type) == ("ito", noise_type)
    assert torch.allclose(ito.drift(T, y, P), drift(T, y, P) + wanted / 2, rtol=1e-13)
    back = to_stratonovich(SDE(drift, diffusion, P, noise_type))
    assert back.sde_type == "stratonovich"
    assert torch.allclose(back.drift(T, y, P), drift(T, y, P) - wanted / 2, rtol=1e-13)


@pytest.mark.parametrize(("diffusion", "correction"), [(one_column, scalar_correction), (matrix, general_correction)])
def test_a_transposed_jacobian_would_be_seen(diffusion, correction):
    y = rand(5, 2)
    J = torch.func.vmap(torch.func.jacrev(lambda x: diffusion(T, x[None], P)[0]))(y)  # (B, i, j, k) = ds_ij / dx_k
    g = diffusion(T, y, P)
    wanted = correction(y, P, 1 + T)
    assert torch.allclose(torch.einsum("bijk,bkj->bi", J, g), wanted, rtol=1e-13)
    transposed = torch.einsum("bkji,bkj->bi", J, g)
    assert float((transposed - wanted).abs().max()) > 0.1


@every_noise
def test_there_and_back_is_the_same_equation(noise_type, diffusion):
    y = rand(4, 2)
    for sde_type, there, back in (("ito", to_stratonovich, to_ito), ("stratonovich", to_ito, to_stratonovich)):
        sde = SDE(drift, diffusion, P, noise_type, sde_type)
        again = back(there(sde))
        assert again.sde_type == sde_type
        assert torch.allclose(again.drift(T, y, P), drift(T, y, P), rtol=1e-13)
        assert back(sde) is sde


def test_the_correction_works_on_any_event_shape_and_is_differentiable():
    sde = to_ito(SDE(lambda t, y, p: 0 * y, lambda t, y, p: p["s"] * y, {"s": T}, sde_type="stratonovich"))
    y, s = rand(3, 2, 2), T.clone().requires_grad_()
    out = sde.drift(T, y, {"s": s})
    assert torch.allclose(out, s**2 * y / 2)
    (grad,) = torch.autograd.grad(out.sum(), s)
    assert torch.allclose(grad, s * y.sum())


def test_a_stratonovich_path_is_the_ordinary_exponential():
    # dX = s X o dW has X = exp(s W). Strong error of Euler at 2,000 steps, about s^2 sqrt(h / 2) X = 4e-3 a path.
    s, n = 0.5, 2000
    sde = SDE(lambda t, y, p: 0 * y, lambda t, y, p: s * y, sde_type="stratonovich")
    dW = Philox(3).normals(0, 500, 0, n, 1, dtype=F64, device=torch.device("cpu")) / math.sqrt(n)
    y0 = torch.ones(500, 1, dtype=F64)
    wanted = torch.exp(s * dW.sum(0))

    def error(sde):
        return float((sdeint(sde, y0, (0.0, 1.0), n_steps=n, bm=dW)[-1] - wanted).square().mean().sqrt())

    assert error(to_ito(sde)) < 0.01
    assert error(SDE(sde.drift, sde.diffusion)) > 0.1  # negative control: the same functions read as Ito


def test_sdeint_refuses_stratonovich_and_names_the_correction():
    sde = SDE(drift, matrix, P, "general", "stratonovich")
    with pytest.raises(CalculusError, match=r"sde_type='stratonovich'.*b \+ 1/2 sum_j \(ds_j/dx\) s_j.*to_ito\(sde\)"):
        sdeint(sde, rand(3, 2), (0.0, 1.0), n_steps=4, seed=0)
    assert torch.isfinite(sdeint(to_ito(sde), rand(3, 2), (0.0, 1.0), n_steps=4, seed=0)).all()


# torchsde-style objects


class Separate(nn.Module):
    sde_type = "ito"

    def __init__(self, noise_type="diagonal"):
        super().__init__()
        self.noise_type = noise_type
        self.net = nn.Linear(2, 2).double()
        self.scale = nn.Parameter(torch.tensor([0.3, 0.5], dtype=F64))

    def f(self, t, y):
        return torch.tanh(self.net(y)) * t

    def g(self, t, y):
        g = self.scale * torch.cos(y)
        return g.unsqueeze(-1) if self.noise_type == "scalar" else g


class Together(Separate):
    f = g = None

    def f_and_g(self, t, y):
        return Separate.f(self, t, y), Separate.g(self, t, y)


class Plain:
    noise_type, sde_type = "diagonal", "ito"

    def f(self, t, y):
        return -y

    def g(self, t, y):
        return torch.ones_like(y)


def module(kind, noise_type="diagonal"):
    m = kind(noise_type)
    state = {k: rand(*v.shape, seed=i) - 0.5 for i, (k, v) in enumerate(m.state_dict().items())}
    m.load_state_dict(state)
    return m


@pytest.mark.parametrize("kind", [Separate, Together])
@pytest.mark.parametrize("noise_type", ["diagonal", "scalar"])
def test_a_torchsde_module_is_the_same_equation(kind, noise_type):
    m = module(kind, noise_type)
    sde, y = as_sde(m), rand(4, 2)
    assert (sde.noise_type, sde.sde_type, list(sde.params)) == (noise_type, "ito", ["scale", "net.weight", "net.bias"])
    f, g = (m.f(T, y), m.g(T, y)) if kind is Separate else m.f_and_g(T, y)
    assert torch.equal(sde.drift(T, y, sde.params), f)
    assert torch.equal(sde.diffusion(T, y, sde.params), g)


@pytest.mark.parametrize("kind", [Separate, Together])
def test_parameters_are_swapped_and_put_back(kind):
    m = module(kind)
    sde, y, before = as_sde(m), rand(4, 2), copy.deepcopy(m.state_dict())
    other = {k: v.detach() + 0.1 for k, v in sde.params.items()}
    moved = module(kind)
    moved.load_state_dict(other)
    assert torch.equal(sde.drift(T, y, other), as_sde(moved).drift(T, y, dict(moved.named_parameters())))
    assert torch.equal(sde.diffusion(T, y, other), other["scale"] * torch.cos(y))
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    bumped = torch.func.jacrev(lambda s: sde.diffusion(T, y, {**other, "scale": s}).sum(0))(other["scale"])
    assert torch.allclose(bumped, torch.diag(torch.cos(y).sum(0)))


def test_gradients_reach_the_parameters_of_a_module():
    m = module(Separate)
    ys = sdeint(m, rand(8, 2), (0.0, 1.0), n_steps=10, seed=1)
    ys[-1].sum().backward()
    assert all(v.grad is not None and bool(v.grad.any()) for v in m.parameters())


def test_an_object_that_is_no_module_has_no_parameters():
    sde = as_sde(Plain())
    assert dict(sde.params) == {}
    assert torch.equal(sde.drift(T, T[None, None], {}), -T[None, None])


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"f": None}, r"`module` \(Broken\) needs methods f\(t, y\) and g\(t, y\)"),
        ({"g": 3}, r"needs methods .* SDE\(drift, diffusion, params\)"),
        ({"noise_type": ...}, "needs an attribute `noise_type`"),
        ({"sde_type": ...}, "needs an attribute `sde_type`"),
        ({"noise_type": "diag"}, "`noise_type` must be one of 'diagonal', .*got 'diag'"),
        ({"sde_type": "Ito"}, "`sde_type` must be one of 'ito', 'stratonovich', got 'Ito'"),
    ],
)
def test_an_object_that_is_no_sde_is_refused(attributes, message):
    whole = {k: v for k, v in vars(Plain).items() if not k.startswith("__")} | attributes
    broken = type("Broken", (), {k: v for k, v in whole.items() if v is not ...})
    with pytest.raises((ArgumentTypeError, ArgumentError), match=message):
        as_sde(broken())


# with_running_integral


def integrand(t, y, p):
    return y[:, 0] ** 2 + p["a"] * y[:, 1] * t


@every_noise
def test_a_running_integral_is_the_left_sum_along_the_path(noise_type, diffusion):
    sde, n = SDE(drift, diffusion, P, noise_type), 12
    widened = with_running_integral(sde, integrand)
    assert (widened.noise_type, widened.params) == (noise_type, sde.params)
    y0, h, ts = rand(5, 2), 0.5 / n, [0.5 * k / n for k in range(n + 1)]
    m = {"diagonal": 2}.get(noise_type, diffusion(T, y0, P).shape[-1])
    dW = (rand(n, 5, m + 1) - 0.7) * 0.2
    ys = sdeint(sde, y0, ts, n_steps=n, bm=dW[..., :m])
    wide = sdeint(
        widened,
        torch.cat((y0, torch.zeros(5, 1)), 1),
        ts,
        n_steps=n,
        bm=dW if noise_type == "diagonal" else dW[..., :m],
    )
    assert torch.allclose(wide[..., :2], ys, rtol=1e-14)
    rates = torch.stack([integrand(t, y, P) for t, y in zip(ts, ys, strict=True)])
    assert torch.allclose(wide[1:, :, 2], h * rates[:-1].cumsum(0), rtol=1e-13)


@every_noise
def test_a_running_integral_does_not_change_the_correction(noise_type, diffusion):
    sde, y = SDE(drift, diffusion, P, noise_type, "stratonovich"), rand(4, 3)
    widened = to_ito(with_running_integral(sde, integrand)).drift(T, y, P)
    assert torch.allclose(widened[:, :2], to_ito(sde).drift(T, y[:, :2], P), rtol=1e-13)
    assert torch.allclose(widened[:, 2], integrand(T, y, P))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: with_running_integral(Plain(), integrand), ArgumentTypeError, r"`sde` must be an SDE.*as_sde\(module\)"),
        (lambda: with_running_integral(SDE(drift, diagonal), 3), ArgumentTypeError, r"`integrand` must be a function"),
        (
            lambda: with_running_integral(SDE(drift, diagonal, P), lambda t, y, p: y).drift(T, rand(4, 3), P),
            ShapeError,
            r"`integrand\(t, y, p\)` must return shape \(B,\) = \(4,\), got .*\(4, 2\): one number a path",
        ),
        (
            lambda: with_running_integral(SDE(drift, diagonal, P), lambda t, y, p: 1.0).drift(T, rand(4, 3), P),
            ShapeError,
            "`integrand.*got float",
        ),
        (
            lambda: with_running_integral(SDE(drift, diagonal, P), integrand).drift(T, rand(4, 2, 2), P),
            ShapeError,
            r"needs states \(B, d \+ 1\), got shape \(4, 2, 2\): append a 0 to `y0`",
        ),
    ],
)  # fmt: skip
def test_a_running_integral_that_cannot_be_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# correlated_noise


def volatility(t, y, p):
    return p["c"] * (1 + y)


def correlation(p):
    one = torch.ones_like(p["a"])
    return torch.stack((torch.stack((one, p["a"])), torch.stack((p["a"], one))))


def test_correlated_noise_has_the_covariance_it_states():
    y = rand(5, 2)
    g, v = correlated_noise(volatility, correlation)(T, y, P), volatility(T, y, P)
    wanted = v[:, :, None] * correlation(P) * v[:, None, :]
    assert torch.allclose(g @ g.mT, wanted, rtol=1e-14)
    # and in samples: increments of Euler over one step of length 1; z below 4 is false once in 16,000
    n = 200_000
    sde = SDE(lambda t, y, p: 0 * y, correlated_noise(volatility, correlation), P, "general")
    dX = sdeint(sde, torch.zeros(n, 2, dtype=F64), (0.0, 1.0), n_steps=1, seed=4)[-1]
    product = dX[:, 0] * dX[:, 1]
    exact = float(P["a"] * P["c"].prod())
    assert abs(float(product.mean()) - exact) / float(product.std()) * math.sqrt(n) < 4
    assert float(product.std()) < 1


def test_correlated_noise_is_differentiable_in_the_correlation():
    y = rand(3, 2)
    g = correlated_noise(volatility, correlation)
    a = P["a"].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: g(T, y, {**P, "a": a}), a)
    # L = [[1, 0], [rho, sqrt(1 - rho^2)]]
    tangent = torch.func.jacfwd(lambda a: g(T, y, {**P, "a": a}))(P["a"])
    v, rho = volatility(T, y, P)[:, 1], P["a"]
    assert torch.allclose(tangent[:, 1], torch.stack((v, -v * rho / (1 - rho**2).sqrt()), -1), rtol=1e-13)
    assert not tangent[:, 0].any()


def matrix_of(*rows):
    return lambda p: torch.tensor(rows, dtype=F64)


@pytest.mark.parametrize(
    ("volatility", "correlation", "error", "message"),
    [
        (volatility, matrix_of([1.0, 1.2], [1.2, 1.0]), ArgumentError, "`correlation.*positive definite.*tanh"),
        (volatility, matrix_of([1.0, 1.0], [1.0, 1.0]), ArgumentError, "`correlation.*positive definite"),
        (volatility, matrix_of([1.0, 0.2], [0.2, 1.1]), ArgumentError, "ones on the diagonal.*1.1"),
        (volatility, matrix_of([1.0, 0.9], [0.2, 1.0]), ArgumentError, "must be symmetric"),
        (volatility, matrix_of([1.0, math.nan], [math.nan, 1.0]), ArgumentError, "`correlation.*nan"),
        (volatility, matrix_of([1.0, 0.2, 0.0], [0.2, 1.0, 0.0]), ShapeError, r"`correlation\(p\)` must be \(d, d\).*\(2, 3\)"),
        (volatility, matrix_of([1.0]), ShapeError, r"`correlation\(p\)` must be \(d, d\)"),
        (lambda t, y, p: p["c"], correlation, ShapeError, r"`volatility\(t, y, p\)` must have the shape of y.*ones_like"),
        (lambda t, y, p: y[:, :1], correlation, ShapeError, r"`volatility.*got \(3, 1\)"),
    ],
)  # fmt: skip
def test_a_matrix_that_is_no_correlation_is_refused(volatility, correlation, error, message):
    sde = SDE(drift, correlated_noise(volatility, correlation), P, "general")
    with pytest.raises(error, match=message):
        sdeint(sde, rand(3, 2), (0.0, 1.0), n_steps=2, seed=0)


# the object itself


PICKLED = {
    "diagonal": SDE(drift, diagonal, P),
    "to_ito": to_ito(SDE(drift, matrix, P, "general", "stratonovich", 2)),
    "running integral": with_running_integral(SDE(drift, constant, P, "additive"), integrand),
    "correlated": SDE(drift, correlated_noise(volatility, correlation), P, "general"),
    "module": as_sde(module(Together)),
}


@pytest.mark.parametrize("name", PICKLED)
def test_an_sde_survives_pickling(name):
    sde = PICKLED[name]
    again = pickle.loads(pickle.dumps(sde))
    d = 3 if name == "running integral" else 2
    first, second = (sdeint(s, rand(3, d), (0.0, 0.5), n_steps=5, seed=1) for s in (sde, again))
    assert torch.equal(first, second)
    assert (again.noise_type, again.sde_type, again.noise_dim) == (sde.noise_type, sde.sde_type, sde.noise_dim)


def test_parameters_cannot_be_changed_behind_the_back():
    params = dict(P)
    sde = SDE(drift, diagonal, params)
    params["new"] = T
    assert "new" not in sde.params
    with pytest.raises(TypeError):
        sde.params["a"] = T


def test_with_params_is_the_same_equation_elsewhere():
    sde = SDE(drift, matrix, P, "general", "stratonovich", 2)
    other = sde.with_params(a=T)
    assert other.params["a"] is T
    assert other.params["b"] is P["b"]
    assert (other.drift, other.noise_type, other.sde_type, other.noise_dim) == (drift, "general", "stratonovich", 2)
    assert sde.params["a"] is P["a"]
