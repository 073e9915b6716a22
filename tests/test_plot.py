"""Pictures hold the data they claim to show."""

import matplotlib as mpl
import numpy as np
import pytest
import torch

mpl.use("Agg")

from sdesens import crosscheck, plot
from sdesens.errors import ArgumentError
from sdesens.estimators import Bernoulli, compare, variance_study
from sdesens.estimators.exact import normal_variances
from sdesens.models import gbm
from sdesens.sensitivity.tangent import tangent_paths


def test_sample_paths_and_their_sensitivities():
    problem = gbm(n_steps=32).problem
    left, right = plot.sample_paths(problem, "sigma", n_paths=3, seed=5)
    ts, ys, tangents = tangent_paths(problem, n_paths=3, wrt="sigma", seed=5, every_step=True)
    for i in range(3):
        np.testing.assert_array_equal(left.lines[i].get_ydata(), ys[:, i, 0])
        np.testing.assert_array_equal(right.lines[i].get_ydata(), tangents["sigma"][:, i, 0])
        np.testing.assert_array_equal(left.lines[i].get_xdata(), ts)
    assert left.get_xlabel() == "t"
    assert "sigma" in right.get_ylabel()


def test_refinement_axes_are_logarithmic_and_labelled():
    study = crosscheck(
        gbm(n_steps=16).problem, methods=("pathwise", "adjoint"), n_paths=100, refine_paths=100
    ).refinement
    left, right = plot.refinement(study)
    assert left.get_xscale() == left.get_yscale() == right.get_yscale() == "log"
    assert [t.get_text() for t in left.get_legend().get_texts()][:2] == ["pathwise", "adjoint"]
    np.testing.assert_allclose(left.lines[0].get_ydata(), study.error["pathwise"])


def test_tangent_paths_are_the_derivative_of_the_paths():
    problem = gbm(n_steps=32, sigma=0.4).problem
    _, ys, tangents = tangent_paths(problem, n_paths=50, seed=1)
    # Euler-Maruyama of GBM: X = x0 prod (1 + mu h + sigma dW); d/dx0 = X / x0
    torch.testing.assert_close(tangents["x0"], ys / ys[0], rtol=1e-13, atol=0)
    assert tangents["mu"].shape == ys.shape
    assert not bool(tangents["mu"][0].any())


def test_tangent_of_a_matrix_parameter_has_its_shape():
    from sdesens.models import ou_nd

    problem = ou_nd(n_steps=8).problem
    result = tangent_paths(problem, n_paths=4, wrt="A")
    assert result.tangents["A"].shape == (*result.ys.shape, 3, 3)


def test_variance_study_draws_exact_lines_and_sampled_markers():
    study = variance_study(n_samples=200, costs=("quadratic", "cos"), seed=1)
    axes = plot.variance_study(study)
    assert axes.shape == (2, 2)
    ax = axes[0, 1]
    points = study.select("cos", "mean")
    sampled = next(line for line in ax.lines if line.get_marker() == "o")
    np.testing.assert_allclose(sampled.get_ydata(), [p.variance["pathwise"] for p in points])
    curve = ax.lines[0]
    f = normal_variances(lambda z: torch.cos(float(curve.get_xdata()[17]) * z), 1.0, 1.0)["mean"]
    assert curve.get_ydata()[17] == pytest.approx(f.variance["pathwise"])
    marked = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2]
    assert marked == pytest.approx([1.0638], abs=1e-4)
    assert all(a.get_xlabel() == "k" and a.get_ylabel() and a.get_title() for a in axes.flat)


def test_comparison_shows_estimates_intervals_and_work():
    params = {"logits": torch.tensor([0.3], dtype=torch.float64)}
    found = compare(Bernoulli, lambda z, p: (z[:, 0] - 0.45) ** 2, params, n_samples=400)
    left, right = plot.comparison(found, "logits[0]")
    labels = [t.get_text() for t in left.get_yticklabels()]
    assert len(labels) == len(found.results)
    assert "straight_through (biased)" in labels
    rows = found.rows()
    shown = left.containers[0].lines[0]  # the markers of the error bars
    np.testing.assert_allclose(np.asarray(shown.get_xdata(), float), [r["mean"] for r in rows])
    assert [float(line.get_xdata()[0]) for line in right.lines] == pytest.approx(
        [1e6 * r["variance_x_time"] for r in rows if r["variance_x_time"] > 0]
    )
    with pytest.raises(ArgumentError, match=r"'logits\[0\]'"):
        plot.comparison(found, "mean")
