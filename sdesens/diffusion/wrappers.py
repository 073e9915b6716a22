"""Predictors made of predictors: guidance, and clipping on request.

    guided    eps = eps_u + w (eps_c - eps_u)                                                     (1)
    clipped   x_0 <- clamp(x_0), and eps = (x - alpha x_0) / sigma with the clamped x_0           (2)

(1) is classifier-free guidance (J. Ho, T. Salimans, 2207.12598; their w is ours minus 1). In (2) eps must follow: clipping x_0
and keeping eps drives samples away from the data.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdesens.diffusion.checks import number, parameter
from sdesens.diffusion.conversions import above_zero
from sdesens.diffusion.predict import Denoiser, Predictor, check_predictor
from sdesens.diffusion.values import like, rebound
from sdesens.errors import ArgumentError, ArgumentTypeError

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

    Parameters that both branches share go by one name, the schedule's among them; those that only the unconditional one has, by
    "unconditional.<name>" if the name is taken.

    Raises
    ------
    ArgumentTypeError, ShapeError, ArgumentError
        For branches that are no predictors, a scale that is not one number, branches on two schedules or guided already.

    Example
    -------
    >>> from sdesens.diffusion import VP
    >>> c, u = (Denoiser(lambda x, t, k=k: k * x, VP(), "eps") for k in (1.0, 0.5))
    >>> Guided(c, u, 3.0).eps(torch.ones(1, 1), 0.5)
    tensor([[2.]])
    """

    conditional: Predictor
    unconditional: Predictor
    scale: float | Tensor

    def __post_init__(self):
        for name in ("conditional", "unconditional"):
            branch = getattr(self, name)
            check_predictor(name, branch)
            if "guidance" in branch.params:
                raise ArgumentError(
                    f"`{name}` is guided already, and both scales would be called 'guidance': state the combination as a Predictor of its own."
                )
        if not self.conditional.schedule.same_as(self.unconditional.schedule):
            raise ArgumentError("`conditional` and `unconditional` are made for two schedules: give both the same one.")
        one_schedule = self.unconditional.with_params(self.conditional.schedule.params)
        object.__setattr__(self, "unconditional", one_schedule)  # its values are the same, its tensors may be others
        object.__setattr__(self, "scale", parameter("scale", self.scale))

    @property
    def schedule(self):  # type: ignore[override]
        return self.conditional.schedule

    @property
    def params(self):
        theirs = self.unconditional.params
        rest = {here: theirs[name] for name, here in self._names().items()}
        return {**rest, **self.conditional.params, "guidance": self.scale}

    def with_params(self, p):
        conditional = self.conditional.with_params(p)
        rest = {name: p[here] for name, here in self._names().items() if here in p}
        unconditional = self.unconditional.with_params({**rest, **conditional.schedule.params})
        scale = p.get("guidance", self.scale)
        if conditional is self.conditional and unconditional is self.unconditional and scale is self.scale:
            return self
        return rebound(self, conditional=conditional, unconditional=unconditional, scale=scale)

    def pair(self, x, t):
        w = like(torch.as_tensor(self.scale), x)
        c, u = self.conditional.pair(x, t), self.unconditional.pair(x, t)
        return u[0] + w * (c[0] - u[0]), u[1] + w * (c[1] - u[1])

    def _names(self) -> dict[str, str]:
        """What the parameters of the unconditional branch, other than the schedule's, are called here."""
        own, theirs, shared = self.conditional.params, self.unconditional.params, self.schedule.params
        return {k: k if own.get(k, v) is v else OTHER + k for k, v in theirs.items() if k not in shared}


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
        Bounds of the data; either may be infinite.

    Raises
    ------
    ArgumentTypeError, ArgumentError
        For what is no predictor, or bounds that are no numbers or do not rise.

    Example
    -------
    >>> from sdesens.diffusion import VP
    >>> Clipped(Denoiser(lambda x, t: x, VP(), "x0"), -1.0, 1.0).x0(torch.tensor([[0.5, 3.0]]), 0.5)
    tensor([[0.5000, 1.0000]])
    """

    inner: Predictor
    low: float
    high: float

    def __post_init__(self):
        check_predictor("inner", self.inner)
        for name in ("low", "high"):
            object.__setattr__(
                self, name, number(name, getattr(self, name), ends=True, hint="it is a bound of the data")
            )
        if not self.low < self.high:
            raise ArgumentError(f"`low` must be below `high`, got {self.low!r} and {self.high!r}: swap or move them.")

    @property
    def schedule(self):  # type: ignore[override]
        return self.inner.schedule

    @property
    def params(self):
        return self.inner.params

    def with_params(self, p):
        inner = self.inner.with_params(p)
        return self if inner is self.inner else rebound(self, inner=inner)

    def pair(self, x, t):
        t = above_zero(self.schedule, self.schedule.time(t))
        x0 = self.inner.x0(x, t).clamp(self.low, self.high)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return x0, (x - like(alpha, x) * x0) / like(sigma, x)
