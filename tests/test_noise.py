"""Noise: the published vectors, the law, independence, and that a normal is a pure function of its address."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from sdesens import Antithetic, Coarsened, GivenNoise, Noise, Philox, coarsen
from sdesens.errors import ArgumentError, ArgumentTypeError, ShapeError
from sdesens.noise.philox import MASK, philox4x32
from sdesens.noise.source import box_muller

F64, F32, CPU = torch.float64, torch.float32, torch.device("cpu")
SEEDS = range(12)
FALSE_ALARM = 1e-6  # for each statistical test as a whole: its level is divided by the number of comparisons in it


def draw(source, first, count, step, n_steps, dim, dtype=F64):
    return source.normals(first, count, step, n_steps, dim, dtype=dtype, device=CPU)


def int64(*values):
    return tuple(torch.tensor(v, dtype=torch.int64) for v in values)


def unsigned(words):
    return tuple(int(w) & MASK for w in words)


# Philox


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, words):
    # Random123, kat_vectors, philox4x32 with 10 rounds
    assert unsigned(philox4x32(int64(*counter), key)) == words


def plain_philox(counter, key):
    """Philox4x32-10 from the paper, in Python's own integers."""
    x, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(p1 >> 32) ^ x[1] ^ k[0], p1 & MASK, (p0 >> 32) ^ x[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return tuple(x)


def test_philox_equals_big_integer_arithmetic():
    counters = np.random.default_rng(0).integers(0, 2**32, (200, 4), dtype=np.int64)
    keys = np.random.default_rng(1).integers(0, 2**32, (200, 2), dtype=np.int64)
    for counter, key in zip(counters.tolist(), keys.tolist(), strict=True):
        assert unsigned(philox4x32(int64(*counter), tuple(key))) == plain_philox(counter, key)


def test_the_address_of_a_normal_is_the_documented_one():
    # counter (path low, path high, j // 4, stream), key = seed, j = step * dim + component
    seed, stream, path, step, dim = 2**63 + 12345, 77, 2**40 + 3, 11, 3
    z = draw(Philox(seed, stream), path, 1, step, 1, dim)[0, 0]
    for component in range(dim):
        j = step * dim + component
        words = plain_philox((path & MASK, path >> 32, j // 4, stream), (seed & MASK, seed >> 32))
        normals = box_muller(tuple(torch.tensor([w]).to(torch.int32) for w in words), F64)
        assert z[component] == normals[j % 4][0]


# Box-Muller


EDGES = [0, 1, -1, 2**31 - 1, -(2**31), -(2**31) + 1, 12345678, -987654321]


@pytest.fixture(scope="module")
def words():
    random = np.random.default_rng(2).integers(-(2**31), 2**31, (2, 100_000))
    edges = np.stack(np.meshgrid(EDGES, EDGES)).reshape(2, -1)
    return tuple(torch.from_numpy(w).to(torch.int32) for w in np.concatenate((edges, random), 1))


def plain_box_muller(s1, s2, dtype=np.float64):
    """The formula as it stands."""
    u = ((s1.astype(np.int64) % 2**32).astype(dtype) + dtype(0.5)) * dtype(2.0**-32)
    angle = (s2.astype(dtype) + dtype(0.5)) * dtype(2 * np.pi * 2.0**-32)
    radius = np.sqrt(dtype(-2) * np.log(u))
    return radius * np.cos(angle), radius * np.sin(angle)


def test_box_muller_equals_its_formula(words):
    # u has 33 bits, so float64 holds it exactly: what is left is a few roundings of log, cos, sin and the product
    for ours, plain in zip(box_muller(words, F64), plain_box_muller(*(w.numpy() for w in words)), strict=True):
        assert np.abs(ours.numpy() - plain).max() < 1e-14


def float32_error(normals32, normals64):
    """Largest error of a float32 pair, in units of its radius."""
    radius = torch.hypot(*normals64)
    return max(float(((a.double() - b).abs() / radius).max()) for a, b in zip(normals32, normals64, strict=True))


def test_float32_normals_are_float64_normals_rounded(words):
    # The angle, at most pi, is off by at most four roundings of 2^-24: 7.5e-7 radii. cos, sin and the product, the radius
    # with its root: under 3e-7 more.
    bound = 1.1e-6
    exact = box_muller(words, F64)
    assert 1e-8 < float32_error(box_muller(words, F32), exact) < bound
    with np.errstate(invalid="ignore"):  # negative control: u in float32: near 1 it is rounded to 1
        plain = [torch.from_numpy(x) for x in plain_box_muller(*(w.numpy() for w in words), dtype=np.float32)]
    assert float32_error(plain, exact) > 100 * bound


def test_every_dtype_sees_the_same_normals():
    exact = draw(Philox(5), 0, 1000, 0, 8, 1)
    for dtype, digits in ((F32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)):  # 6.7 times half a unit
        z = draw(Philox(5), 0, 1000, 0, 8, 1, dtype)
        assert z.dtype == dtype
        assert float((z.double() - exact).abs().max()) < digits


# the law


@pytest.fixture(scope="module")
def samples():
    """60,000 normals for each of 12 seeds, shape (seeds, n); paths, steps and components all vary."""
    return np.stack([draw(Philox(seed), 0, 5000, 0, 4, 3).flatten().numpy() for seed in SEEDS])


def smallest_ks_p_value(samples):
    parts = [*samples, samples.ravel()]
    return min(stats.kstest(x, "norm", method="asymp").pvalue for x in parts), len(parts)


def test_normals_are_normal(samples):
    p_value, comparisons = smallest_ks_p_value(samples)
    assert samples.size >= 600_000
    assert p_value > FALSE_ALARM / comparisons


def test_the_ks_test_sees_three_per_cent_in_the_spread(samples):
    p_value, comparisons = smallest_ks_p_value(1.03 * samples)
    assert p_value < FALSE_ALARM / comparisons


def test_the_ks_test_sees_half_of_the_uniforms(words, samples):
    s1, s2 = words
    w = torch.where(s1 < 0, ~s1, s1)  # u in (0, 1/2) only: the radius stays above sqrt(2 log 2)
    wrong = torch.stack(box_muller((w, s2), F64)).numpy()
    assert smallest_ks_p_value(wrong)[0] < FALSE_ALARM / 3


TAILS = (2.0, 3.0, 4.0, 4.5)


def smallest_tail_p_value(samples):
    x = np.abs(samples.ravel())
    return min(stats.binomtest(int((x > c).sum()), x.size, 2 * stats.norm.sf(c)).pvalue for c in TAILS)


def test_tails_have_their_weight(samples):
    assert smallest_tail_p_value(samples) > FALSE_ALARM / len(TAILS)


def test_the_tail_test_sees_a_truncated_radius(samples):
    assert smallest_tail_p_value(np.clip(samples, -3.9, 3.9)) < FALSE_ALARM / len(TAILS)


def test_moments_are_those_of_a_normal(samples):
    # E x^k with the exact standard deviation of x^k: sqrt(E x^2k - (E x^k)^2)
    wanted = {1: (0, 1), 2: (1, math.sqrt(2)), 3: (0, math.sqrt(15)), 4: (3, math.sqrt(96))}
    limit = stats.norm.isf(FALSE_ALARM / 2 / len(wanted))
    for k, (mean, sd) in wanted.items():
        assert abs((samples**k).mean() - mean) / sd * math.sqrt(samples.size) < limit


# independence


def neighbours(axis, seed=3):
    """Two sets of 400,000 normals that are next to each other along one axis of the address."""
    if axis == "stream":
        a, b = Philox(seed, 0), Philox(seed, 1)
    elif axis == "seed":
        a, b = Philox(seed), Philox(seed + 1)
    elif axis == "seed high word":
        a, b = Philox(seed), Philox(seed + 2**32)
    elif axis == "path high word":
        z = [draw(Philox(seed), first, 50_000, 0, 4, 2) for first in (0, 2**32)]
        return z
    else:
        z = draw(Philox(seed), 0, 50_001, 0, 5, 3)
        return {
            "path": (z[:4, 1:, :2], z[:4, :-1, :2]),
            "step": (z[1:, 1:, :2], z[:-1, 1:, :2]),
            "component": (z[:4, 1:, 1:], z[:4, 1:, :-1]),
            "two components": (z[:4, 1:, 2:], z[:4, 1:, :1]),
            "path and step": (z[1:, 1:, :2], z[:-1, :-1, :2]),
        }[axis]
    return [draw(source, 0, 50_000, 0, 4, 2) for source in (a, b)]


AXES = [
    "path", "step", "component", "two components", "path and step", "stream", "seed", "seed high word", "path high word",
]  # fmt: skip
# two scores an axis; both are standard normal under independence (the second to 1e-2 of its tail at n = 2e5)
SCORE_LIMIT = stats.norm.isf(FALSE_ALARM / 2 / (2 * len(AXES)))


def scores(x, y):
    """Standardised correlation of the values and of the squares."""
    x, y = x.flatten(), y.flatten()
    root = math.sqrt(x.numel())
    return float((x * y).mean()) * root, float(((x**2 - 1) * (y**2 - 1)).mean()) / 2 * root


@pytest.mark.parametrize("axis", AXES)
def test_neighbours_are_uncorrelated(axis):
    x, y = neighbours(axis)
    assert x.numel() >= 200_000
    assert max(map(abs, scores(x, y))) < SCORE_LIMIT


def test_the_correlation_test_sees_mirrored_and_repeated_paths():
    z = draw(Antithetic(Philox(3)), 0, 100_000, 0, 4, 1)
    value, square = scores(z[:, ::2], z[:, 1::2])
    assert value < -SCORE_LIMIT
    assert square > SCORE_LIMIT
    mixed = z[:, 1::2] * torch.tensor([1.0, -1.0, -1.0, 1.0])[:, None, None]  # uncorrelated, but not independent
    value, square = scores(z[:, ::2], mixed)
    assert abs(value) < 10 < 400 < square  # z^2 with signs that cancel: a normal score of variance 3


def test_the_correlation_test_sees_two_per_cent_along_the_path():
    x, y = neighbours("step")
    assert scores(x, y + 0.02 * x)[0] > SCORE_LIMIT


# a pure function of the address


SOURCES = {
    "philox": Philox(11),
    "stream": Philox(11, 5),
    "antithetic": Antithetic(Philox(11)),
    "coarsened": Coarsened(Philox(11), 3),
    "coarsened antithetic": Coarsened(Antithetic(Philox(11)), 2),
    "antithetic coarsened": Antithetic(Coarsened(Philox(11), 2)),
}


@pytest.mark.parametrize("dim", [1, 2, 3, 5])
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_slices_hold_the_same_bits(name, dim, dtype):
    source, paths, steps = SOURCES[name], 41, 23
    whole = draw(source, 0, paths, 0, steps, dim, dtype)
    rng = np.random.default_rng(dim)
    for _ in range(12):  # in a random order, so that nothing can depend on what was asked before
        first, step = int(rng.integers(paths)), int(rng.integers(steps))
        count, n_steps = int(rng.integers(1, paths - first + 1)), int(rng.integers(1, steps - step + 1))
        part = draw(source, first, count, step, n_steps, dim, dtype)
        assert torch.equal(part, whole[step : step + n_steps, first : first + count])
    assert whole.unique().numel() >= whole.numel() / 2  # paths, steps and components do differ


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_bits_do_not_depend_on_the_number_of_threads(threads):
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(draw(Philox(4), 7, 50_001, 3, 4, 1, F32))  # larger than a thread's least share
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    threads(1)
    part = draw(Philox(4), 7 + 40_000, 13, 5, 1, 1, F32)
    assert torch.equal(part, results[1][2:3, 40_000:40_013])


def test_every_64_bit_seed_has_its_own_noise():
    seeds = [-(2**63), -(2**63) + 1, -1, 0, 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1]
    z = torch.stack([draw(Philox(s), 0, 3, 0, 4, 1) for s in seeds])
    assert z.unique().numel() == z.numel()
    for signed, plain in ((-(2**63), 2**63), (-1, 2**64 - 1)):  # one bit pattern, spelled in two ways
        assert torch.equal(draw(Philox(signed), 0, 3, 0, 4, 1), draw(Philox(plain), 0, 3, 0, 4, 1))


@pytest.mark.parametrize("argument", ["seed", "stream"])
@pytest.mark.parametrize("value", [True, 1.0, "1", None, np.int64(1), torch.tensor(1)], ids=repr)
def test_a_seed_is_an_int(argument, value):
    with pytest.raises(ArgumentTypeError, match=f"`{argument}` must be an int.*use int"):
        Philox(**{"seed": 0, argument: value})


@pytest.mark.parametrize(
    ("argument", "value"), [("seed", 2**64), ("seed", -(2**63) - 1), ("stream", 2**32), ("stream", -1)]
)
def test_a_seed_has_64_bits_and_a_stream_32(argument, value):
    with pytest.raises(ArgumentError, match=rf"`{argument}` must lie in .*got {value}: reduce it"):
        Philox(**{"seed": 0, argument: value})


def test_paths_beyond_32_bits_have_noise_of_their_own():
    starts = [0, 2**31, 2**32, 2**33, 2**62, 2**63 - 5]
    z = torch.stack([draw(Philox(0), first, 5, 0, 4, 1) for first in starts])
    assert z.unique().numel() == z.numel()
    across = draw(Philox(0), 2**32 - 2, 4, 0, 4, 1)
    assert torch.equal(across[:, 2:], z[2][:, :2])


def test_steps_can_start_late():
    z = draw(Philox(0), 0, 2, 2**34 - 4, 4, 1)
    assert torch.isfinite(z).all()
    assert not torch.equal(z, draw(Philox(0), 0, 2, 2**32 - 4, 4, 1))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ((-1, 3, 0, 4, 1), r"paths -1 \.\.\. 1 lie outside"),
        ((2**63 - 2, 3, 0, 4, 1), "lie outside"),
        ((0, 3, -1, 4, 1), "exceeds|step"),
        ((0, 3, 2**34 - 3, 4, 1), r"exceeds 2\^34 normals a path.*fewer steps"),
        ((0, 3, 2**33, 1, 2), r"exceeds 2\^34 normals a path.*stream"),
    ],
)
def test_addresses_outside_the_counter_are_refused(address, message):
    with pytest.raises(ArgumentError, match=message):
        draw(Philox(0), *address)


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(1)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    z = [draw(source, 0, 6, 0, 8, 2) for source in SOURCES.values()]
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002
    torch.manual_seed(2)
    assert all(torch.equal(a, draw(s, 0, 6, 0, 8, 2)) for a, s in zip(z, SOURCES.values(), strict=True))


def test_sources_follow_the_protocol():
    given = GivenNoise(torch.zeros(8, 4, 2))
    for source in (*SOURCES.values(), given, Antithetic(given), Coarsened(given, 2)):
        assert isinstance(source, Noise)
        assert draw(source, 1, 3, 2, 2, 2).shape == (2, 3, 2)
        assert source.weights(0, 2, dtype=F64, device=CPU) is None
    assert [s.unit for s in SOURCES.values()] == [1, 1, 2, 1, 2, 2]
    assert [s.n_steps for s in (Philox(0), given, Antithetic(given), Coarsened(given, 2))] == [None, 8, 8, 4]


# coarse grids, mirrored paths, given noise


def test_coarse_increments_are_sums_of_fine_ones():
    z = torch.arange(24, dtype=F64).reshape(12, 2, 1)
    for factor in (1, 2, 3, 12):
        dW = coarsen(z, factor) * math.sqrt(factor)
        assert torch.allclose(dW, z.reshape(12 // factor, factor, 2, 1).sum(1), rtol=1e-14)
    fine = draw(Philox(2), 5, 7, 6, 9, 2)
    assert torch.equal(draw(Coarsened(Philox(2), 3), 5, 7, 2, 3, 2), coarsen(fine, 3))


@pytest.mark.parametrize("factor", [0, -2, 2.0, True, None])
def test_a_coarsening_factor_is_a_positive_int(factor):
    for refuse in (lambda: coarsen(torch.zeros(4, 1, 1), factor), lambda: Coarsened(Philox(0), factor)):
        with pytest.raises(ArgumentError, match="`factor` must be a positive int"):
            refuse()


def test_a_coarsening_factor_divides_the_steps():
    with pytest.raises(ArgumentError, match="`factor` must divide the 4 steps, got 3: choose a divisor"):
        coarsen(torch.zeros(4, 1, 1), 3)


def test_antithetic_paths_come_in_mirrored_pairs():
    z, source = draw(Antithetic(Philox(8)), 0, 10, 0, 3, 2), draw(Philox(8), 0, 5, 0, 3, 2)
    assert torch.equal(z[:, ::2], source)
    assert torch.equal(z[:, 1::2], -source)


@pytest.mark.parametrize("wrapper", [Antithetic, lambda source: Coarsened(source, 2)])
@pytest.mark.parametrize("source", [Philox, 3, None, torch.zeros(2, 2, 2)], ids=str)
def test_only_a_source_can_be_wrapped(wrapper, source):
    with pytest.raises(ArgumentTypeError, match=r"`source` must be a noise source such as Philox\(seed\)"):
        wrapper(source)


def test_pairs_are_not_mirrored_twice_nor_weighted():
    with pytest.raises(ArgumentError, match="do not mirror twice"):
        Antithetic(Antithetic(Philox(0)))
    with pytest.raises(ArgumentError, match="cannot mirror weighted paths"):
        Antithetic(GivenNoise(torch.zeros(1, 2, 1), torch.tensor([0.5, 0.5])))


def test_given_noise_gives_what_was_given():
    z, w = torch.randn(6, 5, 2, generator=torch.Generator().manual_seed(0), dtype=F64), torch.full((5,), 0.2)
    source = GivenNoise(z, w)
    assert torch.equal(draw(source, 1, 3, 2, 4, 2), z[2:6, 1:4])
    assert torch.equal(source.weights(2, 3, dtype=F64, device=CPU), w[2:].double())
    dt = 0.25
    increments = GivenNoise.from_increments(z * math.sqrt(dt), dt)
    assert torch.allclose(increments.z, z, rtol=1e-15)
    assert increments.weights(0, 5, dtype=F64, device=CPU) is None


def given(shape=(6, 5, 2), **changes):
    source = GivenNoise(torch.zeros(shape))
    address = {"first": 0, "count": 5, "step": 0, "n_steps": 6, "dim": 2, **changes}
    return draw(source, *address.values())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: given(count=6), ArgumentError, "holds 5 paths x 6 steps.*n_paths <= 5"),
        (lambda: given(first=3, count=3), ArgumentError, r"paths 3 \.\.\. 5 at steps"),
        (lambda: given(n_steps=7), ArgumentError, "holds 5 paths x 6 steps.*give more noise"),
        (lambda: given(step=4, n_steps=3), ArgumentError, r"at steps 4 \.\.\. 6"),
        (lambda: given(dim=3), ShapeError, r"has 2 components.*noise_dim = 3 is needed: give z of shape \(N, B, 3\)"),
        (lambda: given(first=-1), ArgumentError, "paths -1"),
        (lambda: given(step=-1, n_steps=2), ArgumentError, "steps -1"),
        (lambda: GivenNoise(torch.zeros(3, 2)), ShapeError, r"`z` must be .*\(steps, paths, noise_dim\)"),
        (lambda: GivenNoise(torch.zeros(3, 2, 1, dtype=torch.int64)), ShapeError, "`z` must be a floating tensor"),
        (lambda: GivenNoise(np.zeros((3, 2, 1))), ShapeError, "`z` must be .*got ndarray"),
        (lambda: GivenNoise(torch.full((3, 2, 1), math.inf)), ArgumentError, "`z` holds NaN or infinite"),
        (lambda: GivenNoise(torch.zeros(3, 2, 1), torch.ones(3) / 3), ShapeError, r"`path_weights` must have shape \(2,\)"),
        (lambda: GivenNoise(torch.zeros(3, 2, 1), [0.5, 0.5]), ShapeError, "`path_weights` must .*got list"),
        (lambda: GivenNoise(torch.zeros(3, 2, 1), torch.ones(2)), ArgumentError, "`path_weights` must sum to 1.*divide"),
        (lambda: GivenNoise.from_increments(torch.zeros(3, 2, 1), 0.0), ArgumentError, "`dt` must be positive"),
        (lambda: GivenNoise.from_increments(torch.zeros(3, 2, 1), math.nan), ArgumentError, "`dt` must be positive"),
        (lambda: GivenNoise.from_increments(np.zeros((3, 2, 1)), 0.1), ShapeError, "`dW` must be .*got ndarray"),
    ],
)  # fmt: skip
def test_given_noise_that_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
