"""Distances between samples and data: against closed forms, scipy, scikit-learn, all samples there are, and Monte Carlo.

Statistical tests have fixed seeds; 4 standard errors are a false alarm once in 16 000.
"""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from scipy.optimize import linprog
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist
from sklearn import mixture
from sklearn.datasets import load_digits

from sdesens import Philox
from sdesens.diffusion import Gaussian, GaussianMixture, metrics
from sdesens.diffusion.metrics import frechet, mmd2, mode_coverage, nn_ratio, sliced_w2
from sdesens.errors import ArgumentError, ArgumentTypeError, DtypeError, SdesensError, ShapeError
from sdesens.training.classifier import HIDDEN, fit_classifier

D = torch.float64
BANDWIDTHS = (0.1, 0.25, 0.5, 1.0, 2.0)
RING = GaussianMixture.ring()


def normals(seed: int, *shape: int) -> torch.Tensor:
    z = Philox(seed, stream=77).normals(0, shape[0], 0, 1, math.prod(shape[1:]), dtype=D, device=torch.device("cpu"))
    return z.reshape(shape)


# Sliced W2


def test_on_the_line_it_is_the_optimal_transport():
    """The linear programme of transport with squared costs, for counts without a common divisor."""
    x, y = normals(1, 7, 1), 1.5 * normals(2, 5, 1) + 0.3
    cost = cdist(x, y, "sqeuclidean")
    sums = np.concatenate([np.kron(np.eye(7), np.ones(5)), np.kron(np.ones(7), np.eye(5))])
    plan = linprog(cost.ravel(), A_eq=sums, b_eq=np.repeat([1 / 7, 1 / 5], [7, 5]))
    # HiGHS keeps its constraints to 1e-7
    assert sliced_w2(x, y) == pytest.approx(math.sqrt(plan.fun), rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(6, 4), (9, 2), (5, 5)])
def test_rows_taken_several_times_change_nothing(n, m):
    """Each row of x k times, and of y l times with kn = lm, are the same two laws with equal counts."""
    x, y = normals(1, n, 2, 3), normals(2, m, 2, 3) + 0.4
    k = math.lcm(n, m)
    same = sliced_w2(x.repeat(k // n, 1, 1), y.repeat_interleave(k // m, 0), seed=3)
    assert sliced_w2(x, y, seed=3) == pytest.approx(same, rel=1e-13)  # rounding of sums
    assert sliced_w2(y, x, seed=3) == pytest.approx(same, rel=1e-13)
    assert sliced_w2(x, y, seed=4) != pytest.approx(same, rel=1e-6)


@pytest.mark.parametrize("d", [2, 5])
def test_directions_are_uniform(d):
    """Rows moved by c are (theta.c)^2 away: |c|^2/d in the mean over the sphere, with variance |c|^4 (3/(d(d+2)) - 1/d^2)."""
    n, x = 4096, normals(1, 10, d)
    for c in (torch.eye(d, dtype=D)[0], torch.linspace(-1, 2, d, dtype=D)):
        square = float(c.square().sum())
        error = square * math.sqrt((3 / (d * (d + 2)) - 1 / d**2) / n)
        assert abs(sliced_w2(x, x + c, n_directions=n) ** 2 - square / d) < 4 * error
        assert 4 * error < square / d / 10  # so that vectors longer than 1 by 5 % would be seen


def test_it_tells_a_lost_mode_from_the_ring():
    x, y = RING.sample(2000, 1), RING.sample(2000, 2)
    lost = y[(y - RING.means[0]).norm(dim=1) > 1]
    assert 0 < sliced_w2(x, y) < sliced_w2(x, lost) / 2
    assert sliced_w2(x, x.flip(0)) < 1e-15  # rows have no order; a projection is rounded by 2 x 1e-16


# MMD


def test_mmd2_is_its_definition():
    x, y = normals(1, 30, 2, 2), normals(2, 21, 2, 2) + 0.5

    def kernel(a, b):
        square = cdist(a.flatten(1), b.flatten(1), "sqeuclidean")
        return np.mean([np.exp(-square / (2 * b**2)) for b in BANDWIDTHS], axis=0)

    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    n, m = len(x), len(y)
    expected = (xx.sum() - n) / (n * (n - 1)) + (yy.sum() - m) / (m * (m - 1)) - 2 * xy.mean()
    found = mmd2(x, y)
    assert float(found.mean) == pytest.approx(expected, abs=1e-15)  # sums of numbers of order 1
    assert (found.n, found.dof, found.mean.shape) == (51, 20, ())
    each = [float(mmd2(x, y, bandwidths=[b]).mean) for b in BANDWIDTHS]
    assert float(found.mean) == pytest.approx(np.mean(each), abs=1e-15)
    # the jackknife's: the spread of what is left without one row, of x and of y; equal but for factors 1 + O(1/n), here 1/20
    without_x = [float(mmd2(x[torch.arange(n) != i], y).mean) for i in range(n)]
    without_y = [float(mmd2(x, y[torch.arange(m) != i]).mean) for i in range(m)]
    jackknife = (n - 1) ** 2 / n * np.var(without_x, ddof=1) + (m - 1) ** 2 / m * np.var(without_y, ddof=1)
    assert float(found.standard_error) == pytest.approx(math.sqrt(jackknife), rel=0.05)


P, Q = np.array([0.3, 0.7]), np.array([0.5, 0.3, 0.2])
AT_P, AT_Q = torch.tensor([[0.0], [0.8]], dtype=D), torch.tensor([[0.2], [1.0], [1.7]], dtype=D)


def moments_of_the_kernel() -> tuple[float, ...]:
    """MMD^2, var a, var b, E g_xx^2, E g_yy^2, E g_xy^2 of the laws P and Q on a few points, by sums over them."""

    def parts(a, b, p, q):
        k = np.mean([np.exp(-cdist(a, b, "sqeuclidean") / (2 * h**2)) for h in BANDWIDTHS], axis=0)
        rows, columns, mean = k @ q, p @ k, p @ k @ q
        return mean, rows, columns, p @ (k - rows[:, None] - columns + mean) ** 2 @ q

    def variance(p, f):
        return p @ f**2 - (p @ f) ** 2

    xx, row_x, _, g_xx = parts(AT_P, AT_P, P, P)
    yy, row_y, _, g_yy = parts(AT_Q, AT_Q, Q, Q)
    xy, row, column, g_xy = parts(AT_P, AT_Q, P, Q)
    return xx + yy - 2 * xy, variance(P, row_x - row), variance(Q, row_y - column), g_xx, g_yy, g_xy


def test_over_all_samples_there_are_mmd2_is_unbiased_and_its_variance_is_what_is_said():
    """Laws on two and three points: every sample of 3 and 4 rows with its probability, so that there is no sampling error."""
    n, m, found, weights = 3, 4, [], []
    for i, j in itertools.product(itertools.product(range(2), repeat=n), itertools.product(range(3), repeat=m)):
        estimate = mmd2(AT_P[list(i)], AT_Q[list(j)])
        found.append((float(estimate.mean), float(estimate.standard_error) ** 2))
        weights.append(P[list(i)].prod() * Q[list(j)].prod())
    values, squares = np.array(found).T
    weights = np.array(weights)
    mean, a, b, g_xx, g_yy, g_xy = moments_of_the_kernel()
    variance = weights @ (values - mean) ** 2
    second = 2 * g_xx / (n * (n - 1)) + 2 * g_yy / (m * (m - 1)) + 4 * g_xy / (n * m)
    twice = 4 * g_xx / (n * (n - 2)) + 4 * g_yy / (m * (m - 2)) + 8 * g_xy / (n * m)
    # rounding of 648 terms of order 1
    assert weights @ values == pytest.approx(mean, abs=1e-14)
    assert variance == pytest.approx(4 * a / n + 4 * b / m + second, rel=1e-12)
    assert weights @ squares == pytest.approx(4 * a / n + 4 * b / m + twice, rel=1e-12)
    assert 4 * a / n + 4 * b / m < 0.8 * variance  # negative control: what the delta method estimates is too small


@pytest.mark.parametrize(
    ("shift", "least", "most"),
    [(0.0, 0.96, 1.0), (0.4, 0.90, 0.96), (1.2, 0.93, 0.96)],  # what the docstring says
    ids=["same law", "MMD^2 one standard error", "MMD^2 four standard errors"],
)
def test_coverage_of_mmd2(shift, least, most):
    """Against the closed form for Gaussians, E exp(-|x - y|^2 / 2b^2) = (b^2 / (b^2 + 2)) exp(-|shift|^2 / 2(b^2 + 2)) in the plane."""
    n, m, repeats = 60, 50, 1200
    z = normals(3, repeats, n + m, 2)
    found = [mmd2(z[i, :n] + torch.tensor([shift, 0.0]), z[i, n:]) for i in range(repeats)]
    values, errors = (np.array([float(getattr(e, k)) for e in found]) for k in ("mean", "standard_error"))
    true = np.mean([2 * b**2 / (b**2 + 2) * -math.expm1(-(shift**2) / (2 * (b**2 + 2))) for b in BANDWIDTHS])
    assert abs(values.mean() - true) < 4 * values.std() / math.sqrt(repeats)

    def covered(scale: float) -> float:
        return float(np.mean(np.abs(values - true) < scale * stats.t.ppf(0.975, m - 1) * errors))

    slack = 4 * math.sqrt(0.95 * 0.05 / repeats)  # 4 standard errors of a share: 0.025
    assert least - slack < covered(1.0) <= min(most + slack, 1.0)
    assert covered(0.5) < least - slack  # negative control
    # V is between the variance and twice that, which it is for a single law, up to (n - 1)/(n - 2); a variance has the relative
    # standard error sqrt((kurtosis - 1) / repeats), about 0.05, and the mean of V one that is smaller
    ratio, most_v = (errors**2).mean() / values.var(), 2 * (m - 1) / (m - 2)
    slack = 4 * math.sqrt((stats.kurtosis(values, fisher=False) - 1) / repeats)
    assert (2 if shift == 0 else 1) * (1 - slack) < ratio < most_v * (1 + slack)


def test_mmd2_keeps_its_digits_where_bandwidths_are_wide():
    """k = 1 - |x - y|^2 / 2b^2 + O(1e-28) for data of size 1e-7: MMD^2 is the unbiased estimate of |mean - mean|^2 / b^2."""
    x, y = 1e-7 * normals(1, 40, 3), 1e-7 * (normals(2, 30, 3) + 0.5)
    square = (x.mean(0) - y.mean(0)).square().sum() - x.var(0).sum() / 40 - y.var(0).sum() / 30
    # rounding, and |x - y|^2 / b^2 = 1e-13; k itself is rounded by 1e-16, a hundredth of what it differs from 1
    found = mmd2(x, y, bandwidths=(1.0,))
    assert float(found.mean) == pytest.approx(float(square), rel=1e-10, abs=0)
    larger = mmd2(1e3 * x, 1e3 * y, bandwidths=(1e3,))  # a change of units
    assert float(larger.standard_error) == pytest.approx(float(found.standard_error), rel=1e-10, abs=0)


# Frechet's distance


def with_moments(seed: int, n: int, mean: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """n rows of that mean and the covariance root root^T, to rounding."""
    z = normals(seed, n, root.shape[1])
    z = z - z.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(z.mT)), z.mT, upper=False)
    return mean + (root @ white).mT


def test_frechet_is_the_formula_with_a_matrix_root():
    x, y = normals(1, 50, 2, 3), normals(2, 40, 2, 3) @ (normals(3, 3, 3) + 2 * torch.eye(3)) + 0.3
    a, b = (np.cov(rows.flatten(1).numpy(), rowvar=False) for rows in (x, y))
    shift = float((x.mean(0) - y.mean(0)).square().sum())
    expected = shift + np.trace(a) + np.trace(b) - 2 * np.trace(linalg.sqrtm(a @ b).real)
    # sqrtm's rounding, 1e-16 by the condition of the product's root, about 1e2
    assert frechet(x, y) == pytest.approx(expected, rel=1e-12)
    assert frechet(y, x) == pytest.approx(expected, rel=1e-12)


def test_frechet_closed_forms():
    zero = torch.zeros(2, dtype=D)
    # along common axes, the squared differences of standard deviations
    x = with_moments(1, 30, zero, torch.diag(torch.tensor([1.0, 3.0], dtype=D)))
    y = with_moments(2, 20, zero + 2, torch.diag(torch.tensor([0.5, 7.0], dtype=D)))
    assert frechet(x, y) == pytest.approx(8 + 0.25 + 16, rel=1e-13)
    # in the plane tr sqrt(C) = sqrt(tr C + 2 sqrt(det C)), axes apart
    A, B = torch.tensor([[1.0, 0.0], [2.0, 0.5]], dtype=D), torch.tensor([[2.0, 0.0], [-1.0, 1.5]], dtype=D)
    C1, C2 = A @ A.mT, B @ B.mT
    root = ((C1 @ C2).trace() + 2 * (C1.det() * C2.det()).sqrt()).sqrt()
    expected = float(C1.trace() + C2.trace() - 2 * root)
    assert frechet(with_moments(1, 30, zero, A), with_moments(2, 20, zero, B)) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_singular_covariances():
    """Rows in a subspace of three of 20 dimensions, four of one set and six of the other: an isometry changes no distance."""
    x, y = normals(1, 4, 3), 2 * normals(2, 6, 3) + 1
    Q = torch.linalg.qr(normals(3, 20, 3)).Q
    assert frechet(x @ Q.mT, y @ Q.mT) == pytest.approx(frechet(x, y), rel=1e-13)
    # no direction in common: nothing to subtract
    apart = torch.cat((x, 0 * x), 1), torch.cat((0 * y, y), 1)
    both = float(x.var(0).sum() + y.var(0).sum() + x.mean(0).square().sum() + y.mean(0).square().sum())
    assert frechet(*apart) == pytest.approx(both, rel=1e-13)
    # the root of a rounded eigenvalue would leave 1e-8
    assert all(0 <= frechet(a @ Q.mT, a @ Q.mT) < 1e-13 for a in normals(4, 20, 4, 3))
    assert frechet(torch.ones(3, 2), torch.zeros(3, 2)) == pytest.approx(2.0, abs=1e-15)  # no spread at all


# Nearest neighbours


def test_nn_ratio_is_that_of_a_search_tree():
    made, train, test = normals(1, 60, 2, 2) + 0.2, normals(2, 70, 2, 2), normals(3, 50, 2, 2)
    tree = KDTree(train.flatten(1).numpy())
    expected = tree.query(made.flatten(1).numpy())[0].mean() / tree.query(test.flatten(1).numpy())[0].mean()
    assert nn_ratio(made, train, test) == pytest.approx(expected, rel=1e-13)


def test_nn_ratio_sees_copies():
    train, test, fresh = 1e3 + normals(1, 800, 3), 1e3 + normals(2, 500, 3), 1e3 + normals(3, 500, 3)
    assert nn_ratio(train[:200], train, test) == 0  # inner products would leave 1e3 sqrt(1e-16)
    # new draws are as far as test rows: two means of distances whose relative spread is 1.0 at most
    tree = KDTree(train.numpy())
    spreads = [np.std(d) / d.mean() / math.sqrt(500) for d in (tree.query(a.numpy())[0] for a in (test, fresh))]
    assert abs(nn_ratio(fresh, train, test) - 1) < 4 * math.hypot(*spreads)
    # half of the rows slightly changed copies: 0.5 and a little
    copies = torch.cat((train[:250] + 1e-3 * normals(4, 250, 3), fresh[:250]))
    assert nn_ratio(copies, train, test) < 0.8


# Modes

APART = {
    "plane": RING,
    "line": GaussianMixture([0.3, 0.7], [[-9.0], [9.0]], [[1.0], [0.25]]),
    "space": GaussianMixture(
        [0.5, 0.5],
        [[0.0, 0.0, 0.0], [30.0, 0.0, 0.0]],
        [[[2.0, 0.9, 0.0], [0.9, 1.0, 0.3], [0.0, 0.3, 0.5]], [[1.0, -0.5, 0.2], [-0.5, 1.0, 0.0], [0.2, 0.0, 3.0]]],
    ),
}


@pytest.mark.parametrize("law", APART.values(), ids=list(APART))
@pytest.mark.parametrize("n_std", [1.0, 3.0])
def test_inliers_are_chi_square(law, n_std):
    n = 20_000
    found = mode_coverage(law.sample(n, 5), law, n_std=n_std)
    rate = stats.chi2.cdf(n_std**2, law.dim)
    assert abs(found.inliers - rate) < 4 * math.sqrt(rate * (1 - rate) / n)
    # half the sum of K deviations of shares, each at most 4 standard errors
    assert found.mode_tv < 2 * (law.weights * (1 - law.weights) / n).sqrt().sum()
    if (law, n_std) == (RING, 3.0):
        assert rate == pytest.approx(1 - math.exp(-4.5), abs=1e-15)
        # negative control: a network whose modes are 5 % too wide
        wide = GaussianMixture.ring(std=0.1575).sample(n, 5)
        assert abs(mode_coverage(wide, law).inliers - rate) > 4 * math.sqrt(rate * (1 - rate) / n)


@pytest.mark.parametrize(
    "covs", [0.8, [[0.5, 2.0], [1.5, 0.4], [1.0, 1.0]], APART["space"].covs[0, :2, :2].repeat(3, 1, 1)]
)
def test_samples_belong_to_the_mode_of_the_largest_responsibility(covs):
    """Overlapping modes of unequal weights, against scikit-learn."""
    law = GaussianMixture([0.6, 0.3, 0.1], [[0.0, 0.0], [1.0, 1.0], [-1.0, 0.5]], covs)
    full = law.covs.expand(3, 2) if law.covs.dim() == 0 else law.covs
    full = torch.diag_embed(full) if full.dim() == 2 else full
    peer = mixture.GaussianMixture(3)
    peer.weights_, peer.means_, peer.covariances_ = law.weights.numpy(), law.means.numpy(), full.numpy()
    peer.precisions_cholesky_ = np.linalg.cholesky(np.linalg.inv(full.numpy()))
    x = 1.5 * normals(1, 3000, 2)
    share = np.bincount(peer.predict(x.numpy()), minlength=3) / 3000
    expected = np.abs(share - law.weights.numpy()).sum() / 2
    assert mode_coverage(x, law).mode_tv == pytest.approx(expected, abs=1e-14)
    # negative control: by the nearest mean it would be another number
    nearest = np.bincount(cdist(x, law.means).argmin(1), minlength=3) / 3000
    assert abs(np.abs(nearest - law.weights.numpy()).sum() / 2 - expected) > 0.01


def test_lost_modes():
    at = RING.means.repeat_interleave(10, 0)
    assert mode_coverage(at.reshape(80, 1, 2).float(), RING) == (1.0, 0.0)  # shares are exact
    assert mode_coverage(at[10:], RING) == pytest.approx((1.0, 1 / 8), abs=1e-15)
    assert mode_coverage(at[:10], RING) == pytest.approx((1.0, 7 / 8), abs=1e-15)
    assert mode_coverage(torch.zeros(4, 2), RING).inliers == 0
    law = GaussianMixture([1.0, 0.0], [[0.0], [5.0]], 1.0)
    assert mode_coverage(torch.tensor([[0.0], [5.0]]), law) == (0.5, 0.0)  # a mode without weight is none


# All of them


def test_blocks_change_nothing(monkeypatch):
    x, y, z = RING.sample(300, 1).float(), RING.sample(217, 2), RING.sample(100, 3)

    def figures() -> list[float]:
        found = mmd2(x, y)
        return [
            sliced_w2(x, y),
            float(found.mean),
            float(found.standard_error),
            nn_ratio(x, y, z),
            *mode_coverage(x, RING),
        ]

    whole = figures()
    for size in (1, 1000):
        monkeypatch.setattr(metrics, "BLOCK", size)
        assert figures() == pytest.approx(whole, abs=1e-14)  # sums in another order


X = normals(1, 6, 2)
BAD_VALUES = X.clone()
BAD_VALUES[2, 1] = math.nan
THIN = GaussianMixture([1.0], [[0.0, 0.0]], [[[1.0, 1.0], [1.0, 1.0]]])
BAD = {
    "no tensor": (lambda: sliced_w2(X.numpy(), X), ArgumentTypeError, "`x` must be a tensor"),
    "integers": (lambda: frechet(X, X.long()), DtypeError, "`y` must be floating"),
    "one axis": (lambda: sliced_w2(X[:, 0], X[:, 0]), ShapeError, r"`x` must have shape \(B, \*event\)"),
    "empty": (lambda: frechet(X[:0], X), ShapeError, "`x` must have shape"),
    "another event": (
        lambda: mmd2(X, X[:, :1]),
        ShapeError,
        r"`y` must have rows of shape \(2,\), as `x` has, got \(1,\)",
    ),
    "same size, other shape": (
        lambda: nn_ratio(X, X[:, None], X),
        ShapeError,
        r"`train` .* as `generated` has, got \(1, 2\)",
    ),
    "NaN": (
        lambda: nn_ratio(X, X, BAD_VALUES),
        ArgumentError,
        "`test` holds NaN .* in 1 of 6 rows, the first is row 2",
    ),
    "huge": (lambda: frechet(X, X + 1e200), ArgumentError, r"`y` holds numbers up to 1e\+200, whose squares overflow"),
    "sparse": (lambda: sliced_w2(X.to_sparse(), X), ArgumentTypeError, "got a torch.sparse_coo tensor: to_dense"),
    "meta": (lambda: sliced_w2(X, X.to("meta")), ArgumentTypeError, "`y` .* got a meta tensor"),
    "infinite": (lambda: mode_coverage(X / 0, RING), ArgumentError, "`x` holds NaN or infinite values in 6 of 6"),
    "one row": (lambda: sliced_w2(X, X[:1]), ShapeError, "`y` must have at least 2 rows, got 1"),
    "two rows": (lambda: mmd2(X[:2], X), ShapeError, "`x` must have at least 3 rows, got 2"),
    "no directions": (lambda: sliced_w2(X, X, n_directions=0), ArgumentError, "`n_directions` must be at least 1"),
    "seed": (lambda: sliced_w2(X, X, seed=0.5), ArgumentTypeError, "`seed` must be an int"),
    "no bandwidths": (lambda: mmd2(X, X, bandwidths=()), ArgumentTypeError, "`bandwidths` must be numbers"),
    "one bandwidth": (lambda: mmd2(X, X, bandwidths=1.0), ArgumentTypeError, "`bandwidths` must be numbers"),
    "bandwidth 0": (lambda: mmd2(X, X, bandwidths=(1.0, 0.0)), ArgumentError, r"`bandwidths` must lie in \(0, inf\)"),
    "out of reach": (lambda: mmd2(1e3 * X, 1e3 * X), ArgumentError, "`bandwidths` are too small for these data"),
    "test rows trained on": (
        lambda: nn_ratio(X + 1, X, X[:3]),
        ArgumentError,
        "every row of `test` is a row of `train`",
    ),
    "no mixture": (
        lambda: mode_coverage(X, Gaussian([0.0], [1.0])),
        ArgumentTypeError,
        "`law` must be a GaussianMixture",
    ),
    "other dimension": (lambda: mode_coverage(X[:, :1], RING), ShapeError, "`x` must have 2 entries a row"),
    "singular mode": (lambda: mode_coverage(X, THIN), ArgumentError, "`law` has a mode with a singular covariance"),
    "n_std 0": (lambda: mode_coverage(X, RING, n_std=0), ArgumentError, "`n_std` must lie in"),
    "classifier: no tensor": (lambda: fit_classifier([1.0], X), ArgumentTypeError, "`x` must be a tensor"),
    "classifier: integers": (lambda: fit_classifier(X.long(), X), DtypeError, "`x` must be floating"),
    "classifier: one axis": (lambda: fit_classifier(X[:, 0], X), ShapeError, r"`x` must have shape \(n, \*event\)"),
    "classifier: NaN": (lambda: fit_classifier(BAD_VALUES, X), ArgumentError, "`x` holds NaN"),
    "labels: none": (
        lambda: fit_classifier(X, None),
        ArgumentTypeError,
        r"`labels` must be a tensor \(n,\), got NoneType",
    ),
    "labels: floating": (lambda: fit_classifier(X, X[:, 0]), DtypeError, "`labels` must be integers"),
    "labels: too few": (lambda: fit_classifier(X, torch.arange(5)), ShapeError, r"`labels` must have shape \(6,\)"),
    "labels: one class": (lambda: fit_classifier(X, torch.ones(6).long()), ArgumentError, "of two classes at least"),
    "classifier: seed": (lambda: fit_classifier(X, torch.arange(6), seed=-1), ArgumentError, "`seed` must lie in"),
    "classifier: no seed": (
        lambda: fit_classifier(X, torch.arange(6), seed=None),
        ArgumentTypeError,
        "`seed` must be an int",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=list(BAD))
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert type(caught.value) is error


# The classifier


@pytest.fixture(scope="module")
def digits():
    """Training and test rows with their labels, a fixed random split, and the classifier of the former."""
    found = load_digits()
    x, labels = torch.from_numpy(found.images[:, None] / 8 - 1).float(), torch.from_numpy(found.target)
    order = normals(9, len(x), 1)[:, 0].argsort()
    test, train = order[:397], order[397:]
    return x[train], labels[train], x[test], labels[test], fit_classifier(x[train], labels[train])


def test_digits_are_told_apart(digits):
    x, labels, test, test_labels, classifier = digits
    assert classifier.accuracy(x, labels) == 1.0
    # known to be about 0.98: 4 standard errors of a share of 397
    assert abs(classifier.accuracy(test, test_labels) - 0.98) < 4 * math.sqrt(0.98 * 0.02 / 397)
    assert classifier.accuracy(test, (test_labels + 1) % 10) < 0.02  # negative control
    found = classifier.predict(test)
    assert found.dtype == torch.int64
    assert found.shape == (397,)


def test_features_are_the_hidden_layer(digits):
    """The rest of the network on top of them is scikit-learn's own probability."""
    *_, test, _, classifier = digits
    features, network = classifier.features(test), classifier.network
    assert features.shape == (397, HIDDEN)
    assert float(features.min()) == 0
    out = features @ torch.from_numpy(network.coefs_[1]) + torch.from_numpy(network.intercepts_[1])
    expected = torch.from_numpy(network.predict_proba(test.double().flatten(1).numpy()))
    # rounding of sums of 64 terms, in logits of order 30
    torch.testing.assert_close(torch.softmax(out, 1), expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(classifier.predict(test), out.argmax(1), rtol=0, atol=0)


def test_frechet_distance_of_features_sees_what_is_not_a_digit(digits):
    x, _, test, _, classifier = digits
    real = frechet(classifier.features(test), classifier.features(x))
    flat = x.double().flatten(1)
    root = torch.linalg.cholesky(torch.cov(flat.mT) + 1e-9 * torch.eye(64))
    blurs = (
        (flat.mean(0) + normals(4, 1400, 64) @ root.mT).clamp(-1, 1).reshape(x.shape)
    )  # of the same mean and covariance
    assert frechet(classifier.features(blurs), classifier.features(x)) > 3 * real
    assert nn_ratio(blurs, x, test) > 1.2


def test_the_fit_is_that_of_its_seed(digits):
    x, labels, test, _, classifier = digits
    again = fit_classifier(x, labels)
    torch.testing.assert_close(again.features(test), classifier.features(test), rtol=0, atol=0)
    assert not torch.equal(fit_classifier(x, labels, seed=1).features(test), classifier.features(test))


def test_any_integers_may_be_classes():
    x = torch.cat((normals(1, 30, 2) + 4, normals(2, 30, 2) - 4))
    labels = torch.tensor([7] * 30 + [-3] * 30, dtype=torch.int32)
    classifier = fit_classifier(x, labels)  # two classes: scikit-learn has one output for both
    assert classifier.predict(torch.tensor([[4.0, 4.0], [-4.0, -4.0]])).tolist() == [7, -3]
    with pytest.raises(ShapeError, match=r"`x` must have shape \(n, 2\), not empty, got \(60, 1\)"):
        classifier.features(x[:, :1])
    with pytest.raises(ShapeError, match=r"`labels` must have shape \(60,\)"):
        classifier.accuracy(x, labels[:1])


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.neural_network", None)
    with pytest.raises(SdesensError, match=r"pip install 'sdesens\[demo\]'"):
        fit_classifier(X, torch.arange(6))
