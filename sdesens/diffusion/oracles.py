"""Laws of the data x_0 for which all is known about x_t = alpha x_0 + sigma eps, to test and to measure against.

For x_0 ~ sum_k w_k N(m_k, C_k), with V_k = alpha^2 C_k + sigma^2 I and y_k = V_k^-1 (x - alpha m_k),

    p_t(x) = sum_k w_k N(x; alpha m_k, V_k),      r_k = w_k N(x; alpha m_k, V_k) / p_t(x),                     (1)
    -grad log p_t = sum_k r_k y_k = E[eps | x] / sigma,      E[x_0 | x] = sum_k r_k (m_k + alpha C_k y_k),     (2)

without a division by alpha or sigma, so that nothing cancels at either end. A Gaussian is one component, a point of an
empirical law one with C = 0. No denoiser has a smaller loss than (2). A dimension, it is

    L*(t) = E|eps - E[eps | x_t]|^2 / d = 1 - sigma^2 E|grad log p_t|^2 / d                                    (3)
          = mean_i alpha^2 s_i^2 / (alpha^2 s_i^2 + sigma^2)     for a Gaussian of variances s_i^2 along its axes. (4)

The probability-flow ODE of a Gaussian moves x along each axis by (5), and tilting by a linear reward, p* ~ p exp(a.x),
gives a law of the same kind, (6).

    x_u = alpha_u m + sqrt(V_u / V_t) (x_t - alpha_t m)                                                        (5)
    m_k* = m_k + C_k a,      w_k* ~ w_k exp(a.m_k + a.C_k a / 2)                                               (6)

References: P. Vincent, Neural Computation 23 (2011) 1661 for (3); T. Karras et al., 2206.00364, appendix B.
"""

import math
import warnings
from dataclasses import dataclass, replace

import torch
from scipy.integrate import quad
from torch import Tensor

from sdesens.diffusion.checks import number, whole
from sdesens.diffusion.conversions import above_zero
from sdesens.diffusion.law import Law, keep, rows, singular, slopes, times
from sdesens.diffusion.schedule import Schedule
from sdesens.diffusion.values import like, reals, root
from sdesens.diffusion.weights import simple_weight, weight_at
from sdesens.errors import ArgumentError
from sdesens.estimate import Estimate
from sdesens.tensors import concrete

D = torch.float64


@dataclass(frozen=True, eq=False)
class Gaussian(Law):
    """N(mean, cov).

    Parameters
    ----------
    mean : Tensor, shape (d,)
    cov : Tensor, shape (d, d), positive semidefinite, or (d,), positive variances

    Example
    -------
    >>> from sdesens.diffusion import Cosine
    >>> Gaussian(torch.zeros(2), torch.ones(2)).floor(Cosine(), 0.5).mean
    tensor(0.5000, dtype=torch.float64)
    """

    mean: Tensor
    cov: Tensor

    def __post_init__(self):
        mean = keep(self, "mean", ("d",))
        cov = keep(self, "cov", mean.shape, 2 * mean.shape)
        object.__setattr__(self, "dim", len(mean))
        object.__setattr__(self, "needs_noise", singular("cov", cov[None]))

    def _at(self, x, alpha, sigma):
        log_p, x0, y = components(x, alpha, sigma, self.mean[None], self.cov[None])
        return log_p[:, 0], x0[:, 0], y[:, 0]

    def _draw(self, normals):
        return scatter(normals(self.dim, self.mean), self.mean[None], self.cov[None])[:, 0]

    def floor(self, schedule, t=None, *, weight=simple_weight, n_samples=2**14, seed=0):
        at, variances = times(schedule, t), axes(self.cov[None])[0].detach()

        def loss(s: Tensor) -> Tensor:
            s = above_zero(schedule, s)[:, None]
            signal = schedule.alpha(s) ** 2 * variances
            return (signal / (signal + schedule.sigma(s) ** 2)).mean(1) * weight_at(weight, schedule, s[:, 0])

        with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # quad's; its estimate of the error says it all
            if t is not None and reals("t", t).numel() != 2:
                exact, error = float(loss(schedule.time(t).reshape(-1)).mean()), 0.0
            else:
                exact, error = quad(
                    lambda u: float(loss(at(torch.tensor([u], dtype=D)))), 0, 1, epsrel=1e-10, limit=200
                )[:2]
        if not (math.isfinite(exact) and error <= 1e-5 * abs(exact)):
            raise ArgumentError(
                "the floor is infinite with this `weight`, or cannot be integrated: give a range of times, t=(low, high)."
            )
        return Estimate(torch.tensor(exact, dtype=D), torch.zeros((), dtype=D), 0, 1)

    def tilt(self, a) -> "Gaussian":
        """The law tilted by the reward a.x, a (d,), equation (6); raises ShapeError for another a.

        Example
        -------
        >>> Gaussian(torch.zeros(2), torch.ones(2)).tilt([1.0, -1.0]).mean
        tensor([ 1., -1.], dtype=torch.float64)
        """
        return replace(self, mean=self.mean + pull(self.cov[None], slopes(self.mean, a))[0])

    def flow(self, x: Tensor, schedule: Schedule, t_from, t_to) -> Tensor:
        """Where the probability-flow ODE takes x (B, d) between times of shape () or (B,), equation (5).

        Gradients flow to x, the schedule, the mean and variances (d,); a full cov must not ask for any, which is an ArgumentError.

        Example
        -------
        >>> from sdesens.diffusion import VP
        >>> x = torch.tensor([[2.0]])
        >>> Gaussian(torch.zeros(1), torch.ones(1)).flow(x, VP(), 1.0, 0.0)  # N(0, 1) at all times
        tensor([[2.]])
        """
        if self.cov.dim() == 2 and (self.cov.requires_grad or not concrete(self.cov)):
            raise ArgumentError(
                "`cov` needs a gradient, which a flow gives to variances (d,) alone: use those, or detach it."
            )
        (variances, Q), wide = axes(self.cov[None]), rows(x, self.dim)

        def scales(t: Tensor) -> tuple[Tensor, Tensor]:
            alpha = like(schedule.alpha(t), wide)
            return alpha, alpha**2 * variances[0] + like(schedule.sigma(t), wide) ** 2

        (a, V), (b, W) = scales(self.time(schedule, t_from)), scales(schedule.time(t_to))
        return (b * self.mean + ((wide - a * self.mean) @ Q[0] * root(W / V)) @ Q[0].mT).to(x.dtype)


@dataclass(frozen=True, eq=False)
class GaussianMixture(Law):
    """sum_k weights_k N(means_k, covs_k).

    Parameters
    ----------
    weights : Tensor, shape (K,), not negative and of sum 1
    means : Tensor, shape (K, d)
    covs : Tensor, shape (K, d, d), positive semidefinite; (K, d), positive variances; or (), one variance for all

    Example
    -------
    >>> GaussianMixture.ring().sample(3, 1).shape
    torch.Size([3, 2])
    """

    weights: Tensor
    means: Tensor
    covs: Tensor

    def __post_init__(self):
        w = keep(self, "weights", ("K",))
        means = keep(self, "means", (len(w), "d"))
        covs = keep(self, "covs", (), means.shape, (*means.shape, means.shape[1]))
        object.__setattr__(self, "dim", means.shape[1])
        object.__setattr__(self, "needs_noise", singular("covs", covs))
        if concrete(w) and not (bool((w >= 0).all()) and abs(float(w.detach().sum()) - 1) < 1e-6):
            raise ArgumentError(f"`weights` must be >= 0 and sum to 1, got {w.tolist()}: divide them by their sum.")

    @classmethod
    def ring(cls, n: int = 8, radius: float = 2.0, std: float = 0.15) -> "GaussianMixture":
        """n round Gaussians evenly on a circle in the plane, the first on the x-axis."""
        whole("n", n, hint="it is a number of Gaussians")
        radius, std = number("radius", radius, hint="it is a length"), number("std", std, 0.0, hint="it is a length")
        angle = 2 * math.pi * torch.arange(n, dtype=D) / n
        means = radius * torch.stack([angle.cos(), angle.sin()], 1)
        return cls(torch.full((n,), 1 / n, dtype=D), means, torch.tensor(std**2, dtype=D))

    @property
    def mean(self) -> Tensor:
        """The mean, (d,)."""
        return self.weights @ self.means

    @property
    def cov(self) -> Tensor:
        """The covariance, (d, d)."""
        covs = self._covs if self._covs.dim() == 3 else torch.diag_embed(self._covs)
        off = self.means - self.mean
        return torch.einsum("k,kde->de", self.weights, covs + off[:, :, None] * off[:, None])

    @property
    def _covs(self) -> Tensor:
        return self.covs if self.covs.dim() else self.covs.expand(self.means.shape)

    def _at(self, x, alpha, sigma):
        log_p, x0, y = components(x, alpha, sigma, self.means, self._covs)
        log_p = log_p + self.weights.log()
        share = torch.softmax(log_p, 1)[..., None]
        return torch.logsumexp(log_p, 1), (share * x0).sum(1), (share * y).sum(1)

    def _draw(self, normals):
        z = normals(1 + self.dim, self.means)
        bounds = self.weights.detach().cumsum(0)
        k = torch.searchsorted(bounds, torch.special.ndtr(z[:, 0]) * bounds[-1], right=True)
        if self._covs.dim() == 2:  # variances: no need to draw of all modes and choose
            return (self.means[k] + self._covs.sqrt()[k] * z[:, 1:]).detach()
        return scatter(z[:, 1:], self.means, self._covs)[torch.arange(len(k), device=k.device), k]

    def tilt(self, a) -> "GaussianMixture":
        """The law tilted by the reward a.x, a (d,), equation (6); raises ShapeError for another a.

        Example
        -------
        >>> pair = GaussianMixture([0.5, 0.5], [[0.0], [1.0]], 0.25)
        >>> pair.tilt([1.0]).means.flatten()
        tensor([0.2500, 1.2500], dtype=torch.float64)
        """
        a = slopes(self.means[0], a)
        shift = pull(self._covs, a)
        log_w = self.weights.log() + (self.means + shift / 2) @ a
        return replace(self, weights=torch.softmax(log_w, 0), means=self.means + shift)


@dataclass(frozen=True, eq=False)
class Empirical(Law):
    """Some points (n, d), each as likely: the law that a network sees in training. Its denoiser recites them.

    Distances come from inner products: log-responsibilities are rounded by 1e-16 |x| |point| SNR.

    Example
    -------
    >>> from sdesens.diffusion import VP
    >>> Empirical(torch.tensor([[0.0], [1.0]])).denoiser(VP()).x0(torch.tensor([[0.9]]), 0.01)
    tensor([[1.]])
    """

    points: Tensor

    def __post_init__(self):
        object.__setattr__(self, "dim", keep(self, "points", ("n", "d")).shape[1])
        object.__setattr__(self, "needs_noise", True)

    def _at(self, x, alpha, sigma):
        centre = self.points.mean(0)
        p, z = self.points - centre, x - alpha * centre
        square = z.square().sum(1, keepdim=True) - 2 * alpha * (z @ p.mT) + alpha**2 * p.square().sum(1)
        logits = -square / (2 * sigma**2)
        x0 = centre + torch.softmax(logits, 1) @ p
        norm = math.log(len(p)) + self.dim * torch.log(math.sqrt(2 * math.pi) * sigma)
        return torch.logsumexp(logits, 1) - norm.reshape(-1), x0, (x - alpha * x0) / sigma**2

    def _draw(self, normals):
        u = torch.special.ndtr(normals(1, self.points)[:, 0])
        return self.points.detach()[(u * len(self.points)).long()]


def components(x, alpha, sigma, means, covs) -> tuple[Tensor, Tensor, Tensor]:
    """log N(x; alpha m_k, V_k) (B, K), m_k + alpha C_k y_k and y_k (B, K, d), see equations (1) and (2)."""
    alpha, sigma = alpha[..., None], sigma[..., None]
    r = x[:, None] - alpha * means
    if covs.dim() == 2:
        V = alpha**2 * covs + sigma**2
        y, log_det = r / V, torch.log(V).sum(-1)
        Cy = covs * y
    else:  # not by eigenvectors: their derivative is singular where eigenvalues repeat
        eye = torch.eye(covs.shape[-1], dtype=D, device=covs.device)
        L, failed = torch.linalg.cholesky_ex((alpha**2)[..., None] * covs + (sigma**2)[..., None] * eye)
        if concrete(failed) and bool(failed.any()):
            raise ArgumentError(
                "a covariance is singular, and there is too little noise at `t` to see it: use a later time."
            )
        y = torch.cholesky_solve(r[..., None], L)[..., 0]
        log_det, Cy = 2 * torch.diagonal(L, dim1=-2, dim2=-1).log().sum(-1), (covs @ y[..., None])[..., 0]
    return -((r * y).sum(-1) + log_det + x.shape[1] * math.log(2 * math.pi)) / 2, means + alpha * Cy, y


def axes(covs: Tensor) -> tuple[Tensor, Tensor]:
    """Variances (K, d) along the axes (K, d, d) of covariances; detached unless they are variances already."""
    if covs.dim() == 2:
        return covs, torch.eye(covs.shape[-1], dtype=D, device=covs.device).expand(len(covs), -1, -1)
    values, Q = torch.linalg.eigh(covs.detach())
    return values.clamp(min=0.0), Q


def scatter(z: Tensor, means: Tensor, covs: Tensor) -> Tensor:
    """m_k + C_k^(1/2) z, (n, K, d), from normals z (n, d); detached."""
    variances, Q = axes(covs)
    return (means + torch.einsum("nd,kde,ke,kfe->nkf", z, Q, variances.sqrt(), Q)).detach()


def pull(covs: Tensor, a: Tensor) -> Tensor:
    """C_k a, (K, d)."""
    return covs * a if covs.dim() == 2 else covs @ a
