"""Predictors made of predictors: guidance, and clipping on request.

    guided    eps = eps_u + w (eps_c - eps_u)                                                     (1)
    clipped   x_0 <- clamp(x_0), and eps = (x - alpha x_0) / sigma with the clamped x_0           (2)

(1) is classifier-free guidance (J. Ho, T. Salimans, 2207.12598; their w is ours minus 1). In (2) eps must follow: clipping x_0
and keeping eps drives samples away from the data.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdesens.diffusion.conversions import above_zero
from sdesens.diffusion.predict import Denoiser, Predictor
from sdesens.diffusion.values import like, rebound
from sdesens.errors import ArgumentError, ArgumentTypeError
from sdesens.sde import check_parameter

OTHER = "unconditional."


@dataclass(frozen=True, eq=False)
class Guided(Predictor):
    """Classifier-free guidance, equation (1).

    Parameters
    ----------
    conditional, unconditional : Predictor
        On one schedule. For one network with a null condition there is `guide`.
    scale : number or 0-dim Tensor
        w: 1 is plain conditional sampling, 0 unconditional. A parameter, called "guidance".

    Parameters that both branches share go by one name; those that only the unconditional one has, by "unconditional.<name>" if
    the name is taken.
    """

    conditional: Predictor
    unconditional: Predictor
    scale: float | Tensor

    def __post_init__(self):
        for name in ("conditional", "unconditional"):
            branch = getattr(self, name)
            if not isinstance(branch, Predictor):
                raise ArgumentTypeError(
                    f"`{name}` must be a Denoiser or another predictor, got {type(branch).__name__}: guidance needs both branches."
                )
            if "guidance" in branch.params:
                raise ArgumentError(
                    f"`{name}` is guided already, and both scales would be called 'guidance': state the combination as a Predictor of its own."
                )
        if not self.conditional.schedule.same_as(self.unconditional.schedule):
            raise ArgumentError("`conditional` and `unconditional` are made for two schedules: give both the same one.")
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float | Tensor):
            raise ArgumentTypeError(f"`scale` must be a number or a 0-dim tensor, got {self.scale!r:.60}.")
        scale = self.scale if isinstance(self.scale, Tensor) else torch.tensor(float(self.scale), dtype=torch.float64)
        check_parameter("guidance", scale)
        object.__setattr__(self, "scale", scale)

    @property
    def schedule(self):  # type: ignore[override]
        return self.conditional.schedule

    @property
    def params(self):
        own = self.conditional.params
        return {**{self._name(k): v for k, v in self._rest().items()}, **own, "guidance": self.scale}

    def with_params(self, p):
        conditional = self.conditional.with_params(p)
        rest = {k: p[self._name(k)] for k in self._rest() if self._name(k) in p}
        unconditional = self.unconditional.with_params({**rest, **conditional.schedule.params})
        scale = p.get("guidance", self.scale)
        return rebound(self, conditional=conditional, unconditional=unconditional, scale=scale)

    def pair(self, x, t):
        w = like(torch.as_tensor(self.scale), x)
        c, u = self.conditional.pair(x, t), self.unconditional.pair(x, t)
        return u[0] + w * (c[0] - u[0]), u[1] + w * (c[1] - u[1])

    def _rest(self) -> dict[str, Tensor]:
        """Parameters of the unconditional branch other than the schedule's."""
        return {k: v for k, v in self.unconditional.params.items() if k not in self.schedule.params}

    def _name(self, name: str) -> str:
        """What a parameter of the unconditional branch is called here."""
        theirs = self.conditional.params.get(name)
        return name if theirs is None or theirs is self.unconditional.params[name] else OTHER + name


def guide(denoiser: Denoiser, scale: float | Tensor, cond) -> Guided:
    """Classifier-free guidance with one network: its condition against its null condition.

    Parameters
    ----------
    denoiser : Denoiser
        With `null`, the condition that means "none".
    scale : number or 0-dim Tensor
        1 is plain conditional sampling.
    cond : Tensor or number
        Shape (B, ...), or () for one that all rows share.

    Raises
    ------
    ArgumentError
        If the denoiser has no unconditional branch.

    Example
    -------
    >>> from sdesens.diffusion import VP
    >>> net = lambda x, t, label: x * label[:, None]
    >>> twice = guide(Denoiser(net, VP(), "eps", null=torch.tensor(0.0)), scale=2.0, cond=torch.tensor(1.0))
    >>> twice.eps(torch.ones(1, 1), 0.5)
    tensor([[2.]])
    """
    if not isinstance(denoiser, Denoiser):
        raise ArgumentTypeError(
            f"`denoiser` must be a Denoiser, got {type(denoiser).__name__}: Guided(c, u, scale) takes any two predictors."
        )
    if denoiser.null is None:
        raise ArgumentError(
            "`denoiser` has no unconditional branch: give it `null`, the condition it saw where labels were dropped in training, or "
            "use Guided(conditional, unconditional, scale) with two models."
        )
    return Guided(denoiser.given(cond), denoiser.given(denoiser.null), scale)


@dataclass(frozen=True, eq=False)
class Clipped(Predictor):
    """A predictor whose x_0 stays within bounds, equation (2). Nothing is clipped unless this is asked for.

    Parameters
    ----------
    inner : Predictor
    low, high : float
        Bounds of the data.
    """

    inner: Predictor
    low: float
    high: float

    def __post_init__(self):
        if not isinstance(self.inner, Predictor):
            raise ArgumentTypeError(
                f"`inner` must be a Denoiser or another predictor, got {type(self.inner).__name__}."
            )
        if not self.low < self.high:
            raise ArgumentError(f"`low` must be below `high`, got {self.low!r} and {self.high!r}.")

    @property
    def schedule(self):  # type: ignore[override]
        return self.inner.schedule

    @property
    def params(self):
        return self.inner.params

    def with_params(self, p):
        return rebound(self, inner=self.inner.with_params(p))

    def pair(self, x, t):
        t = above_zero(self.schedule, self.schedule.time(t))
        x0 = self.inner.x0(x, t).clamp(self.low, self.high)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return x0, (x - like(alpha, x) * x0) / like(sigma, x)
