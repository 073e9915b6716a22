"""How a draw moves with the parameters while its noise stays: dz/dp of z = g(eps; p).

For a Gaussian, dz/dmean = 1 and dz/dscale = eps. That is all the pathwise estimator knows of the law.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.func import jacrev, vmap

from sdesens.errors import MethodError
from sdesens.estimators.methods import choose
from sdesens.estimators.model import ask, detached
from sdesens.estimators.run import Task, check_multiple, noise_of
from sdesens.noise import Noise


class SampleTangents(NamedTuple):
    """Draws (B, *event), the noise (B, *noise) they are made of, and by name their derivatives (B, *event, *shape)."""

    z: Tensor
    eps: Tensor
    tangents: dict[str, Tensor]


def sample_tangents(
    model: Any,
    params: Mapping[str, Tensor],
    *,
    n_samples: int,
    wrt: Sequence[str] | str | None = None,
    seed: int | None = None,
    noise: Noise | None = None,
) -> SampleTangents:
    """How each draw moves with the parameters, its noise held fixed: dz/dp of z = g(eps; p).

    Raises
    ------
    MethodError
        If the draw is not a function of noise.

    Example
    -------
    >>> import torch
    >>> from sdesens.estimators import Normal
    >>> params = {"mean": torch.tensor(1.0), "scale": torch.tensor(2.0)}
    >>> draws = sample_tangents(Normal, params, n_samples=5)
    >>> bool((draws.tangents["mean"] == 1).all()), bool((draws.tangents["scale"] == draws.eps).all())
    (True, True)
    """
    question = detached(ask(model, _nothing, params, wrt, None))
    law = question.law(question.theta)
    task = Task(question, choose("pathwise", {}, law, False, 2), noise_of(seed, noise), law, True)
    if task.opaque:
        raise MethodError(
            f"the draws of {type(law).__name__} are not made from our noise: their derivatives are inside torch's rsample."
        )
    check_multiple(n_samples, task.unit)
    eps, extra = task.normals(0, n_samples)

    def one(theta: Mapping[str, Tensor], e: Tensor) -> tuple[Tensor, Tensor]:
        z = task.draws(theta, e[None], extra[:1], None).made()[0]
        return z, z

    tangents, z = vmap(jacrev(one, has_aux=True), in_dims=(None, 0))(question.theta, eps)
    return SampleTangents(z, eps, tangents)


def _nothing(z: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """An f: a question needs one, and this one's is never asked."""
    return z.flatten(1).sum(1)
