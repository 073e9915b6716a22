"""Steer the model of a run: a new run with the tuned network, a table of what it did, and a picture.

OUT/run.json, OUT/checkpoints/     a run that `sdesens sample` knows; it is not trained on
OUT/steer.json, OUT/steer.png      moments before and after beside the target's, derivatives of the reward; samples
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from sdesens.diffusion.adjoint_matching import REMEMBERED, remembered
from sdesens.diffusion.checks import whole
from sdesens.diffusion.predict import Denoiser, Predictor
from sdesens.diffusion.wrappers import guide
from sdesens.errors import ArgumentError, SdesensError
from sdesens.estimate import Estimate
from sdesens.noise import Philox
from sdesens.training.checkpoint import checkpoints, save_checkpoint
from sdesens.training.data import Form, law_of
from sdesens.training.files import whole_file
from sdesens.training.pictures import save_comparison
from sdesens.training.run import FILE, Run, claimed
from sdesens.training.snapshot import Snapshot
from sdesens.training.steer import Round, check_steering, steer
from sdesens.training.steer_objective import LinearReward, Reward, Sampling, rewarded, steering_grid
from sdesens.training.steer_report import (
    Derivatives,
    Steered,
    derivatives,
    many,
    moments_of,
    picked,
    predicted,
    reweighted,
    tilted,
)

FINE = 4  # the grid of evaluation has so many steps for one of tuning
SHOWN = 2000
STARTS, EACH = 125, 256  # pairs and samples of each, where the start is remembered
FEW = 4  # dimensions of which the table has each


@dataclass(frozen=True)
class InUnits:
    """A reward of samples in the data's own units."""

    reward: Reward
    form: Form

    def __call__(self, x: Tensor) -> Tensor:
        return self.reward(self.form.restore(x))


@dataclass(frozen=True)
class Outcome:
    """What steering did.

    Attributes
    ----------
    before, after, target : Steered
        Moments of the base's samples, of the tuned model's, and of the law that it aims at, in the data's own units.
    exact : bool
        Whether the target is a closed form; else it comes from weighted samples of the base.
    derivatives : Derivatives or None
        Of the base's mean reward; None where the reward, or the network, has no derivative along the path.
    """

    before: Steered
    after: Steered
    target: Steered
    exact: bool
    derivatives: Derivatives | None

    def to_json(self) -> dict:
        """Plain numbers."""
        found: dict = {k: getattr(self, k).to_dict() for k in ("before", "after", "target")}
        found["deviation"] = {k: v.to_dict() for k, v in self.after.deviation(self.target).items()}
        found["derivatives"] = None if self.derivatives is None else self.derivatives.to_dict()
        return {**found, "exact": self.exact}

    def table(self) -> Table:
        """Moments before and after beside the target's; of few dimensions each, of more how far off they are."""
        found = Table("", "before", "steered", "target, exact" if self.exact else "target, from weighted samples")
        rows = (self.before, self.after, self.target)
        found.add_row("mean reward", *(_shown(s.reward) for s in rows))
        d = len(self.target.mean.mean)
        for i in range(d if d <= FEW else 0):
            found.add_row(f"mean of x[{i}]", *(_shown(s.mean, i) for s in rows))
            found.add_row(f"variance of x[{i}]", *(_shown(s.variance, i) for s in rows))
        far, off = (s.deviation(self.target) for s in (self.before, self.after))
        for name, k in (
            ("mean: off the target's, in its standard deviations", "mean"),
            ("covariance: off the target's, by its size", "cov"),
        ):
            cells = (f"{100 * float(v[k].mean):.1f} %" for v in (far, off))
            found.add_row(name, *cells, f"sampling alone: {100 * float(off[k].standard_error):.1f} %")
        return found


def steer_run(
    run: Run,
    reward: Reward,
    out: Path,
    *,
    method: str = "gradient",
    rounds: int = 200,
    batch: int = 400,
    lr: float = 2e-3,
    eta: float = 1.0,
    steps: int = 32,
    label: int | None = None,
    n: int = 20_000,
    seed: int = 0,
    named: str | None = None,
    device: str | torch.device = "cpu",
    callback: Callable[[Round], None] | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Outcome:
    """Steer a run's model to the law p e^r, and write a new run.

    Parameters
    ----------
    run : Run
    reward : callable x (B, *event) -> (B,)
        Of samples in the data's own units.
    out : Path
        The new run's directory: new or empty.
    method, rounds, batch, lr, eta, seed, callback
        As of `steer`; `rounds` are its steps.
    steps : int
        Steps of the sampler that is tuned; it is judged on a grid four times as fine.
    label : int, optional
        The class, for a model with classes.
    n : int
        Samples of each table entry.
    named : str, optional
        What to call the reward in the new run's description.
    device : str or torch.device
    say : callable (str), optional
        Is told what comes next, once the model is tuned.

    Raises
    ------
    ArgumentError, CheckpointError, NonFiniteError
    """
    if out.resolve() == run.path.resolve():
        raise ArgumentError(
            f"`out` must be another directory than the run's, {str(out)!r}: the tuned model is a new run."
        )
    whole("rounds", rounds)
    whole("steps", steps, 2, hint="the sampler's last step goes to 0")
    base, std = _one_class(run, label, device), run.form.sigma_data
    check_steering(base, reward, method, rounds, batch, lr)
    law = None if run.steered else law_of(run.config.data)  # a steered model's own is not known exactly
    grids = (steering_grid(base.schedule, k, data_std=std) for k in (steps, FINE * steps))
    tuning, judging = (Sampling(grid, run.form.event, eta) for grid in grids)
    forgets = remembered(base.schedule, eta, data_std=std) <= REMEMBERED
    known = (law, reward) if law is not None and isinstance(reward, LinearReward) and forgets else None
    seen = reward if known else InUnits(reward, run.form)
    _try(seen, tuning.draw(base, 4, Philox(seed)))  # before anything is done
    told = {"method": method, "rounds": rounds, "batch": batch, "lr": lr, "eta": eta, "steps": steps, "label": label, "seed": seed}  # fmt: skip
    new = Run(out, run.config, run.form, {"from": str(run.path), "reward": named or _name(reward), **told})
    one, two, three = ((seed + k) % 2**64 for k in (1, 2, 3))
    with claimed(new):
        try:
            tuned = steer(base, tuning, seen, method=method, steps=rounds, batch=batch, lr=lr, seed=seed, data_std=std, callback=callback)  # fmt: skip
        except BaseException:
            if not checkpoints(new.checkpoints):
                (out / FILE).unlink()  # nothing came of it: the directory is free again
            raise
        assert isinstance(tuned.net, nn.Module)
        weights = tuned.net.state_dict()
        save_checkpoint(new.checkpoints, Snapshot(rounds, weights, weights, {}, new.meta))
        say("samples before and after")
        drawn = {name: many(m, judging, n, one) for name, m in (("before", base), ("steered", tuned))}
        before, after = (moments_of(x, seen) for x in drawn.values())
        if known:
            target, drawn["target"] = tilted(*known), known[0].tilt(known[1].slopes).sample(SHOWN, seed=one)
        elif forgets:
            target, drawn["target"] = reweighted(drawn["before"], seen), picked(drawn["before"], seen, SHOWN)
        else:
            say("the target, which depends on the start")
            target = predicted(base, judging, seen, n_starts=STARTS, n_each=EACH, seed=two)
        save_comparison({k: x[:SHOWN].cpu() for k, x in drawn.items()}, run.form, out / "steer.png")
        say("derivatives of the mean reward")
        guided = label is not None and run.config.drop_label > 0
        model: Predictor = guide(base, 1.0, torch.tensor(label, device=device)) if guided else base
        slopes = _derivatives(model, judging, seen, min(n, 4000), three)
        before, after, target = (_in_units(s, run.form) for s in (before, after, target))
        found = Outcome(before, after, target, known is not None, slopes)
        with whole_file(out / "steer.json") as part:
            part.write_text(json.dumps(found.to_json(), indent=2) + "\n")
    return found


def _in_units(s: Steered, form: Form) -> Steered:
    """Moments in the data's own units; rewards are of them already."""
    shift, scale = (torch.tensor(v, dtype=torch.float64).expand_as(s.mean.mean) for v in (form.shift, form.scale))
    mean = replace(s.mean, mean=shift + scale * s.mean.mean, standard_error=scale * s.mean.standard_error)
    both = torch.outer(scale, scale) if s.cov.mean.dim() == 2 else scale.square()
    cov = replace(s.cov, mean=both * s.cov.mean, standard_error=both * s.cov.standard_error)
    return Steered(s.reward, mean, cov)


def _derivatives(model: Predictor, sampling: Sampling, reward: Reward, n: int, seed: int) -> Derivatives | None:
    try:
        return derivatives(model, sampling, reward, n_paths=n, seed=seed)
    except (SdesensError, RuntimeError) as error:  # of a reward that jumps, is constant or uses numpy
        warnings.warn(f"no derivatives of the mean reward: {error}", UserWarning, stacklevel=3)
        return None


def _try(reward: Reward, x: Tensor) -> None:
    """Raise unless the reward of each of a few samples is its own, and one number."""
    together = rewarded(reward, x)
    alone = torch.cat([rewarded(reward, row) for row in x.split(1)])
    spread = (together - together.mean()).abs().max() + 1e-3 * together.abs().max()
    if bool(((together - alone).abs() > 1e-3 * spread).any()):
        raise ArgumentError(
            f"`reward` gives {alone.tolist()} for samples one by one and {together.tolist()} for the same together: the reward of a sample may "
            "not depend on others, nor be random."
        )


def _name(reward: Reward) -> str:
    """What tells a reward from another in a run's description."""
    if isinstance(reward, LinearReward):
        return f"linear:{reward.slopes.tolist()}"
    return getattr(reward, "__qualname__", type(reward).__qualname__)


def _one_class(run: Run, label: int | None, device: str | torch.device) -> Denoiser:
    denoiser = run.denoiser(device=device)
    if not run.form.classes:
        if label is not None:
            raise ArgumentError("`label` is for a model with classes: its data had no labels.")
        return denoiser
    if label is None or isinstance(label, bool) or not 0 <= label < run.form.classes:
        raise ArgumentError(
            f"`label` must be a class of the data, 0 ... {run.form.classes - 1}, got {label!r}: a model with classes is steered for one."
        )
    return denoiser.given(torch.tensor(label, device=device))


def _shown(value: Estimate, at: int | tuple[int, int] | tuple[()] = ()) -> str:
    error = float(value.standard_error[at])
    return f"{float(value.mean[at]):.4f}" + (f" +/- {1.96 * error:.4f}" if error else "")
