"""Normal laws: z = mean + scale eps, what is made of it by exp, and correlated components."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sdesens.errors import ArgumentError, ShapeError
from sdesens.estimators.laws import Plain, Shape, check_tensors
from sdesens.tensors import concrete


@dataclass(frozen=True, eq=False)
class Normal(Plain):
    """Independent normals: z = mean + scale eps.

    Parameters
    ----------
    mean, scale : Tensor, one shape (or shapes that broadcast)
        scale > 0 is a standard deviation, not a variance.

    Raises
    ------
    ArgumentTypeError, ArgumentError, ShapeError

    Example
    -------
    >>> Normal(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])).draw(torch.tensor([[0.0, 1.0]]))
    tensor([[1., 5.]])
    """

    mean: Tensor
    scale: Tensor
    reparameterised: ClassVar[bool] = True

    def __post_init__(self):
        check_tensors(self, mean=self.mean, scale=self.scale)
        _broadcast(self, mean=self.mean, scale=self.scale)
        _check_positive("scale", self.scale)

    @property
    def shape(self) -> Shape:
        return tuple(torch.broadcast_shapes(self.mean.shape, self.scale.shape))

    def draw(self, eps: Tensor) -> Tensor:
        return self.mean + self.scale * eps

    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * ((z - self.mean) / self.scale).square() - self.scale.log() - 0.5 * math.log(2 * math.pi)

    def gaussian(self) -> "tuple[Normal, Callable[[Tensor], Tensor]]":
        """The normal law beneath, and the map from its draws to ours."""
        return self, _same


@dataclass(frozen=True, eq=False)
class LogNormal(Plain):
    """Independent log-normals: z = exp(mean + scale eps).

    Parameters
    ----------
    mean, scale : Tensor
        Of log z, as for `Normal`.
    """

    mean: Tensor
    scale: Tensor
    reparameterised: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (0.0, math.inf)

    def __post_init__(self):
        Normal(self.mean, self.scale)  # raises for both

    @property
    def shape(self) -> Shape:
        return Normal(self.mean, self.scale).shape

    def draw(self, eps: Tensor) -> Tensor:
        return torch.exp(self.mean + self.scale * eps)

    def log_prob(self, z: Tensor) -> Tensor:
        return Normal(self.mean, self.scale).log_prob(z.log()) - z.log()

    def gaussian(self) -> tuple[Normal, Callable[[Tensor], Tensor]]:
        """The normal law of log z, and exp."""
        return Normal(self.mean, self.scale), torch.exp


@dataclass(frozen=True, eq=False)
class MultivariateNormal(Plain):
    """Correlated normals: z = mean + scale_tril eps, covariance scale_tril scale_tril'.

    Parameters
    ----------
    mean : Tensor, shape (..., d)
    scale_tril : Tensor, shape (..., d, d)
        A Cholesky factor: its lower triangle, with a positive diagonal. What stands above the diagonal is not looked at.
    """

    mean: Tensor
    scale_tril: Tensor
    reparameterised: ClassVar[bool] = True

    def __post_init__(self):
        check_tensors(self, mean=self.mean, scale_tril=self.scale_tril)
        d = self.mean.shape[-1] if self.mean.dim() else 0
        if d < 1 or self.scale_tril.shape[-2:] != (d, d):
            raise ShapeError(
                f"`mean` and `scale_tril` must have shapes (..., d) and (..., d, d), got {tuple(self.mean.shape)} and "
                f"{tuple(self.scale_tril.shape)}: for independent components use Normal."
            )
        _check_positive("scale_tril, on its diagonal,", self.scale_tril.diagonal(dim1=-2, dim2=-1))

    @property
    def shape(self) -> Shape:
        return tuple(torch.broadcast_shapes(self.mean.shape, self.scale_tril.shape[:-1]))

    def draw(self, eps: Tensor) -> Tensor:
        return self.mean + (self.scale_tril.tril() @ eps[..., None])[..., 0]

    def log_prob(self, z: Tensor) -> Tensor:
        factor, r = self.scale_tril.tril(), z - self.mean
        factor = factor.expand(*r.shape, r.shape[-1])
        u = torch.linalg.solve_triangular(factor, r[..., None], upper=False)[..., 0]
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * u.square().sum(-1) - log_det - 0.5 * r.shape[-1] * math.log(2 * math.pi)


def _same(z: Tensor) -> Tensor:
    return z


def _check_positive(name: str, value: Tensor) -> None:
    if concrete(value) and not bool((value > 0).all()):
        worst = float(value.detach().min())
        raise ArgumentError(
            f"`{name}` must be positive, its smallest entry is {worst!r}: it is a standard deviation; write it as "
            "exp or softplus of a free parameter."
        )


def _broadcast(law, **tensors: Tensor) -> None:
    try:
        torch.broadcast_shapes(*(v.shape for v in tensors.values()))
    except RuntimeError as error:
        shapes = " and ".join(f"`{k}` {tuple(v.shape)}" for k, v in tensors.items())
        raise ShapeError(f"the tensors of {type(law).__name__} do not fit each other: {shapes}.") from error
