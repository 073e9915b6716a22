"""Predictors: what tells clean data and noise apart at x_t; and the network together with what it predicts.

What a network returns is converted by `conversions.py`. A preconditioned one returns F: with data of standard deviation sd and
z = x/alpha = x_0 + r eps, r = sigma/alpha,

    x_0 = c_skip z + c_out F(c_in z, c_noise),   c_skip = sd^2/(r^2 + sd^2),   c_out = r sd/sqrt(r^2 + sd^2),
    c_in = 1/sqrt(r^2 + sd^2),   c_noise = log(r)/4,                                                           (1)

so that F = a x_0 + b eps with a = (1 - c_skip)/c_out and b = -c_skip r/c_out. With sd = 1, F is v up to its sign.

Reference: T. Karras et al., 2206.00364.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sdesens.diffusion.checks import number
from sdesens.diffusion.conversions import (
    NEEDS_SIGNAL,
    SILENT,
    above_zero,
    check_prediction,
    combination,
    combine,
    split,
)
from sdesens.diffusion.schedule import Schedule, check_schedule
from sdesens.diffusion.values import like, rebound, shown
from sdesens.errors import ArgumentError, ArgumentTypeError, DtypeError, NotAFunctionError, ShapeError
from sdesens.modules import Lent
from sdesens.sde import Params, check_parameter
from sdesens.tensors import concrete, describe, writes

NET = "net."


class Predictor(ABC):
    """What tells clean data and noise apart: a network, an exact law, or a combination of predictors.

    It has a `schedule`, and is a pure function of x, t and its parameters.
    """

    schedule: Schedule

    @abstractmethod
    def pair(self, x: Tensor, t) -> tuple[Tensor, Tensor]:
        """Estimates of x_0 and eps, each (B, *event), at x (B, *event) and t of shape () or (B,)."""

    @property
    @abstractmethod
    def params(self) -> dict[str, Tensor]:
        """All parameters by name, the schedule's among them."""

    @abstractmethod
    def with_params(self, p: Params) -> "Predictor":
        """The same predictor at the values that p has for its parameters; other names are left alone."""

    def x0(self, x: Tensor, t) -> Tensor:
        """E[x_0 | x_t = x]: the denoised data, (B, *event)."""
        return self.pair(x, t)[0]

    def eps(self, x: Tensor, t) -> Tensor:
        """E[eps | x_t = x], (B, *event)."""
        return self.pair(x, t)[1]

    def score(self, x: Tensor, t) -> Tensor:
        """grad log p_t(x) = -eps / sigma, (B, *event)."""
        return self._as("score", x, t)

    def v(self, x: Tensor, t) -> Tensor:
        """(alpha eps - sigma x_0) / sqrt(alpha^2 + sigma^2), (B, *event)."""
        return self._as("v", x, t)

    def velocity(self, x: Tensor, t) -> Tensor:
        """alpha' x_0 + sigma' eps, the right-hand side of the probability-flow ODE, (B, *event)."""
        return self._as("velocity", x, t)

    def _as(self, prediction: str, x: Tensor, t) -> Tensor:
        return combine(*self.pair(x, t), combination(prediction, self.schedule, self.schedule.time(t)))


def check_predictor(name: str, value) -> None:
    """Raise ArgumentTypeError unless this is a predictor."""
    if not isinstance(value, Predictor):
        raise ArgumentTypeError(
            f"`{name}` must be a Denoiser or another predictor, got {type(value).__name__}: Denoiser(net, schedule, prediction) says what "
            "a network predicts."
        )


@dataclass(frozen=True, eq=False, repr=False)
class Denoiser(Predictor):
    """A network together with what it predicts.

    Parameters
    ----------
    net : nn.Module or callable (x, t) -> Tensor
        x is (B, *event), t is (B,) in x's dtype, at least float32; returns (B, *event). With `cond` it is called as net(x, t, cond), and a
        function with `parameters` gets them last.
    schedule : Schedule
    prediction : {"eps", "x0", "v", "score", "velocity"}
        What `net` returns.
    sigma_data : float, instead of `prediction`
        The network is preconditioned by equation (1), for data of this standard deviation: it is called with (c_in z,
        c_noise) and returns F.
    cond : Tensor, optional
        The condition: shape (B, ...), or () for one that all rows share.
    null : Tensor, optional
        The condition that means "none", for classifier-free guidance.
    parameters : mapping of str to Tensor, optional
        Parameters of a network that is a function. An nn.Module brings its own. They are called "net.<name>".

    Raises
    ------
    ArgumentError
        For a prediction that says nothing about x_0 at the schedule's end, where no signal is left.

    Example
    -------
    >>> from sdesens.diffusion import VP
    >>> denoiser = Denoiser(lambda x, t: x * VP().sigma(t)[:, None], VP(), "eps")  # exact for N(0, I)
    >>> x = torch.ones(2, 3, dtype=torch.float64)
    >>> bool(torch.allclose(denoiser.score(x, 0.5), -x))
    True
    """

    net: Callable[..., Tensor]
    schedule: Schedule
    prediction: str | None = None
    sigma_data: float | Tensor | None = None
    cond: Tensor | None = None
    null: Tensor | None = None
    parameters: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        if not callable(self.net):
            raise ArgumentTypeError(f"`net` must be a module or a function of (x, t), got {self.net!r:.60}.")
        check_schedule("schedule", self.schedule)
        if (self.prediction is None) == (self.sigma_data is None):
            raise ArgumentError(
                "give `prediction`, what the network returns, or `sigma_data` for a preconditioned one."
            )
        if self.prediction is not None:
            check_prediction(self.prediction)
        else:
            number("sigma_data", self.sigma_data, 0.0, hint="it is the data's standard deviation")
        if self.schedule.zero_terminal_snr and not self._tells_x0_at_the_end():
            raise ArgumentError(
                f"{self.schedule!r} has no signal left at t = {self.schedule.t_max:g}, so that {self.prediction or 'a preconditioned net'!r} says "
                "nothing about x0 there: predict 'v' or 'x0' (or 'velocity' with CondOT), or end the schedule sooner (CondOT(end=0.999), "
                "Cosine(min_log_snr=-20))."
            )
        if not isinstance(self.parameters, Mapping):
            raise ArgumentTypeError(f"`parameters` must map names to tensors, got {self.parameters!r:.60}: use a dict.")
        if isinstance(self.net, nn.Module) and self.parameters:
            raise ArgumentError("`parameters` are for a network that is a function: a module brings its own.")
        for name, value in self.parameters.items():
            check_parameter(name, value)
        for name in ("cond", "null"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), Tensor):
                raise ArgumentTypeError(
                    f"`{name}` must be a tensor, got {getattr(self, name)!r:.60}: use torch.tensor(...)."
                )
        if clash := self.schedule.params.keys() & {NET + k for k in self.weights}:
            raise ArgumentError(
                f"schedule and network both have parameters called {sorted(clash)}: rename the schedule's."
            )

    @property
    def weights(self) -> dict[str, Tensor]:
        """The network's parameters by its own names: a module's as they are now, unless others are lent to it."""
        own = dict(self.net.named_parameters()) if isinstance(self.net, nn.Module) else {}
        return {**own, **self.parameters}

    @property
    def params(self):
        return {**self.schedule.params, **{NET + k: v for k, v in self.weights.items()}}

    def with_params(self, p):
        schedule = self.schedule.with_params(p)
        found = {k: p[NET + k] for k, v in self.weights.items() if NET + k in p and p[NET + k] is not v}
        if schedule is self.schedule and not found:
            return self
        return rebound(self, schedule=schedule, parameters={**self.parameters, **found})

    def __repr__(self) -> str:
        what = repr(self.prediction) if self.sigma_data is None else f"sigma_data={shown(self.sigma_data)}"
        size = sum(v.numel() for v in self.weights.values() if not is_lazy(v))
        name = getattr(self.net, "__name__", type(self.net).__name__)
        return f"Denoiser({name} of {size} parameters, {self.schedule!r}, {what})"

    def _tells_x0_at_the_end(self) -> bool:
        """Whether x_0 can be told from the prediction at t_max, where alpha = 0: D is b alpha - a sigma = -a sigma."""
        if self.prediction in (*NEEDS_SIGNAL, None):
            return False
        with torch.no_grad():
            a, _ = self.combination(self.schedule.t_max)
            return bool((a * self.schedule.sigma(self.schedule.t_max)).abs() >= SILENT)

    def given(self, cond: Tensor) -> "Denoiser":
        """The same denoiser under a condition: shape (B, ...), or () for one that all rows share."""
        return rebound(self, cond=torch.as_tensor(cond))

    def raw(self, x: Tensor, t) -> Tensor:
        """What the network returns, (B, *event): `prediction`, or F of equation (1)."""
        t = self.schedule.time(t)
        if self.sigma_data is not None:
            alpha = self.schedule._alpha(t)
            r = self.schedule._sigma(t) / alpha
            return self._call(x * like(1 / (alpha * torch.sqrt(r**2 + self.sigma_data**2)), x), torch.log(r) / 4)
        return self._call(x, t)

    def combination(self, t) -> tuple[Tensor, Tensor]:
        """a and b of what the network returns, a x_0 + b eps, at times t."""
        t = self.schedule.time(t)
        if self.sigma_data is None:
            assert self.prediction is not None  # one of the two is given
            return combination(self.prediction, self.schedule, t)
        r, sd = self.schedule._sigma(t) / self.schedule._alpha(t), self.sigma_data
        c_skip, c_out = sd**2 / (r**2 + sd**2), r * sd / torch.sqrt(r**2 + sd**2)
        return (r**2 / (r**2 + sd**2)) / c_out, -c_skip * r / c_out

    def pair(self, x, t):
        t = above_zero(self.schedule, self.schedule.time(t))
        return split(self.raw(x, t), x, t, self.schedule, self.combination(t))

    def _call(self, x: Tensor, t: Tensor) -> Tensor:
        like(t, x)  # one time for all rows, or one each
        wide = torch.promote_types(x.dtype, torch.float32)  # bfloat16 would move t by 2e-3
        if not concrete(x) or x.is_inference():
            x = x.clone()  # torch does not count what is written here: the network gets a copy of its own
        args = [x, t.to(x.device, wide).expand(len(x)).clone()]
        if self.cond is not None:
            args.append(self._rows(self.cond.to(x.device), len(x)))
        elif self.null is not None:
            raise ArgumentError(
                "the denoiser has `null` but no condition: use denoiser.given(cond), or guide(denoiser, scale, cond)."
            )
        theirs = (x, *args[2:])  # the times are the network's own
        before = [writes(a) for a in theirs]
        try:
            out = self._answer(args)
        except RuntimeError as error:
            if "in-place operation" in str(error):
                raise NotAFunctionError(
                    f"`net` writes into its input: use inplace=False, or work on a copy. torch says: {error}"
                ) from error
            weights = {v.dtype for v in self.weights.values()} - {x.dtype}
            if not weights or torch.is_autocast_enabled(x.device.type):
                raise
            raise DtypeError(
                f"`net` failed on states in {x.dtype}, and its weights are {', '.join(map(str, weights))}: give both one dtype, "
                f"net.to(...) or x.to(...), or use torch.autocast. torch says: {error}"
            ) from error
        if [writes(a) for a in theirs] != before:
            raise NotAFunctionError(
                "`net` writes into its input, x or the condition: use inplace=False, or work on a copy."
            )
        if not isinstance(out, Tensor) or out.shape != x.shape or out.is_complex():
            raise ShapeError(
                f"`net` must return a real tensor of the shape of x, {tuple(x.shape)}, got {describe(out)}: one value an entry, no "
                "learned variance beside it."
            )
        return out.to(x.dtype)

    def _answer(self, args: list[Tensor]):
        if isinstance(self.net, nn.Module):
            return Lent(self.net, tuple(self.parameters))(self.parameters, *args)
        return self.net(*args, self.parameters) if self.parameters else self.net(*args)

    @staticmethod
    def _rows(cond: Tensor, n: int) -> Tensor:
        if cond.dim() and len(cond) != n:
            raise ShapeError(
                f"`cond` has {len(cond)} rows for a batch of {n}: give one a row, or a 0-dim tensor that all rows share."
            )
        return cond if cond.dim() else cond.expand(n)
