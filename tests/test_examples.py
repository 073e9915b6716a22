"""The example programs do what they say."""

import statistics

import pytest
import torch

from sdesens.examples.digits_vae import (
    VAE,
    batch_gradient,
    digits,
    held_out_elbo,
    loss,
    question,
    reference_loss,
    train,
)


def test_autoencoder_learns_as_well_as_with_plain_torch():
    """Ten epochs, three seeds. Pairs of runs with one seed differ by 0.14 nats (sd of six pairs), their mean of three by 0.08;
    0.35 is 4 sd. Forty epochs, six seeds: -25.03 nats both, sd 0.05 and 0.03."""
    ours, theirs = ([held_out_elbo(train(f, seed=s, epochs=10)) for s in range(3)] for f in (loss, reference_loss))
    assert abs(statistics.mean(ours) - statistics.mean(theirs)) < 0.35
    assert statistics.mean(ours) > -27.5  # the control: untrained it is below -43
    assert held_out_elbo(VAE()) < -40


def total_error(result, part):
    return sum(e.standard_error.square().sum().item() for k, e in result.gradient.items() if k.startswith(part)) ** 0.5


def test_standard_error_of_the_pathwise_gradient_is_a_tenth_of_the_score_functions():
    """Same batch, same draws. Of the encoder alone, and of all parameters; measured: 1/49 and 1/41 after forty epochs."""
    vae, x = train(epochs=5), digits().train[:96]
    path = batch_gradient(vae, x, "pathwise", 16)
    score = batch_gradient(vae, x, "score_function", 16)
    assert total_error(path, "encoder") < total_error(score, "encoder") / 10
    assert total_error(path, "") < total_error(score, "") / 10
    # the decoder's gradient is E[grad f] in both: the same number
    torch.testing.assert_close(
        path.gradient["decoder.0.weight"].mean, score.gradient["decoder.0.weight"].mean, rtol=1e-5, atol=1e-6
    )


def test_gradient_is_that_of_plain_torch_on_the_same_noise():
    """The mean over many draws, against autograd of the loss written by hand with our normals."""
    from sdesens import Philox

    torch.manual_seed(0)
    vae, x = VAE().double(), digits().train[:8].double()
    result = batch_gradient(vae, x, "pathwise", 40, seed=3)
    eps = Philox(3).normals(0, 320, 0, 1, 16, dtype=torch.float64, device=torch.device("cpu"))[0].reshape(40, 8, 16)
    mean, scale = vae.posterior(x)
    z = mean + scale * eps
    kl = 0.5 * (mean**2 + scale**2 - 1 - 2 * scale.log()).sum(-1)
    (kl.mean() - vae.log_likelihood(z.flatten(0, 1), x.repeat(40, 1)).mean()).backward()
    for k, v in vae.named_parameters():
        torch.testing.assert_close(result.gradient[k].mean, v.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 5])
def test_training_depends_on_the_seed_alone(seed):
    one, other = train(seed=seed, epochs=1), train(seed=seed, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_question_is_the_negative_elbo():
    vae, x = VAE(), digits().train[:4]
    model, f, params = question(vae)
    law = model(x, params)
    z = law.mean.detach()
    reference = 0.5 * (law.mean**2 + law.scale**2 - 1 - 2 * law.scale.log()).sum(-1) - vae.log_likelihood(z, x)
    torch.testing.assert_close(f(z, x, params), reference)
