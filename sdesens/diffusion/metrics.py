"""How far samples are from data: distances between two sets of rows, without a model of either.

Rows are (n, *event), flattened to (n, d) and taken to float64 on the device of the first set. With F^-1 the quantile function of
the n numbers theta.x_i, and G^-1 that of the m numbers theta.y_j,

    SW2^2 = mean over unit vectors theta of int_0^1 (F^-1(u) - G^-1(u))^2 du,                                     (1)

whose integrand is constant between neighbours of {i/n} and {j/m}: any two counts are coupled exactly. With a kernel k,

    MMD^2 = sum_{i != j} k(x_i, x_j) / n(n-1) + sum_{i != j} k(y_i, y_j) / m(m-1) - 2 sum_ij k(x_i, y_j) / nm      (2)

has the mean E k(x, x') + E k(y, y') - 2 E k(x, y). Let a(x) = E k(x, x') - E k(x, y), b the same at y, and g what is left of k
when its two conditional means are taken off, the mean added. Hoeffding's decomposition gives the variance, whatever n and m,

    var a 4/n + var b 4/m  +  E g_xx^2 2/n(n-1) + E g_yy^2 2/m(m-1) + E g_xy^2 4/nm.                              (3)

The second part is all there is where the laws are the same. With row sums r_xx and r_xy of k, without i = j,

    V = 4/n var_i (r_xx,i / (n-2) - r_xy,i / m) + the same for y                                                  (4)

has as its mean the first part of (3) and, up to (n-1)/(n-2), twice the second: like the jackknife, which it is up to such factors,
it is never too small in the mean (B. Efron, C. Stein, Ann. Stat. 9 (1981) 586), and at most twice too large.

Frechet's distance of Gaussians with covariances A^T A and B^T B is

    |m_1 - m_2|^2 + tr C_1 + tr C_2 - 2 tr (C_1^(1/2) C_2 C_1^(1/2))^(1/2),      the last trace = ||A B^T||_*,     (5)

the sum of singular values. With triangular factors A and B of the centred rows no root of a rounded eigenvalue is taken.

Every function raises ArgumentTypeError, DtypeError, ShapeError or ArgumentError for sets that are not floating tensors, do not share
one event shape, hold too few rows, or NaN, infinite or huge values; `Raises` names what else there is.

References: N. Bonneel et al., J. Math. Imaging Vis. 51 (2015) 22, sliced distances; A. Gretton et al., JMLR 13 (2012) 723, MMD;
D. Sutherland, N. Deka, arXiv 1906.02104, its variance;
D. Dowson, B. Landau, J. Multivar. Anal. 12 (1982) 450, and M. Heusel et al., NeurIPS 2017, Frechet's distance.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sdesens.diffusion.checks import number, whole
from sdesens.diffusion.draws import check_items
from sdesens.diffusion.oracles import GaussianMixture, components
from sdesens.diffusion.streams import SLICES
from sdesens.diffusion.values import bad_rows
from sdesens.errors import ArgumentError, ArgumentTypeError, ShapeError
from sdesens.estimate import Estimate
from sdesens.noise import Philox

D = torch.float64
BLOCK = 2**19  # entries of a matrix held at a time, 4 MiB
LARGEST = 1e140  # products of two are summed over rows


class Coverage(NamedTuple):
    """Attributes: inliers, the share of samples near some mode; mode_tv, how far the modes' shares are from the law's, 0 to 1."""

    inliers: float
    mode_tv: float


def sliced_w2(x: Tensor, y: Tensor, *, n_directions: int = 256, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of two sets of rows, equation (1), in the unit of the data.

    It is not zero for two sets from one law: compare with the distance of real data from real data.

    Parameters
    ----------
    x, y : Tensor, shapes (n, *event) and (m, *event), n, m >= 2
    n_directions : int
    seed : int
        Of the directions, on a stream of their own: no seed of data or samples repeats them.

    Raises
    ------
    ArgumentTypeError, ArgumentError
        If `n_directions` or `seed` are no ints or out of range.

    Example
    -------
    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> round(sliced_w2(x, x + 0.5), 6)
    0.5
    """
    x, y = _tables(2, x=x, y=y)
    n, m = len(x), len(y)
    whole("n_directions", n_directions, hint="it is a number of directions")
    theta = Philox(seed, SLICES).normals(0, n_directions, 0, 1, x.shape[1], dtype=D, device=x.device)[0]
    theta = theta / theta.norm(dim=1, keepdim=True)
    steps = (m * torch.arange(1, n + 1, device=x.device), n * torch.arange(1, m + 1, device=x.device))
    ends = torch.cat(steps).unique()  # of the pieces of (0, 1], times nm
    width = torch.diff(ends, prepend=ends.new_zeros(1)).to(D) / (n * m)
    total = torch.zeros((), dtype=D, device=x.device)
    for some in theta.split(max(1, BLOCK // len(ends))):
        p, q = ((some @ rows.mT).sort(dim=1).values for rows in (x, y))
        total += ((p[:, (ends - 1) // m] - q[:, (ends - 1) // n]).square() @ width).sum()
    return float((total / n_directions).sqrt())


def mmd2(x: Tensor, y: Tensor, *, bandwidths=(0.1, 0.25, 0.5, 1.0, 2.0)) -> Estimate:
    """Squared maximum mean discrepancy of two sets of rows, equation (2), with the mean of k = exp(-|x - y|^2 / 2 b^2) over b.

    Unbiased, and so at times below 0 where the laws are the same. Take rows that are independent, within a set and between the two.

    The standard error is the root of V, equation (4). It is right where the laws differ clearly, and at most sqrt(2)
    too large where they are the same; there it does not vanish, as that of the delta method does. A t interval is approximate near
    that point, where a sum of chi-squares takes the place of the normal law. Measured, in 1 to 8 dimensions: intervals of 95 % cover
    96 to 99 % where the laws are the same, 90 to 96 % where MMD^2 is one or two standard errors (they end below it), 93 to 96 % from four on.

    Parameters
    ----------
    x, y : Tensor, shapes (n, *event) and (m, *event), n, m >= 3
    bandwidths : numbers > 0
        In the unit of the distance of two rows.

    Returns
    -------
    Estimate, 0-dim
        Its n is the number of rows in both sets; its degrees of freedom those of the smaller one, min(n, m) - 1.

    Raises
    ------
    ArgumentTypeError, ArgumentError
        For bandwidths that are not positive numbers, or so small that no row has a neighbour.

    Example
    -------
    >>> from sdesens.diffusion import Gaussian
    >>> x, y = Gaussian([0.0], [1.0]).sample(500, 1), Gaussian([1.0], [1.0]).sample(400, 2)
    >>> mmd2(x, y)
    0.104 +/- 0.031 (95% CI, n=900)
    """
    x, y = _tables(3, x=x, y=y)
    if not isinstance(bandwidths, list | tuple) or not bandwidths:
        raise ArgumentTypeError(f"`bandwidths` must be numbers such as (0.5, 1.0), got {bandwidths!r:.60}.")
    widths = [number("bandwidths", b, 0.0, hint="they are lengths") for b in bandwidths]
    n, m = len(x), len(y)
    (rx, _), (ry, _), (row, column) = (_sums(a, b, widths) for a, b in ((x, x), (y, y), (x, y)))
    if bool((rx.sum() + ry.sum()) / (n * (n - 1) + m * (m - 1)) < -1 + 1e-15):
        raise ArgumentError(
            f"`bandwidths` are too small for these data, no row has a neighbour within 8 x {max(widths):g}: scale them up."
        )
    mean = rx.sum() / (n * (n - 1)) + ry.sum() / (m * (m - 1)) - 2 * row.sum() / (n * m)
    variance = 4 / n * (rx / (n - 2) - row / m).var() + 4 / m * (ry / (m - 2) - column / n).var()
    return Estimate(mean, variance.sqrt(), n + m, min(n, m) - 1)


def frechet(x: Tensor, y: Tensor) -> float:
    """Frechet distance of Gaussian fits to two sets of rows of features, equation (5), in the unit of the features squared.

    Covariances are over n - 1, and may be singular. It is too large by order 1/n + 1/m: compare sets of equal counts.

    Parameters
    ----------
    x, y : Tensor, shapes (n, *event) and (m, *event), n, m >= 2

    Example
    -------
    >>> x = torch.tensor([[-1.0], [1.0]])
    >>> round(frechet(x, 3 * x + 2), 6)  # 2^2 + (3 sqrt(2) - sqrt(2))^2
    12.0
    """
    x, y = _tables(2, x=x, y=y)
    A, B = (torch.linalg.qr(rows - rows.mean(0), mode="r").R / (len(rows) - 1) ** 0.5 for rows in (x, y))
    spread = A.square().sum() + B.square().sum() - 2 * torch.linalg.svdvals(A @ B.mT).sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + spread.clamp(min=0.0))


def nn_ratio(generated: Tensor, train: Tensor, test: Tensor) -> float:
    """Mean distance of a generated row to the nearest training row, divided by that of a test row: 1 is ideal, below 0.8 memorising.

    Parameters
    ----------
    generated, train, test : Tensor, shapes (n, *event), each with its n >= 2

    Raises
    ------
    ArgumentError
        If all test rows are training rows.

    Example
    -------
    >>> train, test = torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [5.0]])
    >>> nn_ratio(torch.tensor([[0.5], [4.0]]), train, test)
    0.25
    """
    generated, train, test = _tables(2, generated=generated, train=train, test=test)
    mine, theirs = (torch.cat([d.amin(1) for d in _distances(x, train)]).mean() for x in (generated, test))
    if not bool(theirs > 0):
        raise ArgumentError("every row of `test` is a row of `train`: hold test rows out of training.")
    return float(mine / theirs)


def mode_coverage(x: Tensor, law: GaussianMixture, *, n_std: float = 3.0) -> Coverage:
    """Whether samples are at the modes of a mixture, and at each as often as they should be.

    A sample is an inlier within `n_std` standard deviations (Mahalanobis) of some mode's mean. For modes apart in d dimensions
    that is the chi-square law's P(chi^2_d <= n_std^2) of the law's own samples: 1 - exp(-9/2) = 0.9889 in the plane. It belongs to the
    mode of the largest responsibility; mode_tv = sum_k |share_k - weight_k| / 2, of order sqrt(K/n)/2.5 for the law's own n samples.

    Parameters
    ----------
    x : Tensor, shape (n, *event) of law.dim entries a row, n >= 2
    law : GaussianMixture
        Of covariances that are not singular.
    n_std : number > 0

    Returns
    -------
    Coverage

    Raises
    ------
    ArgumentTypeError, ArgumentError, ShapeError
        For a law that is no mixture, has a singular mode or another dimension than x; for an n_std that is not positive.

    Example
    -------
    >>> ring = GaussianMixture.ring()
    >>> mode_coverage(torch.cat((ring.means[:4], ring.means[:4])), ring)  # half of the modes are missing
    Coverage(inliers=1.0, mode_tv=0.5)
    """
    if not isinstance(law, GaussianMixture):
        raise ArgumentTypeError(f"`law` must be a GaussianMixture, got {type(law).__name__}: it says where modes are.")
    if law.needs_noise:
        raise ArgumentError("`law` has a mode with a singular covariance, no distance is defined: widen it.")
    n_std = number("n_std", n_std, 0.0, hint="3.0 is usual")
    (x,) = _tables(2, x=x)
    if x.shape[1] != law.dim:
        raise ShapeError(f"`x` must have {law.dim} entries a row, as `law` has, got {x.shape[1]}.")
    live = law.weights > 0  # a mode without weight is none
    covs = law.covs if law.covs.dim() else law.covs.expand(law.means.shape)
    weights, means, covs = (a.detach()[live].to(x.device) for a in (law.weights, law.means, covs))
    one, near, nearest = x.new_ones(()), [], []
    for rows in x.split(max(1, BLOCK // means.numel())):
        log_p, _, y = components(rows, one, 0 * one, means, covs)
        near.append(((rows[:, None] - means) * y).sum(2).amin(1) <= n_std**2)
        nearest.append((log_p + weights.log()).argmax(1))
    share = torch.cat(nearest).bincount(minlength=len(weights)).to(D) / len(x)
    return Coverage(float(torch.cat(near).to(D).mean()), float((share - weights).abs().sum() / 2))


def _sums(x: Tensor, y: Tensor, bandwidths: list[float]) -> tuple[Tensor, Tensor]:
    """Row sums (n,) and column sums (m,) of k(x_i, y_j) - 1.

    The 1 cancels in (2) and (4), empties the diagonal where y is x, and keeps digits where all of k are near 1.
    """
    rows, columns = [], y.new_zeros(len(y))
    for d in _distances(x, y):
        k = torch.stack([torch.expm1((d / b).square() / -2) for b in bandwidths]).mean(0)
        rows.append(k.sum(1))
        columns += k.sum(0)
    return torch.cat(rows), columns


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Blocks of rows of |x_i - y_j|, exactly 0 for equal rows: by differences, not by inner products."""
    for rows in x.split(max(1, BLOCK // len(y))):
        yield torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist")


def _tables(least: int, **given) -> list[Tensor]:
    """The sets as (n, d), detached, float64 and on one device; raise unless they are finite rows of one shape, enough of them."""
    tables: list[Tensor] = []
    (first, *_) = given
    for name, x in given.items():
        check_items(name, x)
        if x.layout != torch.strided or x.is_meta:
            raise ArgumentTypeError(
                f"`{name}` must hold its numbers one by one, got a {'meta' if x.is_meta else x.layout} tensor: to_dense(), or load it."
            )
        if x.shape[1:] != given[first].shape[1:]:
            raise ShapeError(
                f"`{name}` must have rows of shape {tuple(given[first].shape[1:])}, as `{first}` has, got {tuple(x.shape[1:])}."
            )
        if len(x) < least:
            raise ShapeError(f"`{name}` must have at least {least} rows, got {len(x)}: draw more.")
        if bad := bad_rows(x):
            raise ArgumentError(
                f"`{name}` holds NaN or infinite values in {len(bad)} of {len(x)} rows, the first is row {bad[0]}: count them, "
                "then remove them."
            )
        if (size := float(x.detach().abs().max())) > LARGEST:
            raise ArgumentError(
                f"`{name}` holds numbers up to {size:.2g}, whose squares overflow: scale both sets down."
            )
        tables.append(x.detach().flatten(1).to(given[first].device, D))
    return tables
