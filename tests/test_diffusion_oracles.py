"""Laws whose marginals, denoisers and floors are known: against quadrature, closed forms, other libraries and figures seen elsewhere."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad, simpson, trapezoid
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.func import jacrev, jvp, vjp, vmap

from sdesens import Antithetic, Philox
from sdesens.diffusion import EDM, VE, VP, CondOT, Cosine, SubVP, draw_uniforms, lognormal_times
from sdesens.diffusion.law import Exact, Law
from sdesens.diffusion.losses import dsm_loss
from sdesens.diffusion.oracles import Empirical, Gaussian, GaussianMixture
from sdesens.diffusion.streams import DATA
from sdesens.diffusion.weights import edm_weight, likelihood_weight, min_snr_weight
from sdesens.errors import ArgumentError, ArgumentTypeError, DtypeError, GridError, ShapeError

D = torch.float64
SCHEDULES = [VP(), Cosine(), SubVP(), VE(), EDM(), CondOT()]


def t64(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=D)


def covariances(n: int, d: int) -> torch.Tensor:
    """Well-conditioned, of different shapes and sizes."""
    A = torch.linspace(-1.3, 2.1, n * d * d, dtype=D).mul(5).sin().reshape(n, d, d)
    return A @ A.mT + 0.1 * torch.eye(d, dtype=D)


POINTS = torch.linspace(0.2, 8.0, 14, dtype=D).cos().reshape(7, 2) * 2
MEANS = t64([0.5, -1.0], [-2.0, 0.3], [1.0, 2.0])
THIN = t64([2.0, 1.0], [1.0, 0.5])  # rank one
LAWS = {
    "gaussian": Gaussian(t64(1.0, -0.5, 0.2), covariances(1, 3)[0]),
    "variances": Gaussian(t64(1.0, -0.5), t64(0.3, 2.0)),
    "thin": Gaussian(t64(1.0, -0.5), THIN),
    "mixture": GaussianMixture(t64(0.2, 0.5, 0.3), MEANS, covariances(3, 2)),
    "mixture of variances": GaussianMixture(t64(0.2, 0.5, 0.3), MEANS, covariances(3, 2).diagonal(dim1=1, dim2=2)),
    "ring": GaussianMixture.ring(),
    "points": Empirical(POINTS),
}
every_law = pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def noisy(law: Law, schedule, t: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """One x_t a time."""
    eps = Philox(seed, stream=7).normals(0, len(t), 0, 1, law.dim, dtype=D, device=torch.device("cpu"))[0]
    return schedule.reparameterise(law.sample(len(t), seed), t, eps)


def within(schedule, n: int) -> torch.Tensor:
    """n times, evenly in log-SNR within [-12, 12] and within the schedule."""
    return schedule.t_of_log_snr(torch.linspace(12, -12, n, dtype=D))


# Densities and scores


@every_law
@every_schedule
def test_the_score_is_the_gradient_of_the_log_density(law, schedule):
    t = within(schedule, 41)
    x = noisy(law, schedule, t).requires_grad_()
    (slope,) = torch.autograd.grad(law.log_density(x, schedule, t).sum(), x)
    score = law.score(x, schedule, t)
    # rounding: r / V loses what x - alpha m cancels, at most |x|/sigma < 1e4 units; the thin law's V has condition 1e6
    size = 1 + score.detach().norm(dim=1, keepdim=True)
    assert float(((score - slope) / size).detach().abs().max()) < 1e-10
    torch.testing.assert_close(law.denoiser(schedule).score(x, t), score, rtol=1e-14, atol=0)  # -sigma y / sigma


def covariance(law: Law) -> torch.Tensor:
    covs = law.covs if isinstance(law, GaussianMixture) else law.cov[None]
    if covs.dim() == 3:
        return covs
    return torch.diag_embed(covs.expand(law.means.shape) if isinstance(law, GaussianMixture) else covs)


@pytest.mark.parametrize("name", [k for k in LAWS if k not in ("points", "thin")])
@every_schedule
def test_log_densities_against_torch_distributions(name, schedule):
    law = LAWS[name]
    gaussian = isinstance(law, Gaussian)
    w, m = (t64(1.0), law.mean[None]) if gaussian else (law.weights, law.means)
    for t in (*([0.0] if float(schedule.sigma(0.0)) == 0 else []), 0.1, 0.7, schedule.t_max):
        a, s = schedule.alpha(t), schedule.sigma(t)
        V = a**2 * covariance(law) + s**2 * torch.eye(law.dim, dtype=D)
        expected = MixtureSameFamily(Categorical(w), MultivariateNormal(a * m, V))
        x = 3 * torch.linspace(-1, 1, 5 * law.dim, dtype=D).mul(4).sin().reshape(5, -1)
        # rounding of a quadratic form that reaches 1e3 at t = 0
        torch.testing.assert_close(law.log_density(x, schedule, t), expected.log_prob(x), rtol=1e-12, atol=1e-12)


def test_log_densities_of_points_and_of_a_thin_law():
    t, x = t64(0.2, 0.6, 1.0), t64([0.3, -1.0], [2.0, 2.0], [0.0, 5.0])
    a, s = VP().alpha(t).numpy(), VP().sigma(t).numpy()
    for i in range(3):
        points = [stats.multivariate_normal(a[i] * p, s[i] ** 2).pdf(x[i].numpy()) for p in POINTS.numpy()]
        expected = math.log(np.mean(points))
        # a few units of rounding of log-densities of size 30
        assert float(LAWS["points"].log_density(x, VP(), t)[i]) == pytest.approx(expected, rel=1e-13)
        V = a[i] ** 2 * THIN.numpy() + s[i] ** 2 * np.eye(2)
        expected = stats.multivariate_normal(a[i] * np.array([1.0, -0.5]), V).logpdf(x[i].numpy())
        assert float(LAWS["thin"].log_density(x, VP(), t)[i]) == pytest.approx(expected, rel=1e-13)


# Denoisers

LINE = GaussianMixture(t64(0.3, 0.7), t64([-1.0], [1.5]), t64([[0.2]], [[0.6]]))


@every_schedule
def test_the_posterior_mean_against_quadrature(schedule):
    for t in (0.02, 0.3, 0.8):
        a, s = float(schedule.alpha(t)), float(schedule.sigma(t))
        for x in (-1.3 * a, 0.2, 1.0 + s):
            z = np.linspace(
                -9, 9, 20_001
            )  # steps under a tenth of s/a: exact to rounding for a product of normal densities
            prior = 0.3 * stats.norm.pdf(z, -1, 0.2**0.5) + 0.7 * stats.norm.pdf(z, 1.5, 0.6**0.5)
            joint = prior * np.exp(-((x - a * z) ** 2) / (2 * s * s))
            mean = trapezoid(z * joint, z) / trapezoid(joint, z)
            x0, eps = LINE.denoiser(schedule).pair(t64([x]), t)
            # rounding, which x - a mean magnifies by 1/s
            assert float(x0) == pytest.approx(mean, rel=1e-12, abs=1e-13)
            assert float(eps) == pytest.approx((x - a * mean) / s, rel=1e-12, abs=1e-12 * max(1, a / s))


@every_law
@every_schedule
def test_the_pair_adds_up_to_x_over_all_noise_levels(law, schedule):
    t = within(schedule, 97)
    x = noisy(law, schedule, t, seed=3)
    x0, eps = law.denoiser(schedule).pair(x, t)
    again = schedule.reparameterise(x0, t, eps)
    assert float(((again - x).abs() / x.abs().amax(1, keepdim=True)).max()) < 1e-12
    # neither end diverges: the noise is of size sqrt(d), x_0 within reach of the law; 7 sd
    assert float(eps.abs().max()) < 7
    assert float((x0 - law.sample(4096, 9).mean(0)).abs().max()) < 7 * float(law.sample(4096, 9).std(0).max())


@every_law
def test_where_no_signal_is_left_the_data_are_their_mean(law):
    x = noisy(law, CondOT(), torch.ones(3, dtype=D))
    x0, eps = law.denoiser(CondOT()).pair(x, 1.0)
    mean = (
        law.mean
        if isinstance(law, Gaussian)
        else law.points.mean(0)
        if isinstance(law, Empirical)
        else law.weights @ law.means
    )
    torch.testing.assert_close(x0, mean.expand(3, -1), rtol=0, atol=1e-15)  # a sum of a few
    torch.testing.assert_close(eps, x, rtol=1e-15, atol=0)


def test_points_against_direct_distances():
    data = digits()[:1400]
    law, x = Empirical(data), noisy(Empirical(data), VP(), within(VP(), 25), seed=2)
    t = within(VP(), 25)
    a, s = VP().alpha(t).numpy(), VP().sigma(t).numpy()
    square = np.stack([cdist(x[i : i + 1], a[i] * data.numpy(), "sqeuclidean")[0] / s[i] ** 2 for i in range(25)])
    share = np.exp(-(square - square.min(1, keepdims=True)) / 2)
    x0 = share / share.sum(1, keepdims=True) @ data.numpy()
    found = law.denoiser(VP()).x0(x, t)
    # inner products of length 64 at SNR 1.6e5 round log-responsibilities by 1e-16 x 64 x 1.6e5 = 1e-9
    torch.testing.assert_close(found, torch.from_numpy(x0), rtol=0, atol=1e-9)


@every_law
def test_single_precision_in_and_out_double_within(law):
    t = within(VP(), 25)
    x = noisy(law, VP(), t)
    x32 = x.float()
    for narrow, wide in zip(
        law.denoiser(VP()).pair(x32, t.float()), law.denoiser(VP()).pair(x32.double(), t.float().double()), strict=True
    ):
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow, wide.float(), rtol=0, atol=0)
    assert law.score(x32, VP(), t).dtype == law.log_density(x32, VP(), t).dtype == torch.float32
    half = law.denoiser(VP()).x0(x.half(), 0.5)
    assert half.dtype == torch.float16


# Gradients


@every_law
def test_transforms_of_the_denoiser(law):
    predictor = law.denoiser(VP())
    t = t64(0.05, 0.4, 0.9)
    x = noisy(law, VP(), t)
    dx = torch.ones_like(x)
    value, moved = jvp(lambda x: torch.cat(predictor.pair(x, t)), (x,), (dx,))
    dense = torch.stack([jacrev(lambda z, s=s: predictor.pair(z[None], s)[0][0])(z) for z, s in zip(x, t, strict=True)])
    torch.testing.assert_close(moved[:3], dense.sum(-1), rtol=1e-11, atol=1e-12)  # rounding through condition 1e2
    _, back = vjp(lambda x: predictor.x0(x, t), x)
    torch.testing.assert_close(back(dx)[0], dense.sum(-2), rtol=1e-11, atol=1e-12)
    rows = vmap(lambda z, s: predictor.x0(z[None], s)[0])(x, t)
    torch.testing.assert_close(rows, value[:3], rtol=1e-13, atol=1e-14)
    # Tweedie's second formula: alpha/sigma^2 Cov(x_0 | x) is the Jacobian, hence symmetric
    torch.testing.assert_close(dense, dense.mT, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("repeated", "t"), [(False, 0.2), (True, t64(0.2, 0.8))], ids=["distinct axes", "repeated axes"]
)
def test_gradients_reach_the_law(repeated, t):
    cov = torch.eye(2, dtype=D).expand(2, 2, 2).clone() if repeated else covariances(2, 2)
    x = t64([0.4, -0.3], [1.0, 0.7])

    def outputs(x, mean, cov, weights):
        cov = (cov + cov.mT) / 2
        mixed = GaussianMixture(torch.softmax(weights, 0), mean, cov)
        single = Gaussian(mean[0], cov[0])
        return [law.at(x, VP(), t)[i] for law in (mixed, single) for i in range(3)]

    args = [v.requires_grad_() for v in (x, MEANS[:2].clone(), cov, t64(0.3, -0.1))]
    # central differences of step 1e-6 in float64: torch's own tolerances
    assert torch.autograd.gradcheck(outputs, args)
    assert torch.autograd.gradgradcheck(outputs, args)


def test_gradients_in_the_schedule():
    x = noisy(LAWS["mixture"], VP(), t64(0.1, 0.5))

    def value(high: float, grad: bool = False):
        p = {"beta_max": torch.tensor(high, dtype=D, requires_grad=grad)}
        return p["beta_max"], LAWS["mixture"].denoiser(VP()).with_params(p).pair(x, t64(0.1, 0.5))[1].sin().sum()

    leaf, out = value(20.0, True)
    (slope,) = torch.autograd.grad(out, leaf)
    h = 1e-4
    # error h^2 and rounding / h, both 1e-10 or less
    assert float(slope) == pytest.approx(float(value(20 + h)[1] - value(20 - h)[1]) / (2 * h), rel=1e-7)
    exact = LAWS["mixture"].denoiser(VP())
    assert set(exact.params) == {"beta_min", "beta_max"}
    assert exact.with_params({"elsewhere": leaf}) is exact


# Floors


def fisher(t: float) -> float:
    """E|grad log p_t|^2 of the ring under VP, by Gauss-Hermite quadrature about one of its modes, which are alike."""
    z, w = np.polynomial.hermite_e.hermegauss(60)
    z, w = torch.from_numpy(z), torch.from_numpy(w / w.sum())
    a, s = VP().alpha(t), VP().sigma(t)
    x = a * RING.means[0] + torch.sqrt(a**2 * RING.covs + s**2) * torch.cartesian_prod(z, z)
    return float(RING.score(x, VP(), t).square().sum(1) @ torch.outer(w, w).flatten())


def over_time(f, n: int = 60) -> float:
    """The integral of f over [0, 1]."""
    t, w = np.polynomial.legendre.leggauss(n)
    return float(sum(w / 2 * f(float(t)) for t, w in zip((t + 1) / 2, w, strict=True)))


RING = LAWS["ring"]


def monte_carlo(law: Law, *args, **options):
    """The estimate that a law without closed form would give."""
    return Law.floor(law, *args, **options)


@every_schedule
@pytest.mark.parametrize("name", ["gaussian", "variances", "thin"])
def test_the_floor_of_a_gaussian(name, schedule):
    law = LAWS[name]
    for t in (0.1, 0.5, schedule.t_max, None, (0.2, 0.6)):
        exact, found = law.floor(schedule, t), monte_carlo(law, schedule, t, n_samples=4096, seed=4)
        assert float(exact.standard_error) == 0
        # 90 comparisons at 4 standard errors: false alarm 6e-3
        assert abs(float(exact.mean - found.mean)) < 4 * float(found.standard_error) + 1e-12, (name, t)


@pytest.mark.parametrize("t", [0.05, 0.2, 0.5])
def test_the_floor_of_a_mixture_is_d_less_the_score(t):
    expected, found = 1 - float(VP().sigma(t)) ** 2 * fisher(t) / 2, RING.floor(VP(), t, seed=1)
    assert abs(float(found.mean) - expected) < 4 * float(found.standard_error)
    assert abs(float(found.mean) - 1.15 * expected) > 4 * float(found.standard_error)  # it can tell a seventh


@pytest.mark.parametrize("weight", [min_snr_weight(5.0), likelihood_weight], ids=["min-SNR", "likelihood"])
def test_the_loss_of_the_exact_denoiser_is_the_floor(weight):
    law, n = LAWS["mixture"], 2**14
    t = 0.05 + 0.95 * torch.rand(n, dtype=D, generator=torch.Generator().manual_seed(3))
    eps = torch.randn(n, 2, dtype=D, generator=torch.Generator().manual_seed(4))
    loss = dsm_loss(law.denoiser(VP()), law.sample(n, 5), t, eps, weight=weight).loss
    floor = law.floor(VP(), (0.05, 1.0), weight=weight, seed=6)
    assert abs(float(loss.mean() - floor.mean)) < 4 * math.hypot(float(loss.std()) / 128, float(floor.standard_error))
    gauss = LAWS["gaussian"]
    found = monte_carlo(gauss, VP(), (0.05, 1.0), weight=weight, seed=7)
    assert abs(float(gauss.floor(VP(), (0.05, 1.0), weight=weight).mean - found.mean)) < 4 * float(found.standard_error)


def test_a_floor_over_given_times():
    """The mean over many times is that of the losses at each: exact for a Gaussian, 4 standard errors for others (6e-5 each)."""
    t = torch.linspace(0.1, 0.9, 101, dtype=D)
    gauss = LAWS["gaussian"]
    by_hand = sum(float(gauss.floor(VP(), float(s)).mean) for s in t) / 101
    assert float(gauss.floor(VP(), t).mean) == pytest.approx(by_hand, rel=1e-12)
    found = monte_carlo(gauss, VP(), t, n_samples=2**14, seed=2)
    assert abs(float(found.mean) - by_hand) < 4 * float(found.standard_error)
    # preconditioned training: the levels it draws are where its loss is to be compared
    levels = lognormal_times(EDM(), draw_uniforms(0, 0, 4096), sigma_data=1.4)
    floor = RING.floor(EDM(), levels, weight=edm_weight(1.4))
    assert 0 < float(floor.mean) < 1


def test_moments_of_a_mixture():
    law, n = LAWS["mixture"], 2**16
    x = law.sample(n, 7)
    assert float((x.mean(0) - law.mean).abs().max()) < 4 * float(x.std(0).max()) / n**0.5
    # the standard error of a covariance is below 2 sqrt(2 / n) of the largest variance here
    assert float((torch.cov(x.T) - law.cov).abs().max()) < 8 * float(law.cov.abs().max()) * (2 / n) ** 0.5


def test_floors_seen_elsewhere():
    normal = Gaussian(t64(0.0), t64(1.0))
    # alpha^2 / (alpha^2 + sigma^2) = alpha^2: the mean of exp(-B) in t, and of cos^2
    expected = quad(lambda t: math.exp(-0.1 * t - 9.95 * t * t), 0, 1)[0]
    assert float(normal.floor(VP()).mean) == pytest.approx(expected, rel=1e-9)
    assert float(normal.floor(VP()).mean) == pytest.approx(0.2760, abs=5e-5)  # printed digits
    assert float(normal.floor(Cosine(-math.inf)).mean) == pytest.approx(0.5, rel=1e-9)
    # the ring under VP, a dimension
    figures = {
        0.239: lambda log_snr, rate: torch.ones_like(log_snr),
        1.31: lambda log_snr, rate: torch.exp(-log_snr),
        1.55: lambda log_snr, rate: 1 + torch.exp(-log_snr),
    }
    for figure, weight in figures.items():
        by_quadrature = over_time(
            lambda t, weight=weight: weight(VP().log_snr(t), None) * (2 - VP().sigma(t) ** 2 * fisher(t)) / 2
        )
        # 0.2378, 1.314 and 1.552 here; the figures come from a Monte Carlo run without error bars, their last digit uncertain
        assert by_quadrature == pytest.approx(figure, abs=1.5e-3 if figure < 1 else 5e-3)
        found = RING.floor(VP(), weight=weight)
        assert abs(float(found.mean) - by_quadrature) < 4 * float(found.standard_error)


def test_the_entropy_of_the_ring():
    """H(p_0) = CE(p_T, prior) - int (f d + g^2 J/2) dt, J = E|grad log p_t|^2, up to KL(p_T || prior)."""
    exact = math.log(8) + 1 + math.log(2 * math.pi * 0.15**2)  # modes ten deviations apart: right to 1e-6
    assert exact == pytest.approx(1.1231, abs=5e-5)
    entropy = -RING.log_density(RING.sample(2**14, 1), VP(), 0.0)
    assert abs(float(entropy.mean()) - exact) < 4 * float(entropy.std()) / 128

    def gain(t: float) -> float:
        return float(2 * VP().f(t) + VP().g2(t) * fisher(t) / 2)

    square = float(VP().alpha(1.0)) ** 2 * (4 + 2 * 0.15**2) + 2 * float(VP().sigma(1.0)) ** 2  # E|x_T|^2
    found = square / 2 + math.log(2 * math.pi) - over_time(gain)
    # 60 times and 60 x 60 points, or 40 of each, agree to 1e-6; KL(p_T || prior) is 1e-8
    assert found == pytest.approx(exact, abs=5e-6)


def digits() -> torch.Tensor:
    return torch.from_numpy(load_digits().data / 8 - 1)


def test_the_floors_of_handwritten_digits():
    train = digits()[:1400]
    fit = Gaussian(train.mean(0), torch.cov(train.T))
    wiener = float(fit.floor(VP()).mean)
    variances = np.linalg.eigvalsh(np.cov(train.numpy().T)).clip(0)
    t = np.linspace(0, 1, 20_001)[1:, None] ** 2  # closer at the data, where thin axes lose their signal
    B = 0.1 * t + 9.95 * t**2
    signal = np.exp(-B) * variances
    inside = (signal / (signal - np.expm1(-B))).sum(1) * 2 * np.sqrt(t[:, 0])
    # Simpson's rule on 2e5 points leaves the first, 5e-6 wide, to a slope
    assert wiener == pytest.approx(simpson(inside, x=np.sqrt(t[:, 0])) / 64, rel=1e-7)
    # seen elsewhere 0.1186 for another 1,400 of the 1,797: choices of them differ by 5e-4
    assert wiener == pytest.approx(0.1186, abs=6e-4)
    memorised = Empirical(train).floor(VP(), n_samples=2**14)
    low, error = float(memorised.mean), float(memorised.standard_error)
    assert error < 4e-4
    # seen elsewhere 0.0201, without an error bar; here 0.0208 +- 0.0001 from 131,072 draws
    assert abs(low - 0.0201) < 4 * error
    assert low < wiener / 4


# The flow


def runge_kutta(velocity, x: torch.Tensor, t_from: float, t_to: float, n: int) -> torch.Tensor:
    h = (t_to - t_from) / n
    for k in range(n):
        t = t_from + k * h
        k1 = velocity(x, t)
        k2 = velocity(x + h / 2 * k1, t + h / 2)
        k3 = velocity(x + h / 2 * k2, t + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(x + h * k3, t + h if k < n - 1 else t_to))
    return x


@pytest.mark.parametrize("name", ["gaussian", "variances"])
@pytest.mark.parametrize(
    ("schedule", "start"), [(VP(), 1.0), (Cosine(), 0.9), (VE(), 0.8), (CondOT(), 0.9), (EDM(), 5.0)], ids=repr
)
def test_the_flow_against_runge_kutta(name, schedule, start):
    law, end = LAWS[name], 0.05
    x = noisy(law, schedule, torch.full((4,), start, dtype=D))
    found = law.flow(x, schedule, start, end)
    size = float(found.abs().max())
    errors = [
        float((runge_kutta(law.denoiser(schedule).velocity, x, start, end, n) - found).abs().max()) for n in (100, 200)
    ]
    # order 4: halving the step divides the error by 16, and at 200 steps little is left
    assert errors[1] < 1e-6 * size
    assert errors[0] / errors[1] > 12
    back = law.flow(found, schedule, end, torch.full((4,), start, dtype=D))
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)


def test_the_flow_of_a_thin_law_and_its_gradients():
    thin = LAWS["thin"]
    x = noisy(thin, VP(), torch.full((4,), 0.7, dtype=D))
    x0 = thin.flow(x, VP(), 0.7, 0.0)
    across = (x0 - thin.mean) @ t64(1.0, -2.0)  # the axis that has no spread
    assert float(across.abs().max()) < 1e-7  # sqrt of an eigenvalue that is zero to 1e-16
    with pytest.raises(GridError, match="`t` holds a time without noise"):
        thin.flow(x0, VP(), 0.0, 0.7)

    def mapped(x, mean, variances, high):
        return Gaussian(mean, variances).flow(x, VP(0.1, high), 0.8, 0.1)

    args = [v.requires_grad_() for v in (x.clone(), t64(0.3, 0.1), t64(0.5, 2.0), torch.tensor(20.0, dtype=D))]
    assert torch.autograd.gradcheck(mapped, args)  # torch's own tolerances
    asking = replace(LAWS["gaussian"], cov=LAWS["gaussian"].cov.clone().requires_grad_())
    with pytest.raises(ArgumentError, match="`cov` needs a gradient"):
        asking.flow(torch.zeros(1, 3, dtype=D), VP(), 1.0, 0.1)


# Tilting


@pytest.mark.parametrize("name", [k for k in LAWS if k not in ("points", "thin")])
def test_a_tilted_density_is_the_density_times_the_reward(name):
    law = LAWS[name]
    a = torch.linspace(0.7, -1.1, law.dim, dtype=D)
    x = 2 * torch.linspace(-1, 1, 6 * law.dim, dtype=D).mul(5).cos().reshape(6, -1)
    gap = law.tilt(a).log_density(x, VP(), 0.0) - law.log_density(x, VP(), 0.0) - x @ a
    # one constant, -log E exp(a.x); log-densities here reach -1e3
    torch.testing.assert_close(gap, gap[:1].expand(6), rtol=0, atol=1e-11)
    rewards = (law.sample(2**16, 3) @ a).exp()
    assert abs(float(rewards.mean()) - math.exp(-float(gap[0]))) < 4 * float(rewards.std()) / 256


def test_a_tilted_mixture_against_quadrature():
    def moment(k, a):
        def f(z):
            return z**k * math.exp(a * z) * math.exp(float(LINE.log_density(t64([z]), VP(), 0.0)))

        return quad(f, -12, 12, points=(-1.0, 1.5), epsabs=0, epsrel=1e-10, limit=200)[0]

    tilted = LINE.tilt([0.8])
    mean = moment(1, 0.8) / moment(0, 0.8)
    variance = moment(2, 0.8) / moment(0, 0.8) - mean**2
    found = tilted.weights @ tilted.means[:, 0]
    second = tilted.weights @ (tilted.means[:, 0] ** 2 + tilted.covs[:, 0, 0])
    # the quadrature's tolerance
    assert float(found) == pytest.approx(mean, rel=1e-9)
    assert float(second - found**2) == pytest.approx(variance, rel=1e-8)
    assert bool(Gaussian(t64(1.0), t64(0.5)).tilt(t64(2.0)).mean == 2.0)  # m + s^2 a


# Draws


@every_law
def test_draws_have_the_moments_of_the_law(law):
    n = 40_000
    x = law.sample(n, 8)
    if isinstance(law, Empirical):
        mean, cov = law.points.mean(0), torch.cov(law.points.T, correction=0)
    elif isinstance(law, Gaussian):
        mean, cov = law.mean, covariance(law)[0]
    else:
        mean = law.weights @ law.means
        cov = torch.einsum("k,kij->ij", law.weights, covariance(law))
        cov = cov + torch.einsum("k,ki,kj->ij", law.weights, law.means - mean, law.means - mean)
    z = (x.mean(0) - mean) / (cov.diagonal() / n).sqrt()
    products = ((x - mean)[:, :, None] * (x - mean)[:, None, :]).flatten(1)
    w = (products.mean(0) - cov.flatten()) / (products.std(0) / math.sqrt(n))
    # 2 + 4 or 3 + 9 numbers for each of seven laws, 4 standard errors: false alarm 3e-3
    assert float(torch.cat([z, w]).abs().max()) < 4
    torch.testing.assert_close(law.sample(7, 8, first_path=11), x[11:18], rtol=0, atol=1e-14)  # whatever the batch
    assert not torch.equal(law.sample(7, 9), x[:7])
    torch.testing.assert_close(law.sample(7, noise=Philox(8, DATA)), x[:7], rtol=0, atol=1e-14)


def test_draws_of_a_mixture_follow_its_distribution_function():
    def cdf(z):
        return 0.3 * stats.norm.cdf(z, -1, 0.2**0.5) + 0.7 * stats.norm.cdf(z, 1.5, 0.6**0.5)

    x = LINE.sample(20_000, 5)[:, 0].numpy()
    # Kolmogorov-Smirnov at the 4-standard-error rate, 6e-5, and the same against a mixture with other weights
    assert stats.kstest(x, cdf).pvalue > 6e-5
    assert (
        stats.kstest(
            x, lambda z: cdf(z) + 0.02 * (stats.norm.cdf(z, -1, 0.2**0.5) - stats.norm.cdf(z, 1.5, 0.6**0.5))
        ).pvalue
        < 6e-5
    )
    never = GaussianMixture(t64(0.0, 1.0, 0.0), t64([-9.0], [0.0], [9.0]), torch.tensor(1e-4, dtype=D)).sample(
        20_000, 6
    )
    assert float(never.abs().max()) < 1
    pairs = LAWS["variances"].sample(10, noise=Antithetic(Philox(1)))
    torch.testing.assert_close(pairs[::2] + pairs[1::2], 2 * LAWS["variances"].mean.expand(5, 2), rtol=0, atol=1e-14)


def test_the_ring():
    ring = GaussianMixture.ring(4, 3.0, 0.5)
    torch.testing.assert_close(ring.means, t64([3.0, 0.0], [0.0, 3.0], [-3.0, 0.0], [0.0, -3.0]), rtol=0, atol=1e-15)
    assert float(ring.covs) == 0.25
    assert ring.weights.tolist() == [0.25] * 4


def test_numbers_and_arrays_are_tensors_in_double_precision():
    law = GaussianMixture([0.2, 0.8], np.array([[0.1], [0.7]]), 0.3)
    assert (law.weights.dtype, law.means.dtype, law.covs.dtype) == (D, D, D)
    assert law.weights.tolist() == [0.2, 0.8]
    assert float(law.covs) == 0.3
    assert float(RING.floor(VP(), torch.tensor([0.1, 0.3])).mean) == float(
        RING.floor(VP(), (float(np.float32(0.1)), float(np.float32(0.3)))).mean
    )


# Bad input

GAUSSIAN, MIXTURE = LAWS["gaussian"], LAWS["mixture"]
X = torch.zeros(4, 2, dtype=D)
BAD = {
    "mean a matrix": (lambda: Gaussian(X, X), ShapeError, r"`mean` must have shape \('d',\)"),
    "mean no tensor": (lambda: Gaussian("no", X), ArgumentTypeError, "`mean` must be a number or a tensor"),
    "mean infinite": (lambda: Gaussian(t64(math.inf), t64(1.0)), ArgumentError, "`mean` holds infinite"),
    "cov too small": (
        lambda: Gaussian(t64(0.0, 0.0), t64(1.0)),
        ShapeError,
        r"`cov` must have shape \(2,\) or \(2, 2\), got \(1,\)",
    ),
    "cov a number": (lambda: Gaussian(t64(0.0, 0.0), torch.tensor(1.0)), ShapeError, "`cov` must have shape"),
    "cov zero": (
        lambda: Gaussian(t64(0.0, 0.0), t64(1.0, 0.0)),
        ArgumentError,
        "`cov` must hold positive variances, got 0",
    ),
    "cov indefinite": (
        lambda: Gaussian(t64(0.0, 0.0), t64([1.0, 2.0], [2.0, 1.0])),
        ArgumentError,
        "least eigenvalue -1",
    ),
    "cov lopsided": (
        lambda: Gaussian(t64(0.0, 0.0), t64([1.0, 0.2], [0.1, 1.0])),
        ArgumentError,
        "`cov` must be symmetric",
    ),
    "weights negative": (
        lambda: GaussianMixture(t64(1.5, -0.5), MEANS[:2], torch.tensor(1.0)),
        ArgumentError,
        "`weights` must be >= 0",
    ),
    "weights short": (lambda: GaussianMixture(t64(0.5, 0.4), MEANS[:2], torch.tensor(1.0)), ArgumentError, "sum to 1"),
    "weights NaN": (
        lambda: GaussianMixture(t64(0.5, math.nan), MEANS[:2], torch.tensor(1.0)),
        ArgumentError,
        "`weights` holds infinite or NaN",
    ),
    "means of others": (
        lambda: GaussianMixture(t64(0.5, 0.5), MEANS, torch.tensor(1.0)),
        ShapeError,
        r"`means` must have shape \(2, 'd'\)",
    ),
    "covs of others": (
        lambda: GaussianMixture(t64(0.5, 0.5), MEANS[:2], t64(1.0, 1.0)),
        ShapeError,
        r"`covs` must have shape \(\) or \(2, 2\)",
    ),
    "covs zero": (
        lambda: GaussianMixture(t64(0.5, 0.5), MEANS[:2], torch.tensor(0.0)),
        ArgumentError,
        "`covs` must hold positive",
    ),
    "no points": (lambda: Empirical(torch.zeros(0, 2)), ShapeError, "`points` must have shape"),
    "points a row": (lambda: Empirical(torch.zeros(3)), ShapeError, "`points` must have shape"),
    "x one row": (lambda: MIXTURE.score(X[0], VP(), 0.5), ShapeError, r"`x` must have shape \(B, 2\)"),
    "x too wide": (lambda: GAUSSIAN.denoiser(VP()).x0(X, 0.5), ShapeError, r"`x` must have shape \(B, 3\)"),
    "flow of x too narrow": (
        lambda: GAUSSIAN.flow(X[:, :1], VP(), 0.5, 0.1),
        ShapeError,
        r"`x` must have shape \(B, 3\)",
    ),
    "times of others": (lambda: MIXTURE.score(X, VP(), t64(0.5, 0.5)), ShapeError, "`t` must have shape"),
    "time outside": (lambda: MIXTURE.score(X, VP(), 2.0), GridError, "outside"),
    "points without noise": (
        lambda: LAWS["points"].log_density(X, VP(), 0.0),
        GridError,
        "`t` holds a time without noise",
    ),
    "thin without noise": (lambda: LAWS["thin"].score(X, VP(), 0.0), GridError, "`t` holds a time without noise"),
    "denoiser without noise": (lambda: MIXTURE.denoiser(VP()).eps(X, 0.0), GridError, "`t` holds a time without noise"),
    "floor without noise": (lambda: GAUSSIAN.floor(VP(), 0.0), GridError, "`t` holds a time without noise"),
    "floor backwards": (lambda: MIXTURE.floor(VP(), (0.5, 0.2)), GridError, r"`t` must be one time, a range"),
    "floor of a diverging weight": (
        lambda: GAUSSIAN.floor(VP(), weight=likelihood_weight),
        ArgumentError,
        "give a range of times",
    ),
    "floor of nothing": (
        lambda: MIXTURE.floor(VP(), 0.5, n_samples=0),
        ArgumentError,
        "`n_samples` must be at least 2, got 0",
    ),
    "no draws": (lambda: MIXTURE.sample(0, 1), ArgumentError, "`n` must be at least 1, got 0"),
    "half a draw": (lambda: MIXTURE.sample(1.5, 1), ArgumentTypeError, "`n` must be an int"),
    "no seed": (lambda: MIXTURE.sample(3, "seed"), ArgumentTypeError, "`seed` must be an int"),
    "no noise": (lambda: MIXTURE.sample(3, noise="seed"), ArgumentTypeError, "`noise` must be a noise source"),
    "seed and noise": (lambda: MIXTURE.sample(3, 1, noise=Philox(1)), ArgumentError, "not both"),
    "a path before the first": (lambda: MIXTURE.sample(3, 1, first_path=-1), ArgumentError, "`first_path`"),
    "integers": (lambda: MIXTURE.score(X.long(), VP(), 0.5), DtypeError, "`x` must be floating"),
    "a ring of text": (lambda: GaussianMixture.ring(std="0.1"), ArgumentTypeError, "`std` must be a number"),
    "slopes of text": (lambda: MIXTURE.tilt("up"), ArgumentTypeError, "`a` must be"),
    "slope of others": (lambda: MIXTURE.tilt(t64(1.0)), ShapeError, r"`a` must have shape \(2,\)"),
    "slopes of others": (
        lambda: Gaussian(t64(0.0, 0.0), t64(1.0, 1.0)).tilt(t64(1.0)),
        ShapeError,
        r"`a` must have shape \(2,\)",
    ),
    "no law": (lambda: Exact(VP(), VP()), ArgumentTypeError, "`law` must be a law"),
    "no schedule": (lambda: MIXTURE.denoiser(VP), ArgumentTypeError, "`schedule` must be a Schedule"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=list(BAD))
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert type(caught.value) is error
