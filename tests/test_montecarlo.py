"""The run: blocks, tiles, executors, merging, weights, memory. The bits may depend on none of them."""

import io
import itertools
import math
import multiprocessing
import random
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import replace

import pytest
import torch
from measure import peak_megabytes
from problems import F64, GBM, NOISE_DIM, OU, by_path, gauss_hermite, plain_paths, smooth, wrt_all

from sdesens import Antithetic, GivenNoise, Philox, merge, sensitivity, to_ito, to_stratonovich
from sdesens.blocks import BLOCK, GROUP, ROW, _tiles
from sdesens.errors import ArgumentError, ArgumentTypeError
from sdesens.montecarlo import Sensitivity


class Shuffled(Executor):
    """Computes blocks in an order of its own and hands the results back in theirs."""

    def __init__(self, order):
        self.order, self.visited = order, []

    def map(self, fn, *iterables, **_):
        tasks = list(zip(*iterables, strict=True))
        results = {}
        for i in self.order(list(range(len(tasks)))):
            results[i] = fn(*tasks[i])
            self.visited.append(i)
        return (results[i] for i in range(len(tasks)))


def assert_same_bits(a: Sensitivity, b: Sensitivity) -> None:
    assert set(a.gradient) == set(b.gradient)
    rows = [(a.value, b.value), *((a.gradient[k], b.gradient[k]) for k in a.gradient)]
    if a.bias is not None:
        rows += [(a.bias[k], b.bias[k]) for k in a.bias]
    for x, y in rows:
        assert torch.equal(x.mean, y.mean)
        assert torch.equal(x.standard_error, y.standard_error)
        assert (x.n, x.dof) == (y.n, y.dof)


METHODS = ("pathwise", "forward", "adjoint", "torchsde_adjoint", "finite_difference")
PROBLEM = GBM(n_steps=4).problem(2)


@pytest.mark.parametrize("method", METHODS)
def test_block_order_does_not_change_the_bits(method):
    n = 3 * BLOCK + 1234
    plain = sensitivity(PROBLEM, n_paths=n, method=method, seed=4, bias=True)
    orders = (lambda i: i[::-1], lambda i: random.Random(1).sample(i, len(i)))
    for order in orders:
        executor = Shuffled(order)
        assert_same_bits(plain, sensitivity(PROBLEM, n_paths=n, method=method, seed=4, bias=True, executor=executor))
        assert executor.visited != sorted(executor.visited)


@pytest.mark.parametrize("method", ["pathwise", "forward"])
def test_threads_and_processes_do_not_change_the_bits(method):
    n = 2 * BLOCK + 400
    plain = sensitivity(PROBLEM, n_paths=n, method=method, seed=4)
    with ThreadPoolExecutor(2) as threads:
        assert_same_bits(plain, sensitivity(PROBLEM, n_paths=n, method=method, seed=4, executor=threads))
    if method == "pathwise":  # a fresh interpreter each, so that nothing is inherited but what is pickled
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
            assert_same_bits(plain, sensitivity(PROBLEM, n_paths=n, method=method, seed=4, executor=processes))


def as_stratonovich_and_back(problem):
    """The same equation, its drift now with two derivatives of the diffusion inside."""
    return replace(problem, sde=to_ito(to_stratonovich(problem.sde)))


@pytest.mark.parametrize(
    ("method", "wrt", "change"),
    [
        ("adjoint", ("s", "K"), None),
        ("forward", ("s",), None),  # few directions: forward mode
        ("forward", ("s", "A"), None),
        ("pathwise", ("s", "K"), as_stratonovich_and_back),
    ],
)
def test_forward_mode_in_several_threads_at_once(method, wrt, change):
    """torch keeps the levels of forward mode per process; unguarded, threads crash each other or worse."""
    problem = smooth("general", 0, n_steps=4, outputs=(0, 2, 4))
    problem = problem if change is None else change(problem)
    n = 3 * BLOCK
    plain = sensitivity(problem, n_paths=n, method=method, wrt=wrt)
    with ThreadPoolExecutor(3) as threads:
        assert_same_bits(plain, sensitivity(problem, n_paths=n, method=method, wrt=wrt, executor=threads))


@pytest.mark.parametrize("method", ["pathwise", "forward", "adjoint"])
@pytest.mark.parametrize("noise_type", list(NOISE_DIM))
def test_tiles_and_threads_of_torch_do_not_change_the_bits(noise_type, method):
    problem = smooth(noise_type, 0, n_steps=5, outputs=(0, 2, 5))
    wrt, n = wrt_all(problem), 2000 if method != "pathwise" else 12_000
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        plain = sensitivity(problem, n_paths=n, method=method, wrt=wrt)
        for tile_paths in (1, 7 * GROUP + 13, 11_999, 10**6):
            assert_same_bits(plain, sensitivity(problem, n_paths=n, method=method, wrt=wrt, tile_paths=tile_paths))
        torch.set_num_threads(2)
        assert_same_bits(plain, sensitivity(problem, n_paths=n, method=method, wrt=wrt))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["pathwise", "forward"])
def test_ten_merged_runs_are_one_run(method):
    n = 100_000
    whole = sensitivity(PROBLEM, n_paths=n, method=method, seed=9)
    parts = [sensitivity(PROBLEM, n_paths=n // 10, method=method, seed=9, first_path=k * n // 10) for k in range(10)]
    random.Random(0).shuffle(parts)
    merged = merge(*parts)
    assert_same_bits(whole, merged)
    assert (merged.n_paths, merged.first_path, merged.n_steps) == (n, 0, 4)
    assert merged.seconds == pytest.approx(sum(p.seconds for p in parts))
    # negative control: another seed, another answer
    other = sensitivity(PROBLEM, n_paths=n // 10, method=method, seed=10)
    assert not torch.equal(other.value.mean, parts[0].value.mean)


def test_merge_of_ragged_stretches_is_right_to_rounding():
    cuts = [0, 700, 701 + 1, 9_999, 10_001, 12_345, 20_000]
    parts = [sensitivity(PROBLEM, n_paths=b - a, first_path=a, method="forward") for a, b in itertools.pairwise(cuts)]
    whole, merged = sensitivity(PROBLEM, n_paths=20_000, method="forward"), merge(*parts)
    for x, y in ((whole.value, merged.value), *((whole.gradient[k], merged.gradient[k]) for k in whole.gradient)):
        # sums of 20,000 numbers in another order
        assert torch.allclose(x.mean, y.mean, rtol=1e-12)
        assert torch.allclose(x.standard_error, y.standard_error, rtol=1e-12)
        assert (x.n, x.dof) == (y.n, y.dof)


@pytest.mark.parametrize("n", [2, 3, 101, 9_999, 10_001, 10_201])
def test_every_path_counts_once(n):
    result = sensitivity(PROBLEM, n_paths=n, seed=2)
    z = by_path(Philox(2), PROBLEM, n, 1)
    values = PROBLEM.functional(plain_paths(PROBLEM, {}, z), PROBLEM.sde.params)
    assert float(result.value.mean) == pytest.approx(float(values.mean()), rel=1e-13)
    assert float(result.value.standard_error) == pytest.approx(float(values.std()) / math.sqrt(n), rel=1e-10)
    assert result.value.n == result.gradient["mu"].n == result.n_paths == n
    tangents = sensitivity(PROBLEM, n_paths=n, seed=2, method="forward")
    assert torch.allclose(result.gradient["sigma"].mean, tangents.gradient["sigma"].mean, rtol=1e-12, atol=1e-14)


def test_groups_of_one_run_give_nearly_the_standard_error_of_single_paths():
    groups, paths = (sensitivity(OU().problem(2), n_paths=20_000, method=m) for m in ("pathwise", "forward"))
    for k in groups.gradient:
        assert groups.gradient[k].dof == 99
        # 100 groups know a standard error to 7 %: 4 sd, three parameters, false alarm 2e-4
        assert float(groups.gradient[k].standard_error / paths.gradient[k].standard_error) == pytest.approx(1, abs=0.28)


@pytest.mark.parametrize("tile_paths", [1, 2, 3, 10, 50, 10_000])
@pytest.mark.parametrize(("start", "end"), [(0, 10_000), (0, 203), (400, 10_000), (0, 7), (200, 201)])
def test_tiles_cover_a_block_once(start, end, tile_paths):
    group = 10
    tiles = list(_tiles(start, end, max(tile_paths // (ROW * group), 1) * ROW * group, group))
    covered = [i for first, count, _ in tiles for i in range(first, first + count)]
    assert covered == list(range(start, end))
    for first, count, size in tiles:
        assert count % size == 0
        assert first == start or (first - start) % (ROW * size) == 0 or size != group
    alone = [count // size == 1 for _, count, size in tiles]
    assert sum(alone) <= ((end - start) % group != 0)  # at most the last odd group


def test_antithetic_runs_keep_pairs_together():
    noise = Antithetic(Philox(3))
    for n in (2, 4, 102, 10_002):
        result = sensitivity(PROBLEM, n_paths=n, noise=noise, method="forward")
        z = by_path(noise, PROBLEM, n, 1)
        assert torch.equal(z[:, 0::2], -z[:, 1::2])
        values = PROBLEM.functional(plain_paths(PROBLEM, {}, z), PROBLEM.sde.params)
        pairs = values.unflatten(0, (-1, 2)).mean(1)
        assert float(result.value.mean) == pytest.approx(float(pairs.mean()), rel=1e-13)
        if n > 2:
            error = float(pairs.std()) / math.sqrt(n / 2)
            assert float(result.value.standard_error) == pytest.approx(error, rel=1e-10)
    whole = sensitivity(PROBLEM, n_paths=2 * BLOCK, noise=noise)
    halves = [sensitivity(PROBLEM, n_paths=BLOCK, noise=noise, first_path=k * BLOCK) for k in range(2)]
    assert_same_bits(whole, merge(*halves))
    with pytest.raises(ArgumentError, match="even"):
        sensitivity(PROBLEM, n_paths=3, noise=noise)
    with pytest.raises(ArgumentError, match="even"):
        sensitivity(PROBLEM, n_paths=4, first_path=1, noise=noise)


def test_given_noise_is_used_as_it_is():
    z = by_path(Philox(8), PROBLEM, 300, 1)
    a, b = (sensitivity(PROBLEM, n_paths=300, noise=n) for n in (GivenNoise(z), Philox(8)))
    assert_same_bits(a, b)
    dt = PROBLEM.dt
    c = sensitivity(PROBLEM, n_paths=300, noise=GivenNoise.from_increments(z * math.sqrt(dt), dt))
    assert torch.allclose(a.gradient["sigma"].mean, c.gradient["sigma"].mean, rtol=1e-12)


def test_weights_carry_no_standard_error_and_need_all_paths():
    noise = gauss_hermite(2, 4)
    result = sensitivity(PROBLEM, n_paths=16, noise=noise)
    assert float(result.value.mean) == pytest.approx(GBM(n_steps=4).scheme(2)["value"], rel=1e-13)
    for estimate in (result.value, *result.gradient.values()):
        assert bool(torch.isnan(estimate.standard_error).all())
        assert bool(torch.isnan(estimate.confidence_interval()[0]).all())
    with pytest.raises(ArgumentError, match="weights"):
        sensitivity(PROBLEM, n_paths=8, noise=noise)  # half of the nodes: not an expectation
    even = GivenNoise(noise.z, torch.full((16,), 1 / 16, dtype=F64))  # two-point normals are equally likely
    assert torch.allclose(sensitivity(PROBLEM, n_paths=16, noise=even).value.mean, result.value.mean, rtol=1e-13)


def test_weights_over_several_blocks():
    model = GBM(n_steps=14)
    result = sensitivity(model.problem(2), n_paths=2**14, noise=gauss_hermite(2, 14), wrt=("mu", "sigma"))
    for k, estimate in result.gradient.items():
        assert float(estimate.mean) == pytest.approx(model.scheme(2)[k], rel=1e-12)


def test_merge_refuses_what_does_not_belong_together():
    def run(**changes):
        return sensitivity(**{"problem": PROBLEM, "n_paths": 50, "wrt": ("mu",), **changes})

    first = run()
    with pytest.raises(ArgumentError, match="at least one"):
        merge()
    with pytest.raises(ArgumentError, match="consecutive"):
        merge(first, run(first_path=60))  # a gap
    with pytest.raises(ArgumentError, match="consecutive"):
        merge(first, run(first_path=40))  # an overlap
    with pytest.raises(ArgumentError, match="consecutive"):
        merge(first, first)
    for other in (
        run(first_path=50, method="forward"),
        run(first_path=50, wrt=("sigma",)),
        run(first_path=50, bias=True),
        run(first_path=50, problem=PROBLEM.with_steps(8)),
    ):
        with pytest.raises(ArgumentError, match="one method"):
            merge(first, other)
    assert_same_bits(merge(first), first)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"n_paths": 1}, ArgumentError),
        ({"n_paths": 10.0}, ArgumentTypeError),
        ({"first_path": -1}, ArgumentError),
        ({"tile_paths": 0}, ArgumentError),
        ({"method": "magic"}, ArgumentError),
        ({"noise": torch.zeros(4, 10, 1)}, ArgumentTypeError),
        ({"problem": PROBLEM.sde}, ArgumentTypeError),
    ],
)
def test_nonsense_is_refused(changes, error):
    with pytest.raises(error):
        sensitivity(**{"problem": PROBLEM, "n_paths": 10, **changes})


def test_a_choice_of_parameters_does_not_change_their_gradient():
    everything = sensitivity(PROBLEM, n_paths=400, wrt=("mu", "sigma", "y0", "t1"))
    for k in ("mu", "sigma", "y0", "t1"):
        alone = sensitivity(PROBLEM, n_paths=400, wrt=k)
        assert set(alone.gradient) == {k}
        assert torch.allclose(alone.gradient[k].mean, everything.gradient[k].mean, rtol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_callers_grad_mode_and_graphs_do_not_matter(method):
    """Inside no_grad, and with parameters that are part of somebody's graph, in `wrt` or not."""
    raw = {k: v.clone().requires_grad_() for k, v in PROBLEM.sde.params.items()}
    attached = replace(
        PROBLEM,
        sde=replace(PROBLEM.sde, params={k: v * 1.0 for k, v in raw.items()}),
        y0=PROBLEM.y0.clone().requires_grad_(),
    )
    for wrt in (("sigma",), ("mu", "y0")):
        plain = sensitivity(PROBLEM, n_paths=40, method=method, wrt=wrt)
        inside = sensitivity(attached, n_paths=40, method=method, wrt=wrt)
        assert_same_bits(plain, inside)
        assert not any(e.mean.requires_grad for e in (inside.value, *inside.gradient.values()))
        with torch.no_grad():
            assert_same_bits(plain, sensitivity(attached, n_paths=40, method=method, wrt=wrt))


def test_progress_goes_to_standard_error_only_when_asked():
    class Slow(Executor):
        def map(self, fn, *iterables, **_):
            for start in iterables[0]:
                time.sleep(0.75)  # the bar appears after two seconds
                yield fn(start)

    shown = {}
    for progress in (True, False):
        stream = io.StringIO()
        with redirect_stderr(stream):
            sensitivity(PROBLEM, n_paths=4 * BLOCK, executor=Slow() if progress else None, progress=progress)
        shown[progress] = stream.getvalue()
    assert "pathwise" in shown[True]
    assert shown[False] == ""


def test_result_prints_and_converts():
    result = sensitivity(PROBLEM, n_paths=400, bias=True)
    text = repr(result)
    assert "pathwise, 400 paths x 4 steps" in text
    assert "d/d sigma" in text
    plain = result.to_dict()
    assert plain["gradient"]["mu"]["mean"] == float(result.gradient["mu"].mean)
    assert plain["bias"]["sigma"]["n"] == 400
    assert plain["n_paths"] == 400


def test_horizon_and_steps_of_a_result():
    result = sensitivity(replace(PROBLEM, n_steps=6), n_paths=20, first_path=40)
    assert (result.n_steps, result.first_path, result.n_paths) == (6, 40, 20)


@pytest.mark.parametrize("method", ["pathwise", "forward"])
def test_memory_does_not_hold_the_path(method):
    """4,000 paths by 10,000 steps: 320 MB of states if they were kept, 20 MB of boundaries as they are."""
    assert peak_megabytes(method, 4_000, 10_000) < 120


def test_the_repr_says_what_the_audit_took():
    """Where looking for jumps took longer than the run, and more than a second, it is said with its remedy."""
    result = sensitivity(smooth("diagonal", 0, n_steps=4, outputs=(0, 4)), n_paths=100, seed=1)
    assert 0 < result.looked <= result.seconds
    assert "audit=False" in repr(replace(result, seconds=10.0, looked=9.0))
    assert "audit=False" not in repr(replace(result, seconds=10.0, looked=1.0))
    assert "audit=False" not in repr(replace(result, seconds=0.2, looked=0.19))
