"""The estimators by name, and where each may be used."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sdesens.errors import ArgumentError, ArgumentTypeError, MethodError
from sdesens.estimators.arm import arm, needs_coins
from sdesens.estimators.draws import Draws, Surrogate
from sdesens.estimators.enumeration import MAX_STATES, enumerate_states, too_large
from sdesens.estimators.gumbel_softmax import check_temperature, gumbel_softmax, needs_relaxation, straight_through
from sdesens.estimators.laws import Law
from sdesens.estimators.measure_valued import has_triple, measure_valued, normals_needed
from sdesens.estimators.pathwise import needs_noise, pathwise
from sdesens.estimators.score_function import check_baseline, needs_density, rloo, score_function
from sdesens.estimators.torch_law import TorchLaw


@dataclass(frozen=True)
class Method:
    """An estimator.

    Attributes
    ----------
    run : callable (draws, **options) -> Surrogate
    refusal : callable law -> str or None
        Why it cannot be used for a law.
    options : dict
        What may be set, with its default.
    biased : bool
        Whether its mean is another number than the gradient.
    """

    run: Callable[..., Surrogate]
    refusal: Callable[[Law], str | None]
    options: dict[str, Any]
    biased: bool = False


METHODS = {
    "pathwise": Method(pathwise, needs_noise, {}),
    "score_function": Method(score_function, needs_density, {"baseline": "none", "group": None}),
    "rloo": Method(rloo, needs_density, {"group": None}),
    "measure_valued": Method(measure_valued, has_triple, {}),
    "enumerate": Method(enumerate_states, lambda law: None, {"max_states": MAX_STATES}),
    "arm": Method(arm, needs_coins, {}),
    "gumbel_softmax": Method(
        gumbel_softmax, needs_relaxation, {"temperature": 0.5, "straight_through": False}, biased=True
    ),
    "straight_through": Method(straight_through, needs_relaxation, {"temperature": 0.5}, biased=True),
}


@dataclass(frozen=True)
class Choice:
    """A method with its options settled, for a law."""

    name: str
    options: dict[str, Any]
    biased: bool
    group: int = 1  # draws that make one unit
    extra: int = 0  # normals a draw of an item beyond the law's own

    @property
    def exact(self) -> bool:
        """Whether nothing is sampled."""
        return self.name == "enumerate"

    def __call__(self, draws: Draws) -> Surrogate:
        return METHODS[self.name].run(draws, **self.options)

    def __str__(self) -> str:
        """The name, with those options that are not the default."""
        usual = METHODS[self.name].options
        shown = {k: v for k, v in self.options.items() if v != usual.get(k)}
        return self.name + (f" ({', '.join(f'{k}={v}' for k, v in shown.items())})" if shown else "")


def refusal(name: str, law: Law, with_items: bool, max_states: int = MAX_STATES) -> str | None:
    """Why a method cannot be used for a law; None if it can."""
    return too_large(law, with_items, max_states) if name == "enumerate" else METHODS[name].refusal(law)


def applicable(law: Law, with_items: bool, *, biased: bool = False) -> list[str]:
    """The methods that can be used for a law, unbiased ones alone unless asked otherwise."""
    return [k for k in METHODS if refusal(k, law, with_items) is None and (biased or not is_biased(k, law))]


def is_biased(name: str, law: Law) -> bool:
    """Whether a method's mean is another number than the gradient, for this law."""
    return METHODS[name].biased or (name == "pathwise" and isinstance(law, TorchLaw) and law.biased)


def choose(
    name: str, options: dict[str, Any], law: Law, with_items: bool, n_samples: int, *, n_groups: int = 2
) -> Choice:
    """A method with its options checked and settled, for at least `n_groups` leave-one-out groups.

    Raises
    ------
    ArgumentError, ArgumentTypeError, MethodError
    """
    if name not in METHODS:
        raise ArgumentError(
            f"`method` must be one of {', '.join(map(repr, METHODS))}, or 'auto' in expectation_gradient, got {name!r}."
        )
    method = METHODS[name]
    for key in options:
        if key not in method.options:
            allowed = ", ".join(map(repr, method.options)) or "none"
            raise ArgumentTypeError(f"{key!r} is not an option of method {name!r}; its options: {allowed}.")
    settled = {**method.options, **options}
    if "temperature" in settled:
        check_temperature(settled["temperature"])
    if "baseline" in settled:
        check_baseline(settled["baseline"])
    reason = refusal(name, law, with_items, **_take(settled, "max_states"))
    if reason is not None:
        others = [k for k in applicable(law, with_items) if k != name]
        raise MethodError(
            f"method={name!r} cannot be used for this model: {reason}. Unbiased methods that apply: "
            f"{', '.join(map(repr, others)) or 'none'}."
        )
    group = 1
    if name == "rloo" or settled.get("baseline") == "leave_one_out":
        group = settled["group"] = _group(settled["group"], n_samples, n_groups)
    elif settled.pop("group", None) is not None:
        raise ArgumentError("`group` belongs to baseline='leave_one_out': leave it out.")
    coordinates = math.prod(law.noise[with_items:])
    extra = normals_needed(law) * coordinates if name == "measure_valued" else 0
    return Choice(name, settled, is_biased(name, law), group, extra)


def _group(group, n_samples: int, n_groups: int) -> int:
    most = n_samples // n_groups
    if group is None:
        fitting = [k for k in range(2, min(most, 16) + 1) if n_samples % k == 0]
        if not fitting:
            raise MethodError(
                f"`n_samples` = {n_samples} cannot be cut into {n_groups} or more leave-one-out groups of 2 ... 16 draws: make it "
                "even, and at least 4, or give `group`."
            )
        return fitting[-1]
    if isinstance(group, bool) or not isinstance(group, int) or not 2 <= group <= most or n_samples % group:
        raise ArgumentError(
            f"`group` must be an int in 2 ... {most} that divides n_samples = {n_samples}, got {group!r}: "
            + (
                "one group has no standard error."
                if group == n_samples
                else "a group is what one baseline is computed from."
            )
        )
    return group


def _take(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Remove these from the options, and return them."""
    return {k: options.pop(k) for k in names if k in options}
