"""Randomness of training and denoising losses, against closed forms of a Gaussian, quadrature and finite differences.

Expectations over x_0 and eps are Gauss-Hermite sums, exact for the polynomials they are taken of, so that most numbers here
have no sampling error. Statistical tests have fixed seeds; 4 standard errors are a false alarm once in 16 000, and so is a
p-value of 6e-5.
"""

import math
import pickle
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from torch import nn

from sdesens import Philox
from sdesens.diffusion import EDM, VE, VP, CondOT, Cosine, Denoiser, Guided, LogSNR, Predictor, SubVP, Table
from sdesens.diffusion.conversions import PREDICTIONS, combination, combine
from sdesens.diffusion.draws import draw_noise, draw_uniforms, keep_label, lognormal_times, uniform_times
from sdesens.diffusion.losses import Loss, dsm_loss, prior_term, step_cost, vlb
from sdesens.diffusion.streams import DROP, NOISE, TIMES, TURN
from sdesens.diffusion.weights import edm_weight, likelihood_weight, min_snr_weight, simple_weight, weight_on
from sdesens.errors import ArgumentError, ArgumentTypeError, DtypeError, GridError, ShapeError

D = torch.float64
RARE = 6e-5  # the two-sided tail beyond 4 standard errors
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=D)
SCHEDULES = [
    VP(),
    Cosine(),
    SubVP(),
    VE(),
    EDM(),
    CondOT(end=0.999),
    Table.from_betas(BETAS),
    LogSNR(lambda t, p: 10 - 20 * t),
]
ZERO_SNR = [CondOT(), Cosine(min_log_snr=-math.inf), Table.from_betas(torch.cat((BETAS[:-1], torch.ones(1, dtype=D))))]
# a table's velocity says nothing about x0 at its end, where alpha' is zero with alpha
AT_ZERO_SNR = [(s, o) for s in ZERO_SNR for o in ("v", "x0", "velocity") if o != "velocity" or not isinstance(s, Table)]
WEIGHTS = {
    "simple": simple_weight,
    "likelihood": likelihood_weight,
    "min_snr": min_snr_weight(5.0),
    "edm": edm_weight(0.7),
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
each_weight = pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)


# The randomness of training


def test_noise_is_where_the_core_says_it_is():
    """Item i of step k is path 2^32 k + i of its stream, up to the last one there is."""
    for step, first in ((0, 0), (5, 3), (2**31 - 1, 2**32 - 2)):
        z = draw_noise(11, step, (2, 4, 3), first_item=first, dtype=D)
        cpu = torch.device("cpu")
        core = Philox(11, NOISE).normals(step * 2**32 + first, 2, 0, 1, 12, dtype=D, device=cpu)
        assert torch.equal(z.flatten(1), core[0])


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_no_number_depends_on_how_the_batch_is_split(ranks):
    """The whole batch of 24, and the pieces that ranks (or accumulation) see, bit for bit."""
    B, step = 24, 17
    starts = range(0, B, B // ranks)
    whole = {
        "noise": draw_noise(3, step, (B, 2, 5)),
        "u": draw_uniforms(3, step, B),
        "keep": keep_label(3, step, B, 0.5),
    }
    n = B // ranks
    parts = {
        "noise": torch.cat([draw_noise(3, step, (n, 2, 5), first_item=i) for i in starts]),
        "u": torch.cat([draw_uniforms(3, step, n, first_item=i, total=B) for i in starts]),
        "keep": torch.cat([keep_label(3, step, n, 0.5, first_item=i) for i in starts]),
    }
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_dtypes_see_the_same_noise():
    z = draw_noise(3, 1, (64, 7), dtype=D)
    # |z| < 6.7 rounded a few times: 4 units in the last place
    for dtype in (torch.float32, torch.bfloat16):
        low = draw_noise(3, 1, (64, 7), dtype=dtype)
        assert low.dtype == dtype
        assert float((low.double() - z).abs().max()) < 4 * 6.7 * torch.finfo(dtype).eps
    assert draw_noise(3, 1, (0, 7)).shape == (0, 7)
    assert torch.equal(draw_noise(3, 1, (5,), dtype=D), draw_noise(3, 1, (5, 1), dtype=D)[:, 0])


def test_no_number_is_used_twice():
    """Seeds, steps, items, entries and purposes: 64-bit numbers that must all differ (a chance collision: 1e-11)."""
    rows = [draw_noise(s, k, (50, 4), dtype=D).flatten() for s in (1, 2) for k in (0, 1, 2, 1000)]
    for stream in (TIMES, TURN, DROP):
        rows.append(Philox(1, stream).normals(0, 50, 0, 1, 4, dtype=D, device=torch.device("cpu")).flatten())
    z = torch.cat(rows)
    assert len(z.unique()) == len(z) == 2200
    # keyed by step + item instead, step 1 would be step 0 moved by one item
    assert not torch.equal(draw_noise(1, 1, (50, 4))[:-1], draw_noise(1, 0, (50, 4))[1:])


def test_several_steps_at_once_are_those_steps():
    steps = range(5, 9)
    together = draw_noise(3, steps, (6, 2, 5)), draw_uniforms(3, steps, 6), keep_label(3, steps, 6, 0.5)
    one_by_one = [(draw_noise(3, k, (6, 2, 5)), draw_uniforms(3, k, 6), keep_label(3, k, 6, 0.5)) for k in steps]
    for many, singles in zip(together, zip(*one_by_one, strict=True), strict=True):
        assert torch.equal(many, torch.stack(singles))
    for wrong in (range(0), range(4, 2), range(0, 4, 2), range(-1, 2), range(2**31, 2**31 + 1)):
        with pytest.raises(ArgumentError, match="neighbouring steps"):
            draw_noise(3, wrong, (6,))


def test_normals_are_normal_and_purposes_independent():
    n = 40_000
    z = draw_noise(5, 3, (n, 2), dtype=D)
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > RARE
    u, keep = draw_uniforms(5, 3, n), keep_label(5, 3, n, 0.5).double()
    later = draw_noise(5, 4, (n, 1), dtype=D)[:, 0]
    columns = torch.stack([z[:, 0], z[:, 1], z[:, 0].roll(1), later, u, keep])
    off = torch.corrcoef(columns) - torch.eye(6, dtype=D)
    assert float(off.abs().max()) < 4 / math.sqrt(n)  # 15 correlations, each of standard error 1/sqrt(n)


@pytest.mark.parametrize("total", [1, 2, 7, 256, 1000])
def test_each_stratum_holds_one_time(total):
    for step in range(5):
        u = draw_uniforms(9, step, total).sort().values
        edges = torch.arange(total + 1, dtype=D) / total
        assert bool(((edges[:-1] <= u) & (u <= edges[1:])).all())
        # within its stratum each is uniform
    inside = torch.cat([draw_uniforms(9, step, total).sort().values * total % 1 for step in range(2000 // total + 1)])
    assert stats.kstest(inside.numpy(), "uniform").pvalue > RARE


def test_every_item_sees_all_times():
    """One item of a batch of 4 over 2 000 steps: uniform in (0, 1), not bound to a quarter of it by its place."""
    for item in (0, 3):
        u = torch.cat([draw_uniforms(2, step, 1, first_item=item, total=4) for step in range(2000)])
        assert stats.kstest(u.numpy(), "uniform").pvalue > RARE
        assert stats.kstest((u[1:] - u[:-1]).remainder(1.0).numpy(), "uniform").pvalue > RARE  # steps are independent


def test_stratified_times_reduce_the_variance_as_they_should():
    """Mean of e^u over N = 16 items: bias, and variance against the exact one, sum of the variances in the strata / N^2."""
    N, R = 16, 3000
    u = torch.stack([draw_uniforms(4, step, N) for step in range(R)])
    means = u.exp().mean(1)
    edges = np.arange(N + 1) / N
    first, second = N * np.diff(np.exp(edges)), N * np.diff(np.exp(2 * edges)) / 2
    exact = float((second - first**2).sum() / N**2)
    assert abs(float(means.mean()) - (math.e - 1)) < 4 * math.sqrt(exact / R)
    # a variance from R means close to normal (kurtosis 3 - 1.2/N) has the relative standard error sqrt(2/R) = 2.6 %
    assert abs(float(means.var()) / exact - 1) < 4 * math.sqrt(2 / R)
    independent = ((math.e**2 - 1) / 2 - (math.e - 1) ** 2) / N  # the control: without strata
    assert independent / exact > 200  # 233
    v = torch.special.ndtr(draw_noise(4, 0, (R, N), dtype=D)).exp().mean(1).var()
    assert abs(float(v) / independent - 1) < 4 * math.sqrt(2 / R)


def test_labels_are_dropped_at_the_rate():
    n, rate = 50_000, 0.1
    dropped = float((~keep_label(1, 0, n, rate)).double().mean())
    assert abs(dropped - rate) < 4 * math.sqrt(rate * (1 - rate) / n)
    assert bool(keep_label(1, 0, n, 0.0).all())
    assert not bool(keep_label(1, 0, n, 1.0).any())
    # one set of uniforms: what is dropped at a low rate is dropped at a higher one
    assert not bool((~keep_label(1, 0, n, 0.1) & keep_label(1, 0, n, 0.3)).any())


def test_times_have_the_laws_they_are_named_after():
    u = torch.special.ndtr(draw_noise(8, 0, (20_000,), dtype=D))
    for schedule in (VP(), EDM()):
        t = uniform_times(schedule, u)
        assert stats.kstest(t.numpy() / schedule.t_max, "uniform", args=(1e-5, 1 - 1e-5)).pvalue > RARE
    for sd in (0.5, 1.42):
        t = lognormal_times(EDM(), u, sigma_data=sd)
        assert stats.kstest(t.log().numpy(), "norm", args=(-1.2 + math.log(sd / 0.5), 1.2)).pvalue > RARE
        # the same levels on every schedule that reaches them: the inverse log-SNR is good to rounding
        r = torch.exp(-VP().log_snr(lognormal_times(VP(), u, sigma_data=sd)) / 2)
        torch.testing.assert_close(r.clamp(max=80.0), t, rtol=1e-9, atol=0)


def test_levels_beyond_the_schedule_sit_at_its_ends():
    u = (torch.arange(10_000, dtype=D) + 0.5) / 10_000
    schedule = VE(sigma_min=0.1, sigma_max=1.0)
    t = lognormal_times(schedule, u)
    for end, z in ((1e-5, (math.log(0.1) + 1.2) / 1.2), (1.0, -1.2 / 1.2)):
        # quantiles of an even grid of u: good to one of them
        assert abs(float((t == end).double().mean()) - stats.norm.cdf(z)) <= 1e-4
    assert float(lognormal_times(VP(), torch.tensor([0.0, 1.0]))[0]) == 1e-5  # infinite levels too
    assert float(lognormal_times(VP(), torch.tensor([0.0, 1.0]))[1]) == 1.0


def test_bad_draws_say_what_is_wrong():
    with pytest.raises(ArgumentError, match="`step`"):
        draw_noise(1, 2**31, (2, 2))
    with pytest.raises(ArgumentError, match="`step`"):
        draw_uniforms(1, -1, 2)
    with pytest.raises(ArgumentTypeError, match=r"`step` must be an int, got 1\.0"):
        draw_noise(1, 1.0, (2, 2))
    with pytest.raises(ArgumentError, match="`n`"):
        draw_noise(1, 0, (2, 2), first_item=2**32 - 1)
    with pytest.raises(ArgumentError, match="`first_item`"):
        keep_label(1, 0, 2, 0.1, first_item=2**32)
    with pytest.raises(ShapeError, match="number of items"):
        draw_noise(1, 0, ())
    with pytest.raises(DtypeError, match="floating"):
        draw_noise(1, 0, (2,), dtype=torch.int64)
    with pytest.raises(ArgumentError, match="`total` is missing"):
        draw_uniforms(1, 0, 2, first_item=2)
    with pytest.raises(ArgumentError, match=r"items 2 \.\.\. 5 do not fit"):
        draw_uniforms(1, 0, 4, first_item=2, total=4)
    for shape in (4, "4", (2.0, 3), (2, "3")):
        with pytest.raises(ArgumentTypeError, match="`shape`"):
            draw_noise(1, 0, shape)
    for rate, error in ((1.5, ArgumentError), (math.nan, ArgumentError), ("0.1", ArgumentTypeError)):
        with pytest.raises(error, match="`rate`"):
            keep_label(1, 0, 2, rate)
    with pytest.raises(ArgumentTypeError, match="`u`"):
        uniform_times(VP(), 0.5)
    with pytest.raises(ArgumentError, match="`u`"):
        uniform_times(VP(), torch.tensor([0.5, math.nan]))
    with pytest.raises(GridError, match="`t_min`"):
        uniform_times(VP(), torch.tensor([0.5]), t_min=1.0)
    with pytest.raises(ArgumentError, match="`std`"):
        lognormal_times(VP(), torch.tensor([0.5]), std=0.0)
    with pytest.raises(ArgumentError, match="`sigma_data`"):
        lognormal_times(VP(), torch.tensor([0.5]), sigma_data=-1.0)
    for name in ("t_min", "mean", "std", "sigma_data"):  # text that float() would read
        with pytest.raises(ArgumentTypeError, match=f"`{name}` must be a number"):
            lognormal_times(VP(), torch.tensor([0.5]), **{name: "0.1"})
    with pytest.raises(ArgumentTypeError, match=r"`schedule` must be a Schedule such as VP\(\)"):
        uniform_times(VP, torch.tensor([0.5]))


# The loss of the exact denoiser of N(m, s^2)


@dataclass(frozen=True, eq=False)
class Exact(Predictor):
    """E[x_0 | x_t] and E[eps | x_t] for x_0 ~ N(m, s^2) in every dimension."""

    schedule: object
    m: float = 0.3
    s: float = 0.6

    params = property(lambda self: self.schedule.params)

    def with_params(self, p):
        return replace(self, schedule=self.schedule.with_params(p))

    def pair(self, x, t):
        a, sigma = (c(t).reshape(-1, *[1] * (x.dim() - 1)) for c in (self.schedule.alpha, self.schedule.sigma))
        y = (x - a * self.m) / (a**2 * self.s**2 + sigma**2)
        return self.m + a * self.s**2 * y, sigma * y

    def floor(self, t):
        """E |eps - E[eps | x_t]|^2."""
        a2, s2 = self.schedule.alpha(t) ** 2, self.schedule.sigma(t) ** 2
        return a2 * self.s**2 / (a2 * self.s**2 + s2)

    def expressed(self, prediction: str) -> Denoiser:
        """The same, by a network with this output."""

        def net(x, t):
            return combine(*self.pair(x, t), combination(prediction, self.schedule, t))

        return Denoiser(net, self.schedule, prediction)

    def preconditioned(self, sd: float) -> Denoiser:
        def net(inputs, c_noise):
            r = torch.exp(4 * c_noise).reshape(-1, *[1] * (inputs.dim() - 1))
            z = inputs * torch.sqrt(r**2 + sd**2)
            x0 = self.m + self.s**2 / (self.s**2 + r**2) * (z - self.m)
            return (x0 - sd**2 / (r**2 + sd**2) * z) / (r * sd / torch.sqrt(r**2 + sd**2))

        return Denoiser(net, self.schedule, sigma_data=sd)


def nodes(law: Exact, n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_0 and eps (n^2, 1), and weights (n^2,): exact for polynomials of degree 2 n - 1 in each."""
    z, w = (torch.tensor(a, dtype=D) for a in np.polynomial.hermite_e.hermegauss(n))
    w = w / w.sum()
    x0, eps = torch.meshgrid(law.m + law.s * z, z, indexing="ij")
    return x0.reshape(-1, 1), eps.reshape(-1, 1), torch.outer(w, w).flatten()


def expected(law: Exact, denoiser: Predictor, t: torch.Tensor, weight, n: int = 3) -> torch.Tensor:
    """E loss at each of the times t (T,)."""
    x0, eps, w = nodes(law, n)
    T, N = len(t), len(w)
    found = dsm_loss(denoiser, x0.repeat(T, 1), t.repeat_interleave(N), eps.repeat(T, 1), weight=weight)
    return found.loss.reshape(T, N) @ w


def times(schedule, n: int = 12) -> torch.Tensor:
    return torch.linspace(0.003, 1.0, n, dtype=D) * schedule.t_max


@each_weight
@each_schedule
def test_the_same_predictor_has_the_same_loss_whatever_its_network_returns(schedule, weight):
    law = Exact(schedule)
    t = times(schedule)
    x0 = law.m + law.s * draw_noise(1, 0, (12, 2, 3), dtype=D)
    eps = draw_noise(1, 1, (12, 2, 3), dtype=D)
    wanted = dsm_loss(law, x0, t, eps, weight=weight)
    by_hand = (law.eps(schedule.reparameterise(x0, t, eps), t) - eps).square().mean((1, 2))
    # SNR goes down to 2e-9 (Cosine), |eps - eps_hat| to 3e-5 of |eps|, and its square keeps 2e-16 / 3e-5 = 1e-11 or so
    torch.testing.assert_close(wanted.eps_error, by_hand, rtol=1e-10, atol=0)
    torch.testing.assert_close(wanted.log_snr, schedule.log_snr(t), rtol=0, atol=0)
    networks = [law.expressed(prediction) for prediction in PREDICTIONS]
    for network in (*networks, law.preconditioned(0.6), law.preconditioned(1.7)):
        found = dsm_loss(network, x0, t, eps, weight=weight)
        for name, a, b in zip(Loss._fields, found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=0, msg=f"{network.prediction}, {name}")
    guided = dsm_loss(Guided(networks[2], networks[0], 1.0), x0, t, eps, weight=weight)
    torch.testing.assert_close(guided.loss, wanted.loss, rtol=1e-10, atol=0)


@each_weight
@each_schedule
def test_the_exact_denoiser_stands_on_the_floor(schedule, weight):
    """E loss = w(lambda) alpha^2 s^2/(alpha^2 s^2 + sigma^2), for every prediction."""
    law, t = Exact(schedule), times(schedule)
    rate = -schedule.t_max * schedule.log_snr_rate(t)
    floor = weight(schedule.log_snr(t), rate) * law.floor(t)
    for network in (law, *(law.expressed(o) for o in PREDICTIONS), law.preconditioned(0.5)):
        # the loss is a polynomial of degree 2, so the sum over nodes is exact; rounding as above
        torch.testing.assert_close(expected(law, network, t, weight), floor, rtol=1e-9, atol=0)


def test_floors_of_uniform_times():
    """Published to four digits for N(0, 1): 0.2760 (VP) and 1/2 (cosine)."""
    x, w = np.polynomial.legendre.leggauss(64)
    u, w = torch.tensor((x + 1) / 2), torch.tensor(w / 2)
    found = {}
    for schedule in (VP(), Cosine()):
        law = Exact(schedule, 0.0, 1.0)
        t = uniform_times(schedule, u, t_min=0.0)
        found[type(schedule).__name__] = float(expected(law, law.expressed("v"), t, simple_weight) @ w)
    exact = quad(lambda t: math.exp(-t * (0.1 + 9.95 * t)), 0, 1, epsabs=1e-13)[0]
    assert found["VP"] == pytest.approx(exact, abs=1e-12)  # 64 nodes: an entire function, to rounding
    assert found["VP"] == pytest.approx(0.2760, abs=5e-5)
    assert found["Cosine"] == pytest.approx(0.5, abs=3e-5)  # t_max = 1 - 2.9e-5


@each_weight
def test_what_is_above_the_floor_is_the_distance_to_the_exact_denoiser(weight):
    """Vincent's identity, and its gradient, for a quadratic network: E loss - floor = w E|eps_theta(x) - E[eps | x]|^2."""
    schedule = VP()
    law, t = Exact(schedule), torch.tensor([0.1, 0.4, 0.8], dtype=D)
    theta = torch.tensor([0.3, -0.2, 0.5], dtype=D, requires_grad=True)

    def net(x, t):
        return theta[0] + theta[1] * x * t[:, None] + theta[2] * x**2

    above = expected(law, Denoiser(net, schedule, "eps"), t, weight, n=3) - expected(law, law, t, weight)
    z, w = (torch.tensor(a, dtype=D) for a in np.polynomial.hermite_e.hermegauss(5))
    V = (schedule.alpha(t) * law.s) ** 2 + schedule.sigma(t) ** 2
    x = (schedule.alpha(t) * law.m)[:, None] + V.sqrt()[:, None] * z  # (T, 5): the law of x_t
    off = torch.stack([net(x[:, k : k + 1], t) - law.eps(x[:, k : k + 1], t) for k in range(5)], 1)[..., 0]
    distance = (off**2 @ (w / w.sum())) * weight(schedule.log_snr(t), -schedule.log_snr_rate(t))
    torch.testing.assert_close(above, distance, rtol=1e-12, atol=1e-12)  # degree 4 in each node: exact
    gradients = [torch.autograd.grad(y.sum(), theta)[0] for y in (above, distance)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


# Weights


def published(t: np.ndarray, gamma: float, sd: float) -> dict[str, dict[str, np.ndarray]]:
    """The table of weights for VP(0.1, 20), from B = -log alpha^2 alone."""
    B, beta = t * (0.1 + 9.95 * t), 0.1 + 19.9 * t
    snr, alpha2, sigma2 = 1 / np.expm1(B), np.exp(-B), -np.expm1(-B)
    rate = beta / sigma2  # -lambda' = g^2 / sigma^2
    r2 = 1 / snr
    w = {
        "simple": 1 + 0 * t,
        "likelihood": rate / 2,
        "min_snr": np.minimum(snr, gamma) / snr,
        "edm": (r2 + sd**2) / sd**2,
    }
    on_x0 = {
        "simple": snr,
        "likelihood": rate * snr / 2,  # -SNR'/2
        "min_snr": np.minimum(snr, gamma),
        "edm": (r2 + sd**2) / (r2 * sd**2),
    }
    on_v = {
        "simple": snr / (snr + 1),
        "likelihood": rate * alpha2 / 2,
        "min_snr": np.minimum(snr, gamma) / (snr + 1),
        "edm": (r2 + sd**2) / sd**2 * alpha2,
    }
    return {
        "eps": w,
        "x0": on_x0,
        "v": on_v,
        "score": {k: v * sigma2 for k, v in w.items()},  # |d eps| = sigma |d s|
        "velocity": {k: v / (sigma2 * rate**2 / 4) for k, v in w.items()},  # |d u| = sigma lambda'/2 |d eps|
    }


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_table_of_weights(prediction):
    t = np.geomspace(1e-4, 1, 60)
    table = published(t, 5.0, 0.7)[prediction]
    for name, weight in WEIGHTS.items():
        found = weight_on(weight, prediction, VP(), torch.tensor(t))
        # lambda, |lambda| < 12, and its exponential: 12 units of rounding, or 3e-15, and a few more for D
        np.testing.assert_allclose(found.numpy(), table[name], rtol=1e-13, err_msg=name)


def test_min_snr_on_v_is_not_the_weight_on_x0_over_snr():
    """Negative control: dividing by SNR instead of SNR + 1, a mistake that trainers shipped, is far off."""
    t = VP().t_of_log_snr(torch.tensor([-4.0, 0.0], dtype=D))
    snr = torch.exp(VP().log_snr(t))
    found = weight_on(min_snr_weight(5.0), "v", VP(), t)
    torch.testing.assert_close(found, snr / (snr + 1), rtol=1e-12, atol=0)
    assert bool((snr.clamp(max=5.0) / snr / found > 1.9).all())


@each_schedule
def test_weights_on_any_schedule(schedule):
    """On v it is w SNR/(SNR + 1) everywhere, v being scaled to unit variance; the rate is that of t/t_max."""
    t = times(schedule) - 0.0003  # off the knots of a table of 1 000 steps
    snr = torch.exp(schedule.log_snr(t))
    for weight in WEIGHTS.values():
        w = weight_on(weight, "eps", schedule, t)
        torch.testing.assert_close(weight_on(weight, "v", schedule, t), w * snr / (snr + 1), rtol=1e-12, atol=0)
        torch.testing.assert_close(weight_on(weight, "x0", schedule, t), w * snr, rtol=1e-12, atol=0)
    h = 1e-5 * t  # truncation h^2 = 1e-10 relative, times the few units that third derivatives add
    inside = t < 0.99 * schedule.t_max
    lost = (schedule.log_snr((t - h)[inside]) - schedule.log_snr((t + h)[inside])) / (2 * h[inside] / schedule.t_max)
    rate = 2 * weight_on(likelihood_weight, "eps", schedule, t)[inside]
    torch.testing.assert_close(rate, lost, rtol=1e-8, atol=0)


@pytest.mark.parametrize("schedule", [EDM(), VP()], ids=["EDM", "VP"])
def test_edm_weights_the_output_of_a_preconditioned_network_by_one(schedule):
    sd, t = 0.5, times(schedule)
    x0, eps = sd * draw_noise(2, 0, (12, 3), dtype=D), draw_noise(2, 1, (12, 3), dtype=D)
    denoiser = Denoiser(lambda x, c: torch.tanh(x - c[:, None]), schedule, sigma_data=sd)
    found = dsm_loss(denoiser, x0, t, eps, weight=edm_weight(sd)).loss
    r = (schedule.sigma(t) / schedule.alpha(t))[:, None]
    z, n = x0 + r * eps, torch.sqrt(r**2 + sd**2)
    F, target = torch.tanh(z / n - r.log() / 4), (x0 - sd**2 / n**2 * z) * n / (r * sd)
    torch.testing.assert_close(found, (F - target).square().mean(1), rtol=1e-12, atol=0)
    assert not torch.allclose(dsm_loss(denoiser, x0, t, eps, weight=edm_weight(0.6)).loss, found, rtol=1e-2)


def test_weights_can_be_kept_and_written_by_hand():
    for weight in WEIGHTS.values():
        again = pickle.loads(pickle.dumps(weight))
        log_snr, rate = torch.tensor([-3.0, 4.0], dtype=D), torch.tensor([1.0, 2.0], dtype=D)
        assert torch.equal(again(log_snr, rate), weight(log_snr, rate))
    own = weight_on(lambda log_snr, rate: torch.sigmoid(-log_snr), "x0", VP(), 0.3)
    torch.testing.assert_close(own, torch.sigmoid(VP().log_snr(0.3)), rtol=1e-13, atol=0)


# The bound


def closed_bound(law: Exact, t0: float) -> float:
    """E of the bound for the exact denoiser: entropy of N(m, s^2 + r_0^2) + KL(p_T || prior)."""
    r2 = float(torch.exp(-law.schedule.log_snr(t0)))
    gap = float(law.schedule.prior_gap(mean=law.m, cov=law.s**2))
    return 0.5 * math.log(2 * math.pi * math.e * (law.s**2 + r2)) + gap


@pytest.mark.parametrize("schedule", SCHEDULES[:6], ids=lambda s: type(s).__name__)
def test_likelihood_weight_gives_the_entropy(schedule):
    """Prior term + integral over t of the weighted loss + decoder = -E log p(x_0), by quadrature in log t."""
    law, t0 = Exact(schedule), 1e-5 * schedule.t_max
    x, w = np.polynomial.legendre.leggauss(20)
    edges = np.linspace(math.log(t0), math.log(schedule.t_max), 41)
    log_t = torch.tensor(np.concatenate([(b - a) / 2 * x + (a + b) / 2 for a, b in pairwise(edges)]))
    w = torch.tensor(np.tile(w, 40) * (edges[1] - edges[0]) / 2)
    t = log_t.exp().clamp(max=schedule.t_max)
    integral = float(expected(law, law.expressed("v"), t, likelihood_weight) @ (w * t)) / schedule.t_max
    x0, _, weights = nodes(law)
    prior = float(prior_term(schedule, x0) @ weights)
    decoder = 0.5 * (math.log(2 * math.pi) + 1 - float(schedule.log_snr(t0)))
    # 40 panels of 20 nodes: to rounding of terms that cancel, up to 1e3 (the prior term of EDM) x 1e-16 and sums of 800
    assert prior + integral + decoder == pytest.approx(closed_bound(law, t0), abs=1e-9)
    entropy = 0.5 * math.log(2 * math.pi * math.e * law.s**2)
    if type(schedule) is VP:  # r_0^2/(2 s^2) = 1.4e-6, and (alpha_T m)^2/2 = 1.9e-6 of a prior gap
        assert prior + integral + decoder == pytest.approx(entropy, abs=4e-6)


@pytest.mark.parametrize("schedule", [*SCHEDULES[:6], CondOT()], ids=repr)
def test_vlb_is_unbiased(schedule):
    """E over x_0, eps and u of one sample, by quadrature in all three."""
    law, t0 = Exact(schedule), 1e-5 * schedule.t_max
    x, w = np.polynomial.legendre.leggauss(80)
    u, wu = torch.tensor((x + 1) / 2), torch.tensor(w / 2)
    x0, eps, wx = nodes(law)
    each = vlb(law.expressed("v"), x0.repeat(80, 1), u.repeat_interleave(9), eps.repeat(80, 1)).reshape(80, 9)
    # a sigmoid in log-SNR over at most 54 units: 80 nodes have error exp(-2 x 80 x 3.14/27) = 8e-9
    assert float(wu @ each @ wx) == pytest.approx(closed_bound(law, t0), abs=1e-7)


def test_vlb_of_drawn_items_and_of_a_wrong_model():
    schedule, n = VP(), 40_000
    law, wrong = Exact(schedule), Exact(schedule, s=4.0)
    x0, eps, u = (
        law.m + law.s * draw_noise(6, 0, (n, 2), dtype=D),
        draw_noise(6, 1, (n, 2), dtype=D),
        draw_uniforms(6, 1, n),
    )
    for model in (law, wrong):
        found = vlb(model, x0, u, eps)
        # the strata only help: the standard error of independent items is an upper bound
        se = float(found.std()) / math.sqrt(n)
        excess = 0.5 * quad(lambda lam, s=model.s: distance(law, s, lam), float(schedule.log_snr(1.0)), 14.0)[0]
        assert abs(float(found.mean()) - 2 * (closed_bound(law, 1e-5) + excess)) < 4 * se
    assert 2 * excess > 10 * se  # the wrong model is seen to be wrong


def distance(law: Exact, s: float, lam: float) -> float:
    """E|eps_hat - E[eps | x_t]|^2 of the denoiser for N(m, s^2), at a log-SNR."""
    a2, s2 = 1 / (1 + math.exp(-lam)), 1 / (1 + math.exp(lam))
    V, W = a2 * law.s**2 + s2, a2 * s**2 + s2
    return V * s2 * (1 / V - 1 / W) ** 2


@each_schedule
def test_prior_term(schedule):
    x0 = torch.linspace(-2, 2, 12, dtype=D).reshape(2, 2, 3)
    T = schedule.t_max
    q = torch.distributions.Normal(schedule.alpha(T) * x0, schedule.sigma(T))
    p = torch.distributions.Normal(0.0, schedule.prior_std)
    wanted = torch.distributions.kl_divergence(q, p).flatten(1).sum(1)
    # theirs is a difference of numbers of order one: rounding 1e-15 in absolute terms
    torch.testing.assert_close(prior_term(schedule, x0), wanted, rtol=1e-12, atol=1e-14)
    ones = torch.ones(1, 7, dtype=D)
    # one formula; sums of seven
    torch.testing.assert_close(prior_term(schedule, ones)[0] / 7, schedule.prior_gap(), rtol=1e-14, atol=0)


def test_the_prior_term_of_almost_nothing():
    """Of the origin, v = 1 - alpha^2: (v - 1 - log v)/2 = alpha^4/4 (1 + 2 alpha^2/3 + ...), 1e-18 nats at log-SNR -20."""
    schedule = Cosine()
    small = float(schedule.alpha(schedule.t_max)) ** 4 / 4
    # alpha^2 = 2e-9 is a difference of sigma and 1 here, rounded by 2^-53
    for found in (schedule.prior_gap(mean=0.0, cov=0.0), prior_term(schedule, torch.zeros(1, 1, dtype=D))[0]):
        assert float(found) == pytest.approx(small, rel=2 * 2**-53 / 2e-9)


@each_schedule
def test_step_cost_is_the_divergence_of_posteriors(schedule):
    """KL of two Gaussians with the variance sigma_u^2 q and means that differ by alpha_u q (x0 - x0_hat)."""
    t = times(schedule)
    early, late = t[:-1], t[1:]
    q = -torch.expm1(schedule.log_snr(late) - schedule.log_snr(early))
    wanted = (schedule.alpha(early) * q) ** 2 / (2 * schedule.sigma(early) ** 2 * q)
    torch.testing.assert_close(step_cost(schedule, late, early), wanted, rtol=1e-11, atol=0)


def test_discrete_bound_goes_to_the_continuous_one():
    """Sum over N steps of step_cost x E|x0 - x0_hat|^2 from above, at order 1 in the step of log-SNR."""
    law = Exact(VP())
    low, high = float(VP().log_snr(1.0)), 10.0
    exact = 0.5 * (math.log1p(law.s**2 * math.exp(high)) - math.log1p(law.s**2 * math.exp(low)))
    errors = []
    for N in (256, 512, 1024, 2048):
        t = VP().t_of_log_snr(torch.linspace(low, high, N + 1, dtype=D))
        x0_error = law.floor(t[:-1]) * torch.exp(-VP().log_snr(t[:-1]))
        errors.append(float((step_cost(VP(), t[:-1], t[1:]) * x0_error).sum()) - exact)
    assert min(errors) > 0
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert max(abs(order - 1) for order in orders) < 0.05  # the next term is of relative size h = 0.06 at N = 256


# Gradients


class Net(nn.Module):
    """Two layers on (x, t), set by hand: nothing is drawn."""

    def __init__(self, dim: int, width: int = 8, dtype=D):
        super().__init__()
        self.first, self.last = nn.Linear(dim + 1, width), nn.Linear(width, dim)
        self.to(dtype)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.sin(torch.arange(p.numel()) * 1.3 + i).reshape(p.shape))

    def forward(self, x, t):
        return self.last(torch.tanh(self.first(torch.cat((x, t[:, None]), 1))))


def data(B: int, dim: int, dtype=D) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u = draw_uniforms(3, 0, B)
    return draw_noise(3, 1, (B, dim), dtype=dtype), uniform_times(VP(), u), draw_noise(3, 0, (B, dim), dtype=dtype)


@each_weight
@pytest.mark.parametrize("prediction", [*PREDICTIONS, None])
def test_gradient_in_the_network_against_finite_differences(prediction, weight):
    net = Net(2)
    denoiser = Denoiser(net, VP(), prediction, sigma_data=None if prediction else 0.8)
    x0, t, eps = data(16, 2)
    t = t.clamp_min(0.02)
    gradient = torch.autograd.grad(dsm_loss(denoiser, x0, t, eps, weight=weight).loss.mean(), list(net.parameters()))
    move = {k: torch.cos(torch.arange(v.numel(), dtype=D)).reshape(v.shape) for k, v in net.named_parameters()}

    def loss(h: float) -> float:
        p = {f"net.{k}": (v + h * move[k]).detach() for k, v in net.named_parameters()}
        return float(dsm_loss(denoiser.with_params(p), x0, t, eps, weight=weight).loss.mean())

    along = sum(float((g * m).sum()) for g, m in zip(gradient, move.values(), strict=True))
    h = 1e-4  # truncation h^2 f'''/6, which the step of the fourth-order formula removes; rounding 1e-16 / h = 1e-12
    difference = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    assert along == pytest.approx(difference, rel=1e-8)
    assert abs(along) > 1e-6 * loss(0.0)


@each_weight
def test_gradients_item_by_item(weight):
    """torch.func's transforms, item by item in a batch of one, against autograd's rows."""
    net, (x0, t, eps) = Net(2), data(5, 2)
    denoiser = Denoiser(net, VP(), "v")
    p = {f"net.{k}": v.detach() for k, v in net.named_parameters()}

    def loss(p, x0, t, eps):
        return dsm_loss(denoiser.with_params(p), x0[None], t[None], eps[None], weight=weight).loss[0]

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(p, x0, t, eps)
    losses = dsm_loss(denoiser, x0, t, eps, weight=weight).loss
    for k, v in net.named_parameters():
        rows = torch.stack([torch.autograd.grad(one, v, retain_graph=True)[0] for one in losses])
        torch.testing.assert_close(found[f"net.{k}"], rows, rtol=1e-11, atol=1e-12)  # rounding, in another order


@each_weight
def test_gradient_in_the_schedule_against_finite_differences(weight):
    x0, t, eps = data(16, 2)
    t = t.clamp_min(0.02)
    net = Net(2)

    def loss(beta) -> torch.Tensor:
        return dsm_loss(Denoiser(net, VP(beta_max=beta), "v"), x0, t, eps, weight=weight).loss.mean()

    beta = torch.tensor(20.0, dtype=D, requires_grad=True)
    gradient = torch.autograd.grad(loss(beta), beta)[0]
    h = 1e-3  # relative to beta 5e-5: truncation 2.5e-9, rounding 1e-16 / 5e-5
    with torch.no_grad():
        difference = (loss(beta + h) - loss(beta - h)) / (2 * h)
    assert float(gradient) == pytest.approx(float(difference), rel=1e-7)


# Items, ends and precision


def wave(x, t):
    """A network that works entry by entry."""
    return torch.tanh(x * (1 + t.reshape(-1, *[1] * (x.dim() - 1))))


def test_items_do_not_see_each_other():
    x0, eps = draw_noise(1, 0, (10, 2, 3)), draw_noise(1, 1, (10, 2, 3))
    t = uniform_times(VP(), draw_uniforms(1, 0, 10))
    loss = partial(dsm_loss, Denoiser(wave, VP(), "v"), weight=likelihood_weight)
    whole = loss(x0, t, eps)
    order = torch.tensor([3, 9, 0, 4, 1, 8, 2, 7, 6, 5])
    halves = [loss(x0[i], t[i], eps[i]) for i in (slice(0, 4), slice(4, 10))]
    for name, all_, shuffled, first, second in zip(
        Loss._fields, whole, loss(x0[order], t[order], eps[order]), *halves, strict=True
    ):
        assert torch.equal(all_[order], shuffled), name
        assert torch.equal(all_, torch.cat((first, second))), name
    # one time for all, and one number an item; the mean over an event is that of its entries
    flat = loss(x0.flatten(), t.repeat_interleave(6), eps.flatten()).loss.reshape(10, 6).mean(1)
    torch.testing.assert_close(flat, whole.loss, rtol=1e-6, atol=0)  # float32, sums of 6
    one = loss(x0, 0.4, eps)
    assert [x.shape for x in one] == [(10,)] * 3
    assert torch.equal(one.loss, loss(x0, torch.full((10,), 0.4, dtype=D), eps).loss)


@pytest.mark.parametrize(("schedule", "prediction"), AT_ZERO_SNR, ids=str)
def test_nothing_is_infinite_where_no_signal_is_left(schedule, prediction):
    t = torch.tensor([0.5, 1.0], dtype=D)
    slope = schedule.rates(1.0)[0] if prediction == "velocity" else 1.0
    # on v and x0 (sigma = 1): w SNR, which is 1/sd^2 for EDM's w and 0 for the others; on the velocity that over alpha'^2
    limit = {"simple": 0.0, "likelihood": 0.0, "min_snr": 0.0, "edm": float(1 / (0.7 * slope) ** 2)}
    before = schedule.t_of_log_snr(-40.0)
    for name, weight in WEIGHTS.items():
        found = weight_on(weight, prediction, schedule, t)[1]
        assert float(found) == pytest.approx(limit[name], rel=1e-9, abs=1e-7), name
        # the last digits of the signal, e^-20 = 2e-9, and a few for the rest
        assert float(weight_on(weight, prediction, schedule, before)) == pytest.approx(float(found), abs=1e-7), name
        scale = torch.tensor(0.9, dtype=D, requires_grad=True)
        for dtype in (torch.float32, D):
            x0, eps = draw_noise(1, 0, (2, 3), dtype=dtype), draw_noise(1, 1, (2, 3), dtype=dtype)
            denoiser = Denoiser(lambda x, t, p: p["s"] * x, schedule, prediction, parameters={"s": scale})
            loss = dsm_loss(denoiser, x0, t, eps, weight=weight).loss
            a, b = (c[1] for c in combination(prediction, schedule, t))
            wanted = limit[name] * (0.9 * eps[1] - a * x0[1] - b * eps[1]).square().mean()  # x is eps there
            torch.testing.assert_close(loss[1].double(), wanted.double(), rtol=1e-5, atol=1e-7)
            assert bool(torch.isfinite(torch.autograd.grad(loss.sum(), scale)[0]))


def test_the_weight_and_the_factor_alone_would_be_not_a_number():
    """Negative control: w is infinite at zero SNR, alpha / D zero."""
    end = torch.ones((), dtype=D)
    log_snr, rate = CondOT().log_snr(end), -CondOT().log_snr_rate(end)
    for weight in (edm_weight(0.7), likelihood_weight):
        assert math.isnan(float(weight(log_snr, rate) * CondOT().alpha(end) ** 2))


def test_predictors_without_a_network_are_finite_there_too():
    x0, eps, t = draw_noise(1, 0, (2, 3), dtype=D), draw_noise(1, 1, (2, 3), dtype=D), torch.tensor([0.5, 1.0], dtype=D)
    for prediction in ("v", "x0", "velocity"):
        denoiser = Denoiser(wave, CondOT(), prediction)
        for weight in WEIGHTS.values():
            own = dsm_loss(denoiser, x0, t, eps, weight=weight)
            guided = dsm_loss(Guided(denoiser, denoiser, 1.0), x0, t, eps, weight=weight)
            for a, b in zip(own, guided, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # the same numbers by another way: rounding


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_half_precision_stops_at_the_network(prediction):
    x0, t, eps = data(256, 4, torch.float32)
    t = t.clamp_min(0.01)
    denoiser = Denoiser(Net(4, dtype=torch.float32), VP(), prediction)
    plain = dsm_loss(denoiser, x0, t, eps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dsm_loss(denoiser, x0, t, eps)
    assert [x.dtype for x in found] == [torch.float32] * 3
    assert torch.equal(found.log_snr, plain.log_snr)
    # the output, a sum of 8 numbers of order one, is off by some 2^-9 of that; the mean over items averages
    assert float(found.loss.detach().mean()) == pytest.approx(float(plain.loss.detach().mean()), rel=2e-2)
    assert not torch.equal(found.loss, plain.loss)  # the network did run in bfloat16
    elementwise = Denoiser(wave, VP(), prediction)
    plain = dsm_loss(elementwise, x0, t, eps, weight=likelihood_weight).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):  # and nothing but a network's products does
        assert torch.equal(dsm_loss(elementwise, x0, t, eps, weight=likelihood_weight).loss, plain)


def test_the_output_is_cast_up_before_the_subtraction():
    """A network whose numbers bfloat16 holds exactly has the same loss in both, to the bit."""
    x0, t, eps = data(64, 4, torch.float32)
    coarse = [
        Denoiser(lambda x, t, d=d: x.to(torch.bfloat16).to(d), VP(), "v") for d in (torch.bfloat16, torch.float32)
    ]
    low, high = (dsm_loss(denoiser, x0, t, eps).loss for denoiser in coarse)
    assert torch.equal(low, high)
    half = dsm_loss(Denoiser(wave, VP(), "v"), x0.bfloat16(), t, eps.bfloat16()).loss
    assert half.dtype == torch.float32  # of bfloat16 data too
    wide = dsm_loss(Denoiser(wave, VP(), "v"), x0.bfloat16().double(), t, eps.bfloat16().double()).loss
    # x and the output are rounded to 2^-9 of numbers of order one, the errors being of order one; 4 of them an item
    torch.testing.assert_close(half.double(), wide, rtol=0.05, atol=0.02)


def test_float32_is_close_to_float64():
    x0, t, eps = data(64, 4)
    for prediction in PREDICTIONS:
        denoiser = Denoiser(wave, VP(), prediction)
        for weight in WEIGHTS.values():
            single = dsm_loss(denoiser, x0.float(), t, eps.float(), weight=weight).loss
            double = dsm_loss(denoiser, x0, t, eps, weight=weight).loss
            torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


# What is refused


def test_bad_losses_say_what_is_wrong():
    x0, t, eps = data(4, 2)
    denoiser = Denoiser(wave, VP(), "v")
    bad = [
        ((lambda x, t: x, x0, t, eps), ArgumentTypeError, r"Denoiser\(net, schedule, prediction\)"),
        ((denoiser, x0.numpy(), t, eps), ArgumentTypeError, "`x0` must be a tensor"),
        ((denoiser, (255 * x0).to(torch.uint8), t, eps), DtypeError, "`x0` must be floating"),
        ((denoiser, x0[0, 0], t, eps[0, 0]), ShapeError, "`x0`"),
        ((denoiser, x0[:0], t[:0], eps[:0]), ShapeError, "`x0`"),
        ((denoiser, x0, t, eps[:2]), ShapeError, "of one shape"),
        ((denoiser, x0, t, eps[:, :1]), ShapeError, "of one shape"),
        ((denoiser, x0, t, None), ShapeError, "`eps`"),
        ((denoiser, x0, t, eps.float()), DtypeError, "`eps` must have the dtype"),
        ((denoiser, x0, t[:3], eps), ShapeError, r"`t` must have shape \(\) or \(4,\)"),
        ((denoiser, x0, t[:, None], eps), ShapeError, "`t`"),
        ((denoiser, x0, 1.5, eps), GridError, "outside"),
        ((denoiser, x0, torch.tensor(500), eps), GridError, r"\(i \+ 1\) / T"),
        ((denoiser, x0, 0.0, eps), GridError, "without noise"),
        ((denoiser, x0, t * math.nan, eps), GridError, "nan"),
        ((Denoiser(lambda x, t: x[:, :1], VP(), "v"), x0, t, eps), ShapeError, "`net` must return"),
        ((Denoiser(lambda x, t: x.repeat(1, 2), VP(), "v"), x0, t, eps), ShapeError, "`net` must return"),
    ]
    for arguments, error, match in bad:
        with pytest.raises(error, match=match):
            dsm_loss(*arguments)
    for weight in (lambda log_snr, rate: 1.0, lambda log_snr, rate: log_snr[:2], lambda log_snr, rate: log_snr.sum()):
        with pytest.raises(ShapeError, match="`weight"):
            dsm_loss(denoiser, x0, t, eps, weight=weight)


def test_a_predictor_of_the_wrong_shape_is_refused():
    class Narrow(Exact):
        def pair(self, x, t):
            return tuple(y[:, :1] for y in super().pair(x, t))

    x0, t, eps = data(4, 2)
    with pytest.raises(ShapeError, match="must return the shape of x0"):
        dsm_loss(Narrow(VP()), x0, t, eps)


def test_bad_weights_say_what_is_wrong():
    for gamma in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ArgumentError, match="`gamma`"):
            min_snr_weight(gamma)
    with pytest.raises(ArgumentTypeError, match="`gamma`"):
        min_snr_weight("5")
    with pytest.raises(ArgumentError, match="`sigma_data`"):
        edm_weight(0.0)
    with pytest.raises(ArgumentError, match="here it is called 'eps'"):
        weight_on(simple_weight, "epsilon", VP(), 0.5)
    with pytest.raises(ArgumentError, match="here it is called 'v'"):
        weight_on(simple_weight, "v_prediction", VP(), 0.5)
    with pytest.raises(GridError, match="outside"):
        weight_on(simple_weight, "v", VP(), 2.0)
    with pytest.raises(GridError, match="without noise"):
        weight_on(simple_weight, "x0", VP(), 0.0)
    for prediction in ("eps", "score"):
        with pytest.raises(ArgumentError, match="needs some signal"):
            weight_on(edm_weight(0.5), prediction, CondOT(), 1.0)
        with pytest.raises(ArgumentError, match="no signal left"):
            Denoiser(wave, CondOT(), prediction)


def test_bad_bounds_say_what_is_wrong():
    x0, _, eps = data(4, 2)
    law = Exact(VP())
    with pytest.raises(GridError, match="earlier"):
        step_cost(VP(), 0.3, 0.4)
    with pytest.raises(GridError, match="without noise"):
        step_cost(VP(), 0.3, 0.0)
    with pytest.raises(GridError, match="`t_min`"):
        vlb(law, x0, torch.full((4,), 0.5), eps, t_min=2.0)
    with pytest.raises(GridError, match="without noise"):
        vlb(law, x0, torch.full((4,), 0.5), eps, t_min=0.0)
    with pytest.raises(ArgumentError, match="`u`"):
        vlb(law, x0, torch.full((4,), 1.5), eps)
    with pytest.raises(ArgumentTypeError, match="`x0`"):
        prior_term(VP(), 1.0)
