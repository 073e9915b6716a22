"""Estimate and the moments behind it: numbers, coverage, merging, and how they read."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from sdesens import Estimate
from sdesens.errors import ArgumentError, ArgumentTypeError, ShapeError
from sdesens.estimate import Moments, total

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


# against numpy and scipy


@pytest.mark.parametrize("shape", [(50,), (7, 3), (5, 2, 4), (2,)])
def test_an_estimate_is_the_mean_and_its_standard_error(shape):
    x = 3 + 2 * normal(*shape)
    e = Estimate.from_samples(x)
    n = shape[0]
    assert np.allclose(e.mean, x.numpy().mean(0), rtol=1e-14)
    assert np.allclose(e.standard_error, x.numpy().std(0, ddof=1) / math.sqrt(n), rtol=1e-13)
    assert (e.n, e.dof) == (n, n - 1)
    assert e.mean.shape == e.standard_error.shape == shape[1:]
    assert e.mean.dtype == e.standard_error.dtype == F64


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_the_interval_is_students(level):
    x = normal(6, 2)
    interval = Estimate.from_samples(x).confidence_interval(level)
    low, high = stats.t.interval(level, 5, loc=x.numpy().mean(0), scale=stats.sem(x.numpy()))
    assert np.allclose(interval.low, low, rtol=1e-12)
    assert np.allclose(interval.high, high, rtol=1e-12)


@pytest.mark.parametrize(("n", "level"), [(3, 0.9), (10, 0.95), (40, 0.99)])
def test_the_interval_covers_as_often_as_it_says(n, level):
    # 20,000 repeats in one call; the count is binomial, and the band is passed by chance once in 1e6
    repeats = 20_000
    interval = Estimate.from_samples(1 + normal(n, repeats, seed=n)).confidence_interval(level)
    hits = int(((interval.low <= 1) & (interval.high >= 1)).sum())
    assert stats.binomtest(hits, repeats, level).pvalue > 1e-6
    z = stats.norm.ppf(0.5 + level / 2)  # negative control: the normal quantile is too short for few samples
    e = Estimate.from_samples(1 + normal(n, repeats, seed=n))
    short = int(((e.mean - 1).abs() <= z * e.standard_error).sum())
    assert short < hits
    if n == 3:
        assert stats.binomtest(short, repeats, level).pvalue < 1e-6


def test_float32_samples_are_summed_in_float64():
    x = torch.full((100_000,), 1.0, dtype=torch.float32)
    x[0] = 1e8
    assert float(Estimate.from_samples(x).mean) == pytest.approx((1e8 + 99_999) / 1e5, rel=1e-14)


def test_a_large_offset_does_not_hurt_the_spread():
    # mean of squares minus square of mean would lose every digit; the offset itself rounds the samples by 1e-16 * 1e9
    x = normal(1000)
    wanted = float(Estimate.from_samples(x).standard_error)
    assert float(Estimate.from_samples(x + 1e9).standard_error) == pytest.approx(wanted, rel=1e-6)


def test_samples_that_require_grad_are_read_as_values():
    e = Estimate.from_samples(normal(4).requires_grad_())
    assert not e.mean.requires_grad
    assert not e.standard_error.requires_grad


# units and merging


def test_units_of_several_paths_count_as_one_sample_each():
    means = normal(12, 3)
    moments = Moments.of_units(means, 25)
    e, plain = moments.estimate(), Estimate.from_samples(means)
    assert (moments.n, moments.units, e.n, e.dof) == (300, 12, 300, 11)
    assert torch.allclose(e.mean, plain.mean)
    assert torch.allclose(e.standard_error, plain.standard_error, rtol=1e-13)


def unequal():
    """Units of several sizes; the size is the weight."""
    return [
        (normal(4, 2, seed=1) + 5, 10),
        (normal(7, 2, seed=2) - 3, 30),
        (normal(1, 2, seed=3), 5),
        (normal(2, 2), 1),
    ]


def test_merged_moments_are_those_of_all_units_together():
    merged = total(Moments.of_units(means, size) for means, size in unequal())
    m = torch.cat([means for means, _ in unequal()])
    w = torch.cat([torch.full((len(means), 1), size, dtype=F64) for means, size in unequal()])
    mean = (w * m).sum(0) / w.sum()
    assert (merged.n, merged.units) == (int(w.sum()), len(m))
    assert torch.allclose(merged.mean, mean, rtol=1e-13)
    assert torch.allclose(merged.m2, (w * (m - mean) ** 2).sum(0), rtol=1e-13)


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (3, 2, 1, 0)])
def test_merging_in_another_order_changes_roundings_only(order):
    parts = [Moments.of_units(means, size) for means, size in unequal()]
    one, other = total(parts), total(parts[i] for i in order)
    assert torch.allclose(one.mean, other.mean, rtol=1e-13)
    assert torch.allclose(one.m2, other.m2, rtol=1e-13)
    nested = total([parts[0] + parts[1], parts[2] + parts[3]])
    assert torch.allclose(one.m2, nested.m2, rtol=1e-13)


def test_the_standard_error_of_unequal_units_is_right_on_average():
    # units of size s have variance 1/s: M2 / (U - 1) then estimates 1, the variance of one path, without bias
    repeats, sizes = 4000, (1, 4, 25)
    parts = [Moments.of_units(normal(6, repeats, seed=s) / math.sqrt(s), s) for s in sizes]
    variance = total(parts).m2 / (18 - 1)
    z = float((variance.mean() - 1) / variance.std()) * math.sqrt(repeats)
    assert abs(z) < 4.9  # false once in 1e6
    unweighted = torch.cat([p.mean[None] for p in parts]).var(0)  # negative control: sizes left out
    assert abs(float((unweighted.mean() - 1) / unweighted.std()) * math.sqrt(repeats)) > 4.9


def test_what_cannot_be_known_is_nan():
    one = Moments.of_units(normal(1, 2), 100).estimate()
    assert one.dof == 0
    assert torch.isnan(one.standard_error).all()
    assert torch.isfinite(one.mean).all()
    weighted = Moments.of_units(normal(9), 1).estimate(weighted=True)
    assert torch.isnan(weighted.standard_error)
    for e in (one, weighted):
        assert all(torch.isnan(bound).all() for bound in e.confidence_interval())
        assert "nan" in repr(e)


def test_no_spread_is_zero():
    e = Estimate.from_samples(torch.ones(5))
    assert float(e.standard_error) == 0.0
    assert repr(e) == "1 +/- 0 (95% CI, n=5)"


# how it reads


def with_half_width(mean, half, n=10_001):
    se = half / stats.t.ppf(0.975, n - 1)
    return repr(Estimate(torch.tensor(mean, dtype=F64), torch.tensor(se, dtype=F64), n, n - 1))


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (0.84123, 0.00112, "0.8412 +/- 0.0011"),
        (12.3456, 0.34, "12.35 +/- 0.34"),
        (1234.5, 56.0, "1234 +/- 56"),
        (-0.5, 2.0, "-0.5 +/- 2.0"),
        (1e-9, 2.1e-11, "1.000e-09 +/- 2.1e-11"),
        (3.0e8, 4.4e6, "3.000e+08 +/- 4.4e+06"),
        (1.0, 1e-20, "1 +/- 1e-20"),
        (0.0, 0.012, "0.000 +/- 0.012"),
        (0.0, 2.0e-15, "0.0e+00 +/- 2.0e-15"),
        (-1.23456e-20, 2.0e-15, "-1.2e-20 +/- 2.0e-15"),
    ],
)
def test_the_repr_shows_two_digits_of_the_error(mean, half, text):
    assert with_half_width(mean, half) == f"{text} (95% CI, n=10001)"


def test_the_repr_of_tensors():
    x = torch.stack((torch.tensor([1.0, 2.0, 3.0, 2.0]), torch.tensor([10.0, 30.0, 10.0, 30.0])), 1)
    assert repr(Estimate.from_samples(x)) == "[2.0 +/- 1.3, 20 +/- 18] (95% CI, n=4)"
    assert repr(Estimate.from_samples(normal(4, 7))).startswith("Estimate(shape=(7,), n=4), norm 0.78")


def test_to_dict_is_plain():
    d = Estimate.from_samples(torch.tensor([[1.0, 0.0], [3.0, 0.0]])).to_dict()
    assert d == {"mean": [2.0, 0.0], "standard_error": [1.0, 0.0], "n": 2, "dof": 1}
    assert isinstance(Estimate.from_samples(normal(4)).to_dict()["mean"], float)


def test_estimates_compare_by_identity():
    # a comparison of tensors has no single truth value
    a, b = (Estimate.from_samples(normal(4, 2)) for _ in range(2))
    assert a == a
    assert a != b
    assert len({a, b}) == 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Estimate.from_samples(torch.ones(1)), ShapeError, r"`samples` must hold at least two rows, got shape \(1,\)"),
        (lambda: Estimate.from_samples(torch.tensor(1.0)), ShapeError, r"`samples` .*got shape \(\)"),
        (lambda: Estimate.from_samples(torch.ones(0, 3)), ShapeError, r"`samples` .*got shape \(0, 3\)"),
        (lambda: Estimate.from_samples([1.0, 2.0]), ArgumentTypeError, "`samples` must be a tensor, got list: use torch"),
        (lambda: Estimate.from_samples(np.ones(3)), ArgumentTypeError, "`samples` must be a tensor, got ndarray"),
        (lambda: Estimate.from_samples(torch.ones(3) + 0j), ArgumentTypeError, "`samples` must be real"),
        (lambda: Estimate.from_samples(torch.ones(3)).confidence_interval(0.0), ArgumentError, "`level` must lie strictly"),
        (lambda: Estimate.from_samples(torch.ones(3)).confidence_interval(1.0), ArgumentError, "`level` must lie strictly"),
        (lambda: Estimate.from_samples(torch.ones(3)).confidence_interval(95), ArgumentError, "`level` .*got 95: 0.95"),
        (lambda: Estimate.from_samples(torch.ones(3)).confidence_interval(math.nan), ArgumentError, "`level`.*got nan"),
    ],
)  # fmt: skip
def test_estimates_of_nothing_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
