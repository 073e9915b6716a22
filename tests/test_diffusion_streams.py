"""One seed for everything: no two purposes see the same numbers, and none sees those of a sampler's paths."""

import itertools
import math

import pytest
import torch

from sdesens import Philox
from sdesens.applicable import PILOT_STREAM
from sdesens.audit import DIRECTIONS, STREAM
from sdesens.diffusion import VP, Empirical, Gaussian, GaussianMixture, dequantise, draw_noise, prior, streams
from sdesens.diffusion.draws import item_normals
from sdesens.estimators.probe import PROBE
from sdesens.integrate.checks import PROBE_STREAM
from sdesens.noise.source import apart, independent

D = torch.float64
N = 40_000
OURS = {name: value for name, value in vars(streams).items() if name.isupper()}
CORE = {0, PILOT_STREAM, DIRECTIONS, STREAM, PROBE.stream, PROBE_STREAM}
NORMAL = Gaussian(torch.zeros(2), torch.ones(2))
LAWS = {"normal": NORMAL, "ring": GaussianMixture.ring(), "points": Empirical(torch.linspace(-1, 2, 8).reshape(4, 2))}


def reached(stream: int) -> set[int]:
    """The streams that the core goes on to from one, and how it gets there."""
    source = Philox(1, stream)
    sources = (source, independent(source), apart(source), independent(apart(source)))
    return {s.stream for s in sources}


def test_streams_are_apart():
    assert len(OURS) >= 12
    for a, b in itertools.combinations([*OURS.values(), *CORE], 2):
        if a not in CORE or b not in CORE:
            assert not reached(a) & reached(b), (hex(a), hex(b))
            assert abs(a - b) > 1
    assert not {0, 2**32 - 1} & set(OURS.values())
    assert reached(0) == {0, 1, 2**31, 2**31 + 1}  # what the test above is about


def correlations(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of every column of x with every column of y."""
    x, y = ((a - a.mean(0)) / a.std(0, correction=0) for a in (x, y))
    return x.mT @ y / len(x)


@pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
def test_data_and_starting_noise_of_one_seed_are_independent(law):
    start = prior(VP(), N, (2,), seed=1, dtype=D)
    x = law.sample(N, seed=1)
    # 4 numbers of standard error 1/sqrt(N) for each law, and as many of the squares: false alarm 24 x 6e-5
    for a, b in ((x, start), (x.square() + x, start.square())):
        assert float(correlations(a, b).abs().max()) < 4 / math.sqrt(N)


def test_noise_is_taken_as_it_is():
    start = prior(VP(), N, (2,), seed=1, dtype=D)
    # negative control: on the stream of paths the data would be the starting noise itself
    assert torch.equal(NORMAL.sample(N, noise=Philox(1)), start)
    assert torch.equal(NORMAL.sample(N, noise=Philox(1, streams.DATA)), NORMAL.sample(N, 1))
    assert torch.equal(NORMAL.sample(5), NORMAL.sample(5, 0))


def test_purposes_of_one_seed_are_independent():
    x = torch.zeros(N, 1, dtype=D)
    columns = [
        prior(VP(), N, (1,), seed=1, dtype=D),
        Philox(1, 1).normals(0, N, 0, 1, 1, dtype=D, device=x.device)[0],
        NORMAL.sample(N, 1)[:, :1],
        draw_noise(1, 0, (N, 1), dtype=D),
        dequantise(x, 2, 0.0, 2.0, seed=1)[0],
        *(item_normals(x, 1, 1, 0, stream)[0] for stream in OURS.values()),
    ]
    found = correlations(torch.cat(columns, 1), torch.cat(columns, 1))
    # NORMAL's column is that of DATA, draw_noise's that of NOISE, a cell's place that of CELLS: the same numbers, as they should
    names = ["start", "next", "DATA", "NOISE", "CELLS", *OURS]
    same = torch.tensor([[a == b for b in names] for a in names])
    # some 150 pairs of purposes: false alarm 1e-2; a uniform has correlation sqrt(3/pi) = 0.977 with its normal
    assert float(found[~same].abs().max()) < 4 / math.sqrt(N)
    assert float(found[same].min()) > 0.97


def test_a_floor_has_draws_of_its_own():
    """The estimate of a floor from seed k is independent of data from seed k: it is that of its own two streams."""
    law, t = LAWS["ring"], 0.5
    x0 = law.sample(512, noise=Philox(3, streams.FLOOR_DATA))
    z = Philox(3, streams.FLOOR_NOISE).normals(0, 512, 0, 1, 3, dtype=D, device=x0.device)[0][:, 1:]
    error = z - law.denoiser(VP()).eps(VP().reparameterise(x0, t, z), t)
    # the same sums in another order
    torch.testing.assert_close(
        law.floor(VP(), t, n_samples=512, seed=3).mean, error.square().mean(), rtol=1e-13, atol=0
    )
