"""Errors and warnings, named after what went wrong.

Every error names the argument, says what came and what was wanted, and ends with the remedy. All derive
from `SdesensError`; most are also a `ValueError`, so that code which expects one keeps working.
"""


class SdesensError(Exception):
    """Base of every error this library raises on purpose."""


class ArgumentError(SdesensError, ValueError):
    """An argument has a value that makes no sense here."""


class ArgumentTypeError(SdesensError, TypeError):
    """An argument has the wrong type, or its name is unknown."""


class ShapeError(ArgumentError):
    """A tensor has the wrong shape, or a function returned one."""


class DtypeError(ArgumentTypeError):
    """A tensor has the wrong dtype, or a function returned one."""


class GridError(ArgumentError):
    """Times do not increase, or do not lie on the grid."""


class NoiseStructureError(ArgumentError):
    """The diffusion does not have the structure that `noise_type` declares."""


class CalculusError(ArgumentError):
    """An Ito scheme was given a Stratonovich equation, or the other way round."""


class NotAFunctionError(ArgumentError):
    """A coefficient or functional is not a function of its arguments alone, path by path."""


class UnknownParameterError(ArgumentError):
    """A name in `wrt` is not a parameter."""


class UnusedParameterError(ArgumentError):
    """The result cannot depend on a parameter in `wrt`."""


class DetachedError(ArgumentError):
    """A functional returned a tensor that is cut off from the path and from the parameters."""


class JumpError(ArgumentError):
    """A function jumps where a derivative is to be taken: the derivative exists almost everywhere and misses the jump."""


class KinkError(JumpError):
    """A second derivative is to be taken where the first one jumps."""


class MethodError(ArgumentError):
    """A gradient method cannot be used for this model."""


class NonFiniteError(SdesensError, ArithmeticError):
    """A path, a parameter or a functional became infinite or NaN.

    Attributes
    ----------
    paths : tuple of int
        Indices of the first few bad paths (empty where no path is to blame).
    n_bad : int
        How many paths are bad among those that were looked at.
    step : int or None
        The first step after which one of them is bad; None if no step is to blame.
    time : float or None
        The time at the end of that step.
    """

    def __init__(
        self,
        message: str,
        *,
        paths: tuple[int, ...] = (),
        n_bad: int = 0,
        step: int | None = None,
        time: float | None = None,
    ):
        super().__init__(message)
        self.paths, self.n_bad, self.step, self.time = paths, n_bad, step, time

    def __reduce__(self):  # keyword-only fields must survive a process boundary
        return _rebuild_non_finite, (str(self), self.paths, self.n_bad, self.step, self.time)


def _rebuild_non_finite(message, paths, n_bad, step, time):
    return NonFiniteError(message, paths=paths, n_bad=n_bad, step=step, time=time)


class ZeroGradientWarning(UserWarning):
    """A gradient is exactly zero on every path: a functional with a jump looks like this."""


class JumpWarning(UserWarning):
    """A function jumps where a derivative is taken all the same: what it adds is missing."""


class HighVarianceWarning(UserWarning):
    """The number is unbiased but varies much: a steep functional, or one whose derivative is singular."""


class HeavyTailWarning(UserWarning):
    """The variance of a gradient looks infinite: its standard error means nothing."""


class SlowPathWarning(UserWarning):
    """The result is right, but a slower way had to be taken to it."""


class PriorGapWarning(UserWarning):
    """A diffusion schedule leaves so much signal at its end that sampling would start from the wrong law."""


class MemoryWarning(UserWarning):
    """A sampler remembers its starting noise, so that tuning it by adjoint matching aims at the wrong law."""


class CheckpointError(ArgumentError):
    """A checkpoint is missing, incomplete, altered, or of another run."""


class CheckpointWarning(UserWarning):
    """A checkpoint was refused, and the one before it is used."""
