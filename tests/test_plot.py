"""Pictures hold the data they claim to show."""

from dataclasses import replace

import matplotlib as mpl
import matplotlib.pyplot
import numpy as np
import pytest
import torch

mpl.use("Agg")

from sdesens import Estimate, crosscheck, plot
from sdesens.diffusion import EDM, VP
from sdesens.errors import ArgumentError, ShapeError
from sdesens.estimators import Bernoulli, compare, variance_study
from sdesens.estimators.exact import normal_variances
from sdesens.family import chebyshev_points, family
from sdesens.models import gbm
from sdesens.roughness import roughness
from sdesens.sensitivity.tangent import tangent_paths


@pytest.fixture(autouse=True)
def closed():
    yield
    mpl.pyplot.close("all")


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


def test_roughness_panels_hold_the_measurements():
    found = roughness(torch.linspace(0, 1, 2**12 + 1, dtype=torch.float64).square(), 2.0**-12, n_lags=4)
    axes = plot.roughness({"t^2": found})
    for ax, name in zip(axes, ("increments", "quotients", "variation"), strict=True):
        np.testing.assert_array_equal(ax.lines[0].get_ydata(), getattr(found, name))
        np.testing.assert_array_equal(ax.lines[0].get_xdata(), found.lags)
    assert "slope 1.0" in axes[0].get_legend().get_texts()[0].get_text()


def test_a_family_is_drawn_with_its_tangents():
    problem = gbm(n_steps=16).problem
    found = family(problem, "sigma", chebyshev_points(0.1, 0.5, 8), n_paths=2, seed=1)
    slopes = [float(c.deriv()(0.3)) for c in found.polynomials()]
    left, right = plot.family(found, at=0.3, slopes=slopes, shown=3)
    np.testing.assert_array_equal(left.lines[0].get_ydata(), found.ys[0, :, 0, 0])
    np.testing.assert_array_equal(left.lines[2].get_ydata(), found.ys[-1, :, 0, 0])
    np.testing.assert_array_equal(right.lines[0].get_ydata(), found.F[:, 0])
    x, y = right.lines[1].get_data()
    assert (y[-1] - y[0]) / (x[-1] - x[0]) == pytest.approx(slopes[0])
    with pytest.raises(ArgumentError, match="`at` must lie among"):
        plot.family(found, at=5.0)
    with pytest.raises(ArgumentError, match="one number a path, 2, got 1"):
        plot.family(found, at=0.3, slopes=[1.0])
    with pytest.raises(ArgumentError, match="states of one number"):
        plot.family(replace(found, ys=found.ys.expand(*found.ys.shape[:3], 2)), at=0.3)


def test_coefficients_and_estimates():
    ax = plot.coefficients({"a": [1.0, -0.1, 0.0]})
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [1.0, 0.1, 1e-17])
    rows = [Estimate.from_samples(torch.tensor([0.0, 1.0, 2.0]) + k) for k in range(3)]
    ax = plot.estimates([1, 10, 100], {"a": rows}, exact=2.0)
    assert list(ax.lines[0].get_ydata()) == [1.0, 2.0, 3.0]
    low, high = ax.containers[0].lines[2][0].get_segments()[1][:, 1]
    interval = rows[1].confidence_interval()
    assert (low, high) == pytest.approx((float(interval.low), float(interval.high)))


def test_diffusion_pictures():
    axes = plot.schedules({"VP": VP(), "EDM": EDM()})
    x, y = axes[0].lines[0].get_data()
    np.testing.assert_allclose(y, VP().alpha(torch.as_tensor(x)).detach())
    pairs = [ax.lines[0].get_xydata() for ax in plot.couplings(VP(), 0.2, 0.5, n=400, seed=3)]
    for xy in pairs:  # one pair of marginals: standard deviations of 400, 4 of 3.5 %
        for column, t in enumerate((0.2, 0.5)):
            assert xy[:, column].std() == pytest.approx(float(VP().sigma(t)), rel=0.15)
    np.testing.assert_allclose(np.corrcoef(pairs[1].T)[0, 1], 1.0)  # one eps: a line
    ax = plot.sampler_errors({"heun": [(10, 0.1), (20, 0.025)]})
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.1, 0.025])


def test_a_fitted_series_lies_over_its_bands():
    paths = torch.arange(101, dtype=torch.float64)[None, :, None].expand(4, 101, 2)
    data = torch.full((4, 2), 50.0, dtype=torch.float64)
    axes = plot.fitted_series([0, 1, 2, 3], data, paths, names=("a", "b"), unit="m")
    band = axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((5.0, 95.0))
    np.testing.assert_array_equal(axes[1].lines[-1].get_ydata(), data[:, 1])
    assert axes[1].get_ylabel() == "b, m"
    with pytest.raises(ShapeError, match=r"got data .4, 2., 4 times, 1 names"):
        plot.fitted_series([0, 1, 2, 3], data, paths, names=("a",))
    x = torch.linspace(0, 1, 5)
    ax = plot.band(x, x, x - 1, x + 1, label="x")
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), x)


def test_costs_are_those_of_the_check():
    check = crosscheck(gbm(n_steps=8).problem, methods=("pathwise", "forward"), n_paths=100, refine=False)
    left, right = plot.costs(check)
    assert [bar.get_width() for bar in left.patches] == [r.seconds for r in check.results.values()]
    assert len(right.patches) == 2


def test_a_file_leaves_the_backend_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(mpl, "use", lambda *_: pytest.fail("another backend was chosen"))
    plot.report(gbm(n_steps=8).problem, "sigma", None, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
