"""The Euler-Maruyama chain of an SDE as a law: the Gaussian draw, n_steps times.

    z = (X_0, ..., X_N),   X_{n+1} = mu_n + s_n sqrt(dt) eps_n,    mu_n = X_n + b_n dt,           (1)
    log q(z) = sum_n log N(X_{n+1}; mu_n, s_n s_n' dt).                                          (2)

Its pathwise gradient is that of `sdesens.sensitivity`, and the gradient of (2), the score, is the likelihood ratio of the
chain. With one step and constant coefficients it is `Normal`.

(2) needs noise in every direction: as many Brownian motions as components, and no zero diffusion. The score of a diffusion
coefficient, and of the initial state, has a variance of order 1 / dt.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sdesens.errors import ArgumentError, MethodError
from sdesens.estimators.gaussian import MultivariateNormal, Normal
from sdesens.estimators.laws import EVERYWHERE, Shape
from sdesens.integrate.chunk import Dynamics, steps
from sdesens.problem import Problem, Theta
from sdesens.sde import require_euler


@dataclass(frozen=True, eq=False)
class Chain:
    """The path of a problem at theta; a draw is (n_steps + 1, *event), the states on the whole grid."""

    problem: Problem
    theta: Theta
    noise_dim: int
    reparameterised: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = EVERYWHERE

    @property
    def noise(self) -> Shape:
        return (self.problem.n_steps, self.noise_dim)

    @property
    def steps(self) -> int:
        return self.problem.n_steps

    @property
    def _dynamics(self) -> Dynamics:
        q = self.problem
        return Dynamics(q.sde, q.params(self.theta), q.t0, q.step_size(self.theta))

    @property
    def _start(self) -> Tensor:
        return self.problem.initial(self.theta)

    def draw(self, eps: Tensor) -> Tensor:
        y0 = self._start.expand(eps.shape[0], *self._start.shape)
        return torch.stack([y0, *steps(self._dynamics, 0, y0, eps.unbind(1))], 1)

    def log_prob(self, z: Tensor) -> Tensor:
        """Equation (2), summed over steps: shape (L,)."""
        require_euler(self.problem.sde, "the density of a chain")
        return sum(self._transition(n, z).reshape(len(z), -1).sum(1) for n in range(self.steps))  # type: ignore[return-value]

    def _transition(self, n: int, z: Tensor) -> Tensor:
        """Log density of the step from X_n to X_{n+1}."""
        move, y = self._dynamics, z[:, n]
        t, dt = (move.t0 + n * move.dt).to(y.dtype), move.dt.to(y.dtype)
        mean = y + move.sde.drift(t, y, move.p) * dt
        s = move.sde.diffusion(t, y, move.p) * dt.sqrt()
        if move.sde.noise_type == "diagonal":
            return Normal(mean, s.abs()).log_prob(z[:, n + 1])  # a volatility's sign goes into the noise
        s = s.expand(*y.shape, s.shape[-1])
        factor = torch.linalg.cholesky(s @ s.mT)
        return MultivariateNormal(mean, factor).log_prob(z[:, n + 1])

    def fixed(self, z: Tensor) -> Tensor:
        """All states held fixed but the first, which is a parameter and no draw."""
        y0 = self._start.expand(z.shape[0], 1, *self._start.shape)
        return torch.cat((y0, z[:, 1:].detach()), 1)

    def no_density(self) -> str | None:
        try:
            with torch.no_grad():
                z = self.draw(torch.ones(1, *self.noise, dtype=self._start.dtype, device=self._start.device))
                finite = bool(torch.isfinite(self.log_prob(z)).all())
        except MethodError as error:
            return str(error)
        except (torch.linalg.LinAlgError, ArgumentError):
            finite = False
        return None if finite else "a component of the SDE has no noise of its own, so its transitions have no density"
