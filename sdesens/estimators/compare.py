"""The methods beside each other on one question: what each says, how certain it is, and at what cost.

For n draws that take t seconds a draw, the squared standard error is variance / n, so

    variance x time                                                                              (1)

is what a method needs to reach a given precision: the smaller the better. It ranks unbiased methods only; a biased one can be
precise about another number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from sdesens.errors import ArgumentError, DetachedError, JumpError, MethodError
from sdesens.estimators.gradient import ExpectationGradient, expectation_gradient
from sdesens.estimators.measure_valued import too_many
from sdesens.estimators.methods import applicable
from sdesens.estimators.model import Function, ask, detached, with_graph
from sdesens.tables import as_text
from sdesens.tensors import coordinate_names

Spec = str | tuple[str, dict[str, Any]]
SHOWN = 6  # coordinates of a parameter that a table shows


@dataclass(frozen=True)
class Comparison:
    """The answer of `compare`.

    Attributes
    ----------
    results : dict of ExpectationGradient
        By method, with those options that are not the default.
    refused : dict of str
        Methods that the question forbids (not those that its law does not have), and why.
    exact : dict of Tensor, or None
        The gradient by parameter, where it is known: given, or found by enumeration.
    """

    results: dict[str, ExpectationGradient]
    refused: dict[str, str]
    exact: dict[str, Tensor] | None

    def rows(self) -> list[dict[str, Any]]:
        """One record for each method and coordinate; None where nothing is known."""
        rows = []
        for method, r in self.results.items():
            for name, estimate in r.gradient.items():
                truth = None if self.exact is None else self.exact[name].double().flatten()
                labels = coordinate_names(name, estimate.mean.shape)
                e = labels, estimate.mean.flatten().tolist(), estimate.standard_error.flatten().tolist()
                for i, (label, mean, se) in enumerate(zip(*e, strict=True)):
                    variance = se**2 * estimate.n
                    bias = None if truth is None else mean - float(truth[i])
                    rows.append(
                        {
                            "method": method,
                            "biased": r.biased,
                            "parameter": label,
                            "mean": mean,
                            "standard_error": se,
                            "variance": variance,
                            "seconds_a_draw": r.seconds / estimate.n,
                            "variance_x_time": variance * r.seconds / estimate.n,
                            "bias": bias,
                            "bias_in_standard_errors": bias / se if bias is not None and se > 0 else None,
                            "coordinate": i,
                            "size": len(labels),
                        }
                    )
        return rows

    def table(self) -> Table:
        """What `rows` says, for a reader."""
        headings = ["method", "d/d", "estimate +- standard error", "variance of a draw", "us a draw", "variance x us"]
        table = Table(*headings, *(["minus exact", "in std. errors"] if self.exact is not None else []))
        for row in self.rows():
            if row["coordinate"] >= SHOWN:
                if row["coordinate"] == SHOWN:
                    more = row["size"] - SHOWN
                    table.add_row(row["method"], f"... {more} more", "in rows()")
                continue
            cells = [
                row["method"] + (" BIASED" if row["biased"] else ""),
                row["parameter"],
                f"{row['mean']:.6g} +- {row['standard_error']:.2g}",
                f"{row['variance']:.4g}",
                f"{1e6 * row['seconds_a_draw']:.3g}",
                f"{1e6 * row['variance_x_time']:.3g}",
            ]
            if self.exact is not None:
                z = row["bias_in_standard_errors"]
                cells += [f"{row['bias']:.2g}", "" if z is None else f"{z:.1f}"]
            table.add_row(*cells)
        for method, reason in self.refused.items():
            table.add_row(method, "", f"refused: {reason}")
        return table

    def to_dict(self) -> dict:
        """Plain numbers."""
        return {"rows": self.rows(), "refused": dict(self.refused)}

    def __repr__(self) -> str:
        return as_text(self.table())


def compare(
    model: Any,
    f: Function | None = None,
    params: Mapping[str, Tensor] | None = None,
    *,
    n_samples: int = 100_000,
    methods: Sequence[Spec] | None = None,
    wrt: Sequence[str] | str | None = None,
    x: Tensor | None = None,
    seed: int | None = None,
    exact: Mapping[str, Tensor | float] | None = None,
) -> Comparison:
    """Run methods on the same question and noise.

    Parameters
    ----------
    model, f, params, wrt, x, seed
        As for `expectation_gradient`.
    n_samples : int
        Draws for each method.
    methods : sequence of str or (str, dict), optional
        Names, or names with options: ("gumbel_softmax", {"temperature": 1.0}). All that apply if left out, biased ones too.
    exact : mapping of str to Tensor or float, optional
        The gradient, if it is known. Where the law can be enumerated it need not be given.

    Raises
    ------
    What `expectation_gradient` raises; except that, unless `methods` names it, a method that the question forbids is listed.

    Example
    -------
    >>> from sdesens.estimators import Bernoulli
    >>> params = {"logits": torch.tensor([0.0, 1.0])}
    >>> found = compare(Bernoulli, lambda z, p: z.sum(1) ** 2, params, n_samples=1000)
    >>> [method for method, r in found.results.items() if r.biased]
    ['gumbel_softmax', 'straight_through']
    """
    question = detached(ask(model, f, params, wrt, x))
    law = with_graph(question)
    refused: dict[str, str] = {}
    specs = [(m, {}) if isinstance(m, str) else m for m in methods] if methods is not None else None
    if specs is None:
        specs = [(m, {}) for m in applicable(law, question.x is not None, biased=True)]
        costly = too_many(law, question.x is not None)
        if ("measure_valued", {}) in specs and costly is not None:
            specs.remove(("measure_valued", {}))
            refused["measure_valued"] = costly
        if ("score_function", {}) in specs:
            specs.insert(specs.index(("score_function", {})) + 1, ("score_function", {"baseline": "optimal"}))
    if not specs:
        raise ArgumentError("`methods` is empty: name some, or leave it out for all that apply.")
    results: dict[str, ExpectationGradient] = {}
    for method, options in specs:
        asked = {"n_samples": n_samples, "method": method, "wrt": wrt, "x": x, "seed": seed, **options}
        try:
            few = n_samples if n_samples < 640 else 320
            expectation_gradient(model, f, params, **{**asked, "n_samples": few})  # checks, and warms up
            result = expectation_gradient(model, f, params, check=False, **asked)
        except (DetachedError, JumpError, MethodError) as error:
            if methods is not None:
                raise
            refused[method] = str(error).split(", so ")[0].split(": ")[0].split(" (")[0]
            continue
        results[result.method] = result
    if exact is None and "enumerate" in applicable(law, x is not None):
        by_sum = results.get("enumerate") or expectation_gradient(
            model, f, params, n_samples=2, method="enumerate", wrt=wrt, x=x, check=False
        )
        exact = {k: e.mean for k, e in by_sum.gradient.items()}
    return Comparison(results, refused, _exact(results, exact))


def _exact(
    results: dict[str, ExpectationGradient], given: Mapping[str, Tensor | float] | None
) -> dict[str, Tensor] | None:
    shapes = next(iter(results.values())).gradient if results else {}
    if given is None:
        return None
    answer = {}
    for name, estimate in shapes.items():
        if name not in given:
            raise ArgumentError(f"`exact` has no {name!r}: give the gradient of every parameter, or none.")
        answer[name] = torch.as_tensor(given[name], dtype=torch.float64)
        if answer[name].shape != estimate.mean.shape:
            raise ArgumentError(
                f"`exact` gives {name!r} the shape {tuple(answer[name].shape)}, the parameter has {tuple(estimate.mean.shape)}."
            )
    return answer
