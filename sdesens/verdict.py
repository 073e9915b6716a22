"""Do two gradients agree? The verdicts of `crosscheck`, one function a kind of evidence.

    relation      a route passes if, for every component,
    rounding      |g - g_ref| <= 1e3 u,          u = eps x rms of one path's gradient
    differences   |g - g_ref| <= 1e-6 rms (float64) plus the rounding of F in a difference quotient, or 0.05 standard errors
                  (a kink moves a few paths by much)
    statistics    |g - g_ref| <= 4.5 standard errors of the two together
    converges     the RMS over paths (and components) of G - G_ref falls at order >= 0.35 over two halvings of dt, or is
                  rounding
    scheme        |g_ref - exact| <= 4.5 standard errors, exact answer of the Euler-Maruyama chain
    closed form   the same for the SDE's answer, once the estimated bias is taken off

Where the functional jumps, routes along the path are shown but refused: they miss the jump. The reference is then one that does
not, and a functional that is watched between grid points by its conditional expectation alone is not held against the others.

With 4.5 standard errors a sound table of ten statistical checks raises a false alarm once in about 15,000 runs. A reference
that is exactly zero on every path fails, and so does a route that is not finite.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sdesens.estimate import Estimate
from sdesens.montecarlo import Sensitivity
from sdesens.refinement import Refinement
from sdesens.sensitivity.finite_difference import bump

ROUNDING_UNITS = 1e3
DIFFERENCE = 1e-6
STANDARD_ERRORS = 4.5
LEAST_ORDER = 0.35
RELATION = {
    "pathwise": "rounding",
    "forward": "rounding",
    "finite_difference": "differences",
    "adjoint": "converges",
    "torchsde_adjoint": "converges",
    "likelihood_ratio": "statistics",
    "malliavin": "statistics",
    "vibrato": "statistics",
    "conditional": "statistics",
}


@dataclass(frozen=True)
class Answer:
    """A known answer to hold the reference against.

    Attributes
    ----------
    value : Tensor, 0-dim
    gradient : dict of Tensor
        By parameter name.
    of_scheme : bool
        True for the Euler-Maruyama chain on this grid, False for the SDE.
    """

    value: Tensor
    gradient: Mapping[str, Tensor]
    of_scheme: bool


@dataclass(frozen=True)
class Comparison:
    """One line of the table: a route's gradient in one parameter, beside the reference's.

    For a parameter with several components the numbers are those of one, the same in every line about it: where some route
    is farthest from the reference. The verdict is about all.

    Attributes
    ----------
    method, parameter : str
    component : tuple of int
    gradient, standard_error, difference : float
        difference = gradient minus the reference's.
    rounding_units : float
        |difference| over eps x rms of one path's gradient; NaN where rounding is not the measure.
    standard_errors : float
        |difference| over the standard error it is judged by.
    verdict : str
    ok : bool or None
        None where it is not judged.
    """

    method: str
    parameter: str
    component: tuple[int, ...]
    gradient: float
    standard_error: float
    difference: float
    rounding_units: float
    standard_errors: float
    verdict: str
    ok: bool | None

    @property
    def name(self) -> str:
        """The parameter with its component, as in `A[0,1]`."""
        return self.parameter + (f"[{','.join(map(str, self.component))}]" if self.component else "")

    def cells(self, *, reference: bool) -> list[str]:
        """The five numbers as text."""
        numbers = [short(self.difference, sign=True), short(self.rounding_units), short(self.standard_errors)]
        return [f"{self.gradient:.8g}", short(self.standard_error), *(["", "", ""] if reference else numbers)]


@dataclass(frozen=True)
class Evidence:
    """What the verdicts about one parameter rest on.

    Attributes
    ----------
    name : str
    reference : str
        The method held against.
    results : dict of Sensitivity
        By method; those that failed are missing.
    at : tuple of int
        The component shown.
    eps : float
        Rounding unit of the computation's dtype.
    theta : Tensor
        The parameter's value.
    refinement : Refinement or None
    refused : tuple of str
        Methods that miss a jump of the functional.
    apart : bool
        Whether "conditional" estimates another number, of a path watched between grid points.
    """

    name: str
    reference: str
    results: Mapping[str, Sensitivity]
    at: tuple[int, ...]
    eps: float
    theta: Tensor
    refinement: Refinement | None
    refused: tuple[str, ...] = ()
    apart: bool = False

    @property
    def estimate(self) -> Estimate:
        return self.results[self.reference].gradient[self.name]

    @property
    def is_zero(self) -> bool:
        return not bool(self.estimate.mean.any()) and not bool(self.estimate.standard_error.any())


def farthest(name: str, reference: str, results: Mapping[str, Sensitivity]) -> tuple[int, ...]:
    """The component of a parameter in which some route is farthest from the reference."""
    ref = results[reference].gradient[name]
    gaps = torch.stack([(r.gradient[name].mean - ref.mean).abs() for r in results.values()]).amax(0)
    return _worst(gaps / rms(ref).clamp_min(1e-300))


def compare(method: str, e: Evidence) -> Comparison:
    """One method's line for one parameter."""
    g, ref = e.results[method].gradient[e.name], e.estimate
    gap, scale = (g.mean - ref.mean).abs(), rms(ref)
    units = gap / (e.eps * scale).clamp_min(1e-300)
    within = bool((units <= ROUNDING_UNITS).all())
    pair = {method, e.reference}
    relation = (
        "statistics" if "statistics" in {RELATION[m] for m in pair}
        else "differences" if "finite_difference" in pair
        else RELATION[method]
    )  # fmt: skip
    ok: bool | None
    if method in e.refused:
        ok, verdict = (False if method == e.reference else None), "refused: it misses the jump"
    elif e.apart and "conditional" in pair and len(pair) > 1:
        ok, verdict = None, "another number (grid only)"
    elif method == e.reference:
        zero = (ref.mean == 0) & (ref.standard_error == 0)
        some = f"; {int(zero.sum())} of {zero.numel()} components exactly zero" if bool(zero.any()) else ""
        ok, verdict = (False, "exactly zero on every path: a jump?") if e.is_zero else (True, "the reference" + some)
    elif e.is_zero and not bool(gap.any()):
        ok, verdict = None, "as zero as the reference"
    elif relation == "statistics":
        z = gap / (g.standard_error.square() + ref.standard_error.square()).sqrt().clamp_min(1e-300)
        ok, verdict = bool((z <= STANDARD_ERRORS).all()), f"{float(z.max()):.1f} std. errors of both"
    elif relation == "rounding":
        ok, verdict = within, "the same to rounding" if within else "not the same number"
    elif relation == "differences":
        ok, verdict = _difference(e, gap, scale)
    else:
        ok, verdict = (
            (True, "the same to rounding") if within else _convergence(method, e.name, gap / scale, e.refinement)
        )
    at = e.at
    return Comparison(
        method,
        e.name,
        at,
        float(g.mean[at]),
        float(g.standard_error[at]),
        float(g.mean[at] - ref.mean[at]),
        float(units[at]) if relation in ("rounding", "differences") or within else math.nan,
        float(gap[at] / ref.standard_error[at]),
        verdict,
        ok,
    )


def _difference(e: Evidence, gap: Tensor, scale: Tensor) -> tuple[bool, str]:
    rounding = 20 * e.eps * rms(e.results[e.reference].value) / bump(e.theta, e.eps).double()
    smooth = gap <= max(DIFFERENCE, 200 * e.eps ** (2 / 3)) * scale + rounding
    if bool(smooth.all()):
        return True, "the same to O(h^2)"
    if bool((smooth | (gap <= 0.05 * e.estimate.standard_error)).all()):
        return True, "within 0.05 std. errors"
    return False, "not the same derivative"


def _convergence(method: str, name: str, ratio: Tensor, refinement: Refinement | None) -> tuple[bool | None, str]:
    if refinement is None:
        return None, "O(dt^1/2) a path, not judged without refinement"
    off, order = f"{100 * float(ratio.max()):.2g} % of rms off", refinement.order_in(method, name)
    if order >= LEAST_ORDER:
        return True, f"{off}, order {order:.2f} in dt"
    return False, f"{off}, order {order:.2f}: does not converge"


def failed(method: str, name: str, at: tuple[int, ...], reason: str) -> Comparison:
    """The line of a method that gave no number."""
    nan = math.nan
    return Comparison(method, name, at, nan, nan, nan, nan, nan, reason, False)


def hold_against(label: str, answer: Answer, name: str, at: tuple[int, ...], result: Sensitivity) -> Comparison:
    """The reference beside a known answer, in one parameter or in "value"."""
    estimate = result.value if name == "value" else result.gradient[name]
    exact = (answer.value if name == "value" else answer.gradient[name]).detach().to(estimate.mean)
    mean, error = estimate.mean, estimate.standard_error
    if not answer.of_scheme:
        assert result.bias is not None
        mean = mean - result.bias[name].mean
        error = (error.square() + result.bias[name].standard_error.square()).sqrt()
    gap = ((mean - exact).abs() - 1e-12 * exact.abs()).clamp_min(0)
    z = torch.where(gap == 0, 0.0, gap / error)  # infinite where nothing is random and the answer is missed
    ok = bool((z <= STANDARD_ERRORS).all())
    worst = "" if not z.dim() or _worst(z) == at else f" at {list(_worst(z))}"
    verdict = f"{float(z.max()):.1f} std. errors{worst}" + ("" if answer.of_scheme else ", less the bias")
    return Comparison(
        label,
        name,
        at,
        float(exact[at]),
        math.nan,
        float(exact[at] - estimate.mean[at]),
        math.nan,
        float(z[at]),
        verdict,
        ok,
    )


def rms(e: Estimate) -> Tensor:
    """Root mean square of one path's number."""
    return (e.mean.square() + torch.nan_to_num(e.standard_error).square() * e.n).sqrt()


def _worst(x: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(x.flatten().argmax(), x.shape)) if x.dim() else ()


def short(x: float, *, sign: bool = False) -> str:
    """A number for a table cell; nothing for NaN."""
    if math.isnan(x):
        return ""
    return f"{x:{'+' if sign else ''}.2g}"
