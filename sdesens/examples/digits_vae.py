"""A small variational autoencoder on scikit-learn's digits, trained by the pathwise estimator.

    ELBO(x) = E_{z ~ q(z|x)}[ log p(x|z) ] - KL( q(z|x) || N(0, I) ),    q(z|x) = Normal(mean(x), scale(x))        (1)

64 pixels, 16 latent numbers, 64 pixels, with one hidden layer on either side. A pixel's grey level 0 ... 16 is taken as a probability,
the usual continuous Bernoulli shorthand. The expectation is `sdesens.estimators.surrogate` with the image as the item that the law is
conditioned on; nothing else differs from a training loop in plain torch, which is what `reference_loss` is there to show.
Reference: D. Kingma, M. Welling, ICLR 2014.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits

from sdesens.estimators import ExpectationGradient, Normal, expectation_gradient, surrogate
from sdesens.sde import Params

PIXELS, HIDDEN, LATENT = 64, 64, 16


class VAE(nn.Module):
    """Encoder x -> (mean, log scale) of q(z|x); decoder z -> logits of the pixels."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, PIXELS))

    def forward(self, method: str, *inputs: Tensor):
        """One of the methods below, so that `functional_call` can reach it."""
        return getattr(self, method)(*inputs)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of q(z|x), (N, LATENT) both."""
        mean, log_scale = self.encoder(x).chunk(2, -1)
        return mean, log_scale.exp()

    def log_likelihood(self, z: Tensor, x: Tensor) -> Tensor:
        """log p(x|z) of each row, shape (N,)."""
        return -binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(-1)


def kl(mean: Tensor, scale: Tensor) -> Tensor:
    """KL divergence of q(z|x) from the standard normal, shape (N,)."""
    return 0.5 * (mean.square() + scale.square() - 1 - 2 * scale.log()).sum(-1)


def question(vae: VAE):
    """(1) as model, f and parameters: f = KL - log p(x|z), whose expectation is the negative ELBO."""

    def call(p: Params, method: str, *inputs: Tensor):
        return functional_call(vae, dict(p), (method, *inputs))

    def model(x: Tensor, p: Params) -> Normal:
        return Normal(*call(p, "posterior", x))

    def f(z: Tensor, x: Tensor, p: Params) -> Tensor:
        return kl(*call(p, "posterior", x)) - call(p, "log_likelihood", z, x)

    return model, f, dict(vae.named_parameters())


def loss(vae: VAE, x: Tensor, seed: int, n_samples: int = 1) -> Tensor:
    """Negative ELBO of a batch by our estimator, to call backward() on."""
    return surrogate(*question(vae), x=x, n_samples=n_samples, seed=seed)


def reference_loss(vae: VAE, x: Tensor, seed: int, n_samples: int = 1) -> Tensor:
    """The same in plain torch."""
    mean, scale = vae.posterior(x)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        z = torch.distributions.Normal(mean, scale).rsample((n_samples,))
    rows = vae.log_likelihood(z.flatten(0, 1), x.repeat(n_samples, 1))
    return kl(mean, scale).mean() - rows.mean()


def batch_gradient(vae: VAE, x: Tensor, method: str, n_samples: int, seed: int = 0, **options) -> ExpectationGradient:
    """The gradient of a batch with its standard errors, by any estimator."""
    return expectation_gradient(
        *question(vae), x=x, n_samples=n_samples, method=method, seed=seed, check=False, **options
    )


@dataclass(frozen=True)
class Digits:
    """Images (N, 64) in [0, 1]: four fifths to train on, one fifth to test on."""

    train: Tensor
    test: Tensor


def digits() -> Digits:
    """Scikit-learn's 1,797 scans of handwritten digits, in a fixed random order."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().data / 16.0).float()
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return Digits(images[:1437], images[1437:])


def train(loss_function=loss, *, seed: int = 0, epochs: int = 40, batch: int = 96, rate: float = 3e-3) -> VAE:
    """Train with Adam; initial weights, order and noise depend on the seed alone."""
    images = digits().train
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = VAE()
    optimiser = torch.optim.Adam(vae.parameters(), lr=rate)
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for step, rows in enumerate(torch.randperm(len(images), generator=order).split(batch)):
            optimiser.zero_grad()
            loss_function(vae, images[rows], seed * 1_000_000 + epoch * 1_000 + step).backward()
            optimiser.step()
    return vae


@torch.no_grad()
def held_out_elbo(vae: VAE, n_samples: int = 50) -> float:
    """Mean ELBO of the test images, in nats."""
    return -float(reference_loss(vae, digits().test, 0, n_samples))
