"""How good a trained model is: distances from its samples to test data, each beside its floor, the same distance between real data.

    sliced W2, MMD^2            for points of few dimensions
    inliers, mode shares, cross-entropy under the true law         where the law is known
    classifier Frechet distance, class hit rate, nearest-neighbour ratio             for labelled data
    eps-loss per log-SNR, and over the noise levels of VP at uniform times, on test and training rows, beside the floors
    test log-likelihood in nats, or bits per dimension for data on a grid

Data on a grid have bounds, to which samples are clamped before they are scored.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdesens.diffusion.checks import whole
from sdesens.diffusion.dequantise import bits_per_dim, dequantise
from sdesens.diffusion.draws import draw_noise, draw_uniforms, uniform_times
from sdesens.diffusion.likelihood import log_prob
from sdesens.diffusion.losses import dsm_loss
from sdesens.diffusion.metrics import frechet, mmd2, mode_coverage, nn_ratio, sliced_w2
from sdesens.diffusion.oracles import Gaussian
from sdesens.diffusion.predict import NET, Denoiser, Predictor
from sdesens.diffusion.preserving import VP
from sdesens.diffusion.schedule import Schedule
from sdesens.diffusion.schedules import EDM
from sdesens.diffusion.weights import simple_weight
from sdesens.errors import ArgumentError
from sdesens.training.classifier import fit_classifier
from sdesens.training.data import Data
from sdesens.training.floors import floors
from sdesens.training.samples import Samples

FEW = 3  # dimensions in which MMD's bandwidths make sense
EVALUATED = 2048  # rows of a loss
ROWS_OF_FEW, ROWS_OF_MANY = 512, 64  # of a likelihood, in few and in many dimensions
FIRST_TIME_OF_LOSS = 1e-3
REFERENCE = 40_000
FEWEST = 3  # samples
PROBES = 4
LEVELS = tuple(range(8, -9, -2))  # log-SNR


@dataclass(frozen=True)
class Score:
    """One number: its standard error, its floor (the same of real rows, or of the best network) if they are known, and what is good."""

    name: str
    value: float
    floor: float | None = None
    standard_error: float | None = None
    note: str = ""
    better: str = "lower"


@dataclass(frozen=True)
class Level:
    """The eps-loss at a log-SNR: on test and training rows, and its floors."""

    log_snr: float
    test: float
    train: float
    floors: dict[str, float]


@dataclass(frozen=True)
class Report:
    """What `score` returns."""

    scores: tuple[Score, ...]
    levels: tuple[Level, ...]
    samples: Samples = field(repr=False)

    def __getitem__(self, name: str) -> Score:
        return next(s for s in self.scores if s.name == name)

    def to_json(self) -> dict[str, Any]:
        """A dict for JSON, without the samples."""
        return {"scores": [vars(s) for s in self.scores], "levels": [vars(level) for level in self.levels]}


def score(denoiser: Denoiser, data: Data, samples: Samples, *, likelihood: bool = True) -> Report:
    """All scores that make sense for the data; see the head of this file.

    Parameters
    ----------
    denoiser : Denoiser
        In eval mode, as of `Run.denoiser`.
    data : Data
    samples : Samples
        As of `draw_samples`.
    likelihood : bool
        Its cost is some hundred evaluations with derivatives.
    """
    x = samples.x
    whole("n", len(x), FEWEST, hint="it is the number of samples")
    if (
        samples.labels is not None
        and data.form.classes
        and not bool(((samples.labels >= 0) & (samples.labels < data.form.classes)).all())
    ):
        raise ArgumentError(
            f"`samples` must have labels 0 ... {data.form.classes - 1}, got {int(samples.labels.min())} ... {int(samples.labels.max())}."
        )
    if data.form.cell:
        x = x.clamp(data.form.low, data.form.high)
    scores = [*_distances(x, data), *_of_law(x, data), *_of_classes(x, samples.labels, data), *_of_rows(x, data)]
    scores += _losses(denoiser, data)
    if likelihood:
        scores.append(_likelihood(denoiser, data))
    return Report(tuple(scores), tuple(_level(denoiser, data, lam) for lam in LEVELS), samples)


def _distances(x: Tensor, data: Data) -> list[Score]:
    """The floor is the distance of as many test rows from the same reference: training rows, or many draws of a law."""
    many = data.train if data.law is None else data.law.sample(REFERENCE, seed=3).float()
    n = min(len(x), len(data.test))
    x, test = x[:n], data.test[:n]
    note = f"{n} samples from {len(many)} rows, 256 directions"
    found = [Score("sliced W2", sliced_w2(x, many), sliced_w2(test, many), note=note)]
    if x[0].numel() <= FEW:
        here, floor = mmd2(x, data.train), mmd2(test, data.train)
        found.append(
            Score(
                "MMD^2", float(here.mean), float(floor.mean), float(here.standard_error), "unbiased: may fall below 0"
            )
        )
    return found


def _of_law(x: Tensor, data: Data) -> list[Score]:
    law = data.law
    if law is None:
        return []
    own, real = mode_coverage(x, law), mode_coverage(data.test, law)
    entropies = [-law.log_density(rows.double(), VP(), 0.0) for rows in (x, data.test)]
    error = float(entropies[0].std() / math.sqrt(len(x)))
    return [
        Score("inliers", own.inliers, real.inliers, None, "within 3 standard deviations of a mode", "higher"),
        Score("mode total variation", own.mode_tv, real.mode_tv, note="how far the modes' shares are off, 0 to 1"),
        Score(
            "cross-entropy", float(entropies[0].mean()), float(entropies[1].mean()), error, "nats, under the true law"
        ),
    ]


def _of_classes(x: Tensor, labels: Tensor | None, data: Data) -> list[Score]:
    if data.form.classes < 2 or data.labels is None or data.test_labels is None or labels is None:
        return []
    judge = fit_classifier(data.train, data.labels)
    test, train, own = (judge.features(rows) for rows in (data.test, data.train, x))
    return [
        Score("classifier Frechet distance, test", frechet(own, test), frechet(train, test)),
        Score("classifier Frechet distance, train", frechet(own, train), note="depends on the number of samples"),
        Score(
            "class hit rate", judge.accuracy(x, labels), judge.accuracy(data.test, data.test_labels), better="higher"
        ),
    ]


def _of_rows(x: Tensor, data: Data) -> list[Score]:
    """Whether the training rows are recited; nothing to say of a law, or where test rows are training rows."""
    rows = {tuple(r) for r in data.train.flatten(1).tolist()}
    if data.law is not None or all(tuple(r) in rows for r in data.test.flatten(1).tolist()):
        return []
    return [
        Score(
            "nearest-neighbour ratio", nn_ratio(x, data.train, data.test), 1.0, None, "below 0.8: memorising", "near 1"
        )
    ]


def _eps_loss(denoiser: Predictor, rows: Tensor, labels: Tensor | None, log_snr: Tensor) -> Tensor:
    """|eps - eps_hat|^2 / d of rows, taken in turn, at noise levels (n,): (n,), float64."""
    device = next((v.device for k, v in denoiser.params.items() if k.startswith(NET)), torch.device("cpu"))
    which = torch.arange(len(log_snr)) % len(rows)
    x0, eps = rows[which].to(device), draw_noise(0, 0, (len(which), *rows.shape[1:]), device=device)
    given = denoiser
    if labels is not None:
        assert isinstance(denoiser, Denoiser)
        given = denoiser.given(labels[which].to(device))
    with torch.no_grad():
        return dsm_loss(given, x0, denoiser.schedule.t_of_log_snr(log_snr), eps).eps_error.double().cpu()


def _losses(denoiser: Denoiser, data: Data) -> list[Score]:
    t = uniform_times(VP(), draw_uniforms(0, 0, EVALUATED), t_min=FIRST_TIME_OF_LOSS)
    log_snr, scores = VP().log_snr(t), []
    found = _least(data, VP(), t)
    note = "over the noise levels of VP at uniform times; " + ", ".join(f"{k} {v:.4f}" for k, v in found.items())
    for name, rows, labels in (("test", data.test, data.test_labels), ("train", data.train, data.labels)):
        if name == "test" or data.law is None:
            loss = _eps_loss(denoiser, rows, labels, log_snr)
            value, error = float(loss.mean()), float(loss.std() / math.sqrt(len(loss)))
            worse = value - 2 * error > found.get("linear", math.inf)
            more = " (no better than a linear network: train longer)" if worse else ""
            scores.append(Score(f"eps-loss, {name}", value, found.get("oracle"), error, note + more))
            note = "the same levels, training rows"
    return scores


def _least(data: Data, schedule: Schedule, t: Tensor) -> dict[str, float]:
    """Floors at times t (n,); of a law, what its best denoiser and the best linear one have on the very draws that a network is judged by."""
    if data.law is None:
        return floors(data, schedule, t, simple_weight)
    log_snr = schedule.log_snr(t)
    best = {"oracle": data.law, "linear": Gaussian(data.law.mean, data.law.cov)}
    return {k: float(_eps_loss(law.denoiser(schedule), data.test, None, log_snr).mean()) for k, law in best.items()}


def _level(denoiser: Denoiser, data: Data, log_snr: float) -> Level:
    """At one noise level, the same for all rows; floors come from the EDM schedule, on which it is always reached."""
    many = torch.full((EVALUATED,), float(log_snr), dtype=torch.float64)
    t = EDM().t_of_log_snr(many)
    test = float(_eps_loss(denoiser, data.test, data.test_labels, many).mean())
    train = float(_eps_loss(denoiser, data.train, data.labels, many).mean())
    return Level(log_snr, test, train, _least(data, EDM(), t if data.law is not None else t[:1]))


def _likelihood(denoiser: Denoiser, data: Data) -> Score:
    """Of test rows, by the probability-flow ODE; data on a grid are spread over their cells first."""
    d, cell = data.test[0].numel(), data.form.cell
    x = data.test[: ROWS_OF_FEW if d <= FEW else ROWS_OF_MANY]
    log_volume = 0.0
    if cell:
        low, high = data.form.low, data.form.high
        levels = round((high - low) / cell) + 1
        x, log_volume = dequantise(((x - low) / cell).round(), levels, low - cell / 2, high + cell / 2)
    device = next(iter(denoiser.weights.values())).device
    given = denoiser if data.test_labels is None else denoiser.given(data.test_labels[: len(x)].to(device))
    with torch.no_grad():
        nats = log_prob(given, x.to(device), probes=None if d <= FEW else PROBES).log_prob.double().cpu() + log_volume
    values = bits_per_dim(nats, d) if cell else nats
    assert isinstance(values, Tensor)
    error = float(values.std() / math.sqrt(len(values)))
    if cell:
        return Score(
            "test bits per dimension", float(values.mean()), None, error, f"{len(x)} rows, dequantised: an upper bound"
        )
    floor = None if data.law is None else float(data.law.log_density(x.double(), VP(), 0.0).mean())
    scale = torch.tensor(data.form.scale, dtype=torch.float64).log().expand(d if len(data.form.scale) == 1 else -1)
    value = float(values.mean() - scale.sum())  # a density in the data's own units
    return Score("test log-likelihood", value, floor, error, f"nats, {len(x)} rows", "higher")
