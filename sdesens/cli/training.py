"""`sdesens train`, `sdesens sample`, `sdesens report` and `sdesens steer`."""

import inspect
import json
import math
import os
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from sdesens.cli.common import as_argument, console, load_object, plain
from sdesens.errors import ArgumentError
from sdesens.training.checkpoint import checkpoints
from sdesens.training.config import RECIPES, TrainConfig, recipe
from sdesens.training.data import Data, Form
from sdesens.training.pictures import is_image, require_matplotlib, save_samples
from sdesens.training.ranks import choose_device
from sdesens.training.report import level_table, make_report, table
from sdesens.training.run import open_run
from sdesens.training.samples import draw_samples
from sdesens.training.snapshot import step_of
from sdesens.training.steer import Round
from sdesens.training.steer_objective import LinearReward, Reward
from sdesens.training.steer_run import steer_run
from sdesens.training.train import train as train_run

OUT = Annotated[Path | None, typer.Option(help="The run's directory; runs/NAME if left out.")]
DEVICE = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]
RUN = Annotated[Path, typer.Argument(help="Directory of a run of `sdesens train`.")]


def _options(given: Any) -> dict[str, inspect.Parameter]:
    """The fields of a configuration as parameters of a command; what is left out comes from the recipe."""
    found = {}
    for f in fields(given):
        kind: Any
        if f.default is MISSING:
            kind, default = Annotated[f.type, typer.Argument(help=f.metadata["help"])], inspect.Parameter.empty
        else:
            choices = f.metadata["choices"]
            words = f"{f.metadata['help']} One of {', '.join(choices)}." if choices else f.metadata["help"]
            kind = Annotated[f.type | None, typer.Option(help=f"{words} (default {_usual(f)})", show_default=False)]  # type: ignore[operator]
            default = None
        found[f.name] = inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
    return found


def _usual(f) -> str:
    """The default of a field, and of the recipes that have another."""
    others: dict = {}
    for name, values in RECIPES.items():
        if values.get(f.name, f.default) != f.default:
            others.setdefault(values[f.name], []).append(name)
    return "; ".join([str(f.default), *(f"{', '.join(names)}: {value}" for value, names in others.items())])


def train(
    *,
    out: OUT = None,
    device: DEVICE = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the configuration and leave.")] = False,
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard's files.")] = True,
    with_report: Annotated[bool, typer.Option("--report/--no-report", help="Sample and score at the end.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    **options,
) -> None:
    """Train a diffusion model, or go on with an interrupted run: the same command resumes to the same bits.

    Under `torchrun --nproc-per-node N -m sdesens train ...` N processes train together on the same sample stream.
    """
    config = recipe(**{k: v for k, v in options.items() if v is not None})
    if dry_run:
        print(config.show())
        return
    path = out or Path("runs") / Path(config.data).stem
    if config.picture_every or with_report:
        require_matplotlib()
    try:
        run = train_run(config, path, device=device, tensorboard=tensorboard, progress=not quiet, picture=_picture)
    except KeyboardInterrupt:
        saved = checkpoints(path / "checkpoints")
        there = f"goes on from step {step_of(saved[-1])}" if saved else "begins anew, as no checkpoint was reached"
        print(f"\nsdesens: stopped; the same command {there}.", file=sys.stderr)
        raise typer.Exit(130) from None
    if with_report and os.environ.get("RANK", "0") == "0":  # of several processes, the first
        screen = console()
        found = make_report(run)
        screen.print(table(found))
        screen.print(
            f"report: {path / 'report.json'}, {path / 'report.png'}; samples: {path / 'samples.npz'}", soft_wrap=True
        )


train.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [*_options(TrainConfig).values(), *(p for p in inspect.signature(train).parameters.values() if p.name != "options")]
)


def _picture(denoiser, data: Data, file: Path) -> None:
    n = 100 if is_image(data.form) else 2000
    save_samples(draw_samples(denoiser, data.form, n), data.form, file, like=data.train)


def sample(
    run: RUN,
    sampler: Annotated[str, typer.Option(help="heun, ddim, dpmpp, em or ancestral.")] = "heun",
    steps: Annotated[
        int | None, typer.Option(help="heun 18, ddim 50, dpmpp 20, em and ancestral 200 if left out.")
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Samples.")] = 100,
    label: Annotated[
        int | None, typer.Option("--class", help="One class for all; the classes in turn if left out.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Strength of the class; 1 is plain conditional sampling.")] = 1.0,
    eta: Annotated[float | None, typer.Option(help="Noise level of em (1) and ddim (0).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    checkpoint: Annotated[str, typer.Option(help="last, or best by held-out loss.")] = "last",
    out: Annotated[Path | None, typer.Option(help="Write OUT.npz and OUT.png; RUN/sample-SAMPLER if left out.")] = None,
    device: DEVICE = "auto",
) -> None:
    """Sample a trained model: an npz in the data's own units, and a picture."""
    found = open_run(run)
    where = _stem(run / f"sample-{sampler}" if out is None else out)
    require_matplotlib()
    _check_class(found.form, label, guidance)
    if found.steered and found.form.classes:
        only = found.steered["label"]
        if label not in (None, only) or guidance != 1.0:
            raise ArgumentError(
                f"{str(run)!r} was steered for class {only} without guidance: leave `--class` and `--guidance` out."
            )
        label = only
    if not found.config.drop_label and guidance != 1.0:
        raise ArgumentError("`--guidance` needs a model that has seen hidden labels: train with --drop-label above 0.")
    denoiser = found.denoiser(which=checkpoint, device=choose_device(device))  # type: ignore[arg-type]
    samples = draw_samples(
        denoiser, found.form, n, sampler=sampler, steps=steps, label=label, guidance=guidance, eta=eta, seed=seed
    )
    samples.save(where.with_name(where.name + ".npz"), found.form)
    title = f"{sampler}, {n} samples" + (f", class {label}" if label is not None else "")
    title += f", guidance {guidance:g}" if guidance != 1.0 else ""
    save_samples(samples, found.form, where.with_name(where.name + ".png"), title=title)
    print(f"{where}.npz, {where}.png")


def _check_class(form: Form, label: int | None, guidance: float = 1.0) -> None:
    if not form.classes and (label is not None or guidance != 1.0):
        raise ArgumentError(
            "`--class` and `--guidance` are for a model with classes: its data had no labels, or training hid them."
        )
    if label is not None and not 0 <= label < form.classes:
        raise ArgumentError(f"`--class` must be a class of the data, 0 ... {form.classes - 1}, got {label}.")


def _stem(out: Path) -> Path:
    """OUT of OUT.npz and OUT.png: into a folder, OUT/samples."""
    out = out.with_suffix("") if out.suffix in (".npz", ".png") else out
    if out.is_dir():
        out = out / "samples"
    if not out.name.strip(".") or not out.parent.is_dir():
        raise ArgumentError(
            f"`--out` {str(out)!r} is no name in a folder that exists: make the folder, or give another."
        )
    return out


def report(
    run: RUN,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 1,
    likelihood: Annotated[bool, typer.Option(help="Compute the likelihood of test rows.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Score a trained model: its samples and its loss beside what is possible."""
    require_matplotlib()
    found = make_report(open_run(run), seed=seed, likelihood=likelihood)
    if as_json:
        print(json.dumps(plain(found.to_json()), indent=2, allow_nan=False))
        return
    console().print(table(found))
    console().print(level_table(found))


def steer(
    run: RUN,
    reward: Annotated[
        str,
        typer.Option(
            help="linear:0.5,0.25 for a.x, or FILE.py:NAME, a function x (B, *event) -> (B,) in the data's units."
        ),
    ],
    method: Annotated[str, typer.Option(help="gradient (any reward), pathwise, or adjoint_matching.")] = "gradient",
    rounds: Annotated[int, typer.Option(help="Steps of the optimiser.")] = 200,
    batch: Annotated[int, typer.Option(help="Paths a round.")] = 400,
    lr: Annotated[float, typer.Option(help="Learning rate at the start.")] = 2e-3,
    eta: Annotated[float, typer.Option(help="Noise level of the sampler; below 1 it remembers its start.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Steps of the sampler that is tuned.")] = 32,
    label: Annotated[int | None, typer.Option("--class", help="The class; needed for a model with classes.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Directory of the tuned model; RUN-steered if left out.")] = None,
    device: DEVICE = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Tune a trained model so that its samples have the law p e^r, and show how its mean reward moves with the sampler's parameters."""
    found = open_run(run)
    _check_class(found.form, label)
    if found.form.classes and label is None:
        raise ArgumentError(
            f"a model with classes is steered for one of them: give `--class`, 0 ... {found.form.classes - 1}."
        )
    require_matplotlib()
    where = out or run.resolve().with_name(run.resolve().name + "-steered")
    with tqdm(total=rounds, unit=" rounds", disable=True if as_json else None) as bar:

        def seen(r: Round) -> None:
            bar.set_postfix_str(f"mean reward {r.reward:.4g}", refresh=False)
            bar.update()
            if r.step + 1 == rounds:
                bar.close()

        outcome = steer_run(
            found, _reward(reward, found.form), where, method=method, rounds=rounds, batch=batch, lr=lr, eta=eta, steps=steps, label=label,
            seed=seed, named=reward, device=choose_device(device), callback=seen, say=lambda text: print(f"{text} ...", file=sys.stderr),
        )  # fmt: skip
    if as_json:
        print(json.dumps(plain(outcome.to_json()), indent=2, allow_nan=False))
        return
    console().print(outcome.table())
    if outcome.derivatives is not None:
        console().print(outcome.derivatives.table())
    console().print(f"tuned model: {where}; picture: {where / 'steer.png'}", soft_wrap=True)


def _reward(words: str, form: Form) -> Reward:
    kind, _, rest = words.partition(":")
    if kind == "linear":
        try:
            slopes = torch.tensor([float(a) for a in rest.split(",")], dtype=torch.float64)
        except ValueError as error:
            raise ArgumentError(f"`--reward` {words!r} is not linear:NUMBER,NUMBER,...: {error}.") from error
        if slopes.numel() != math.prod(form.event):
            raise ArgumentError(
                f"`--reward` linear: takes {math.prod(form.event)} numbers, one an entry of a sample, got {slopes.numel()}."
            )
        return LinearReward(slopes.reshape(form.event))
    if not rest:
        raise ArgumentError(f"`--reward` must be linear:NUMBER,NUMBER,... or FILE.py:NAME, got {words!r}.")
    found, there = load_object(words)
    if not callable(found):
        names = ", ".join(k for k, v in there.items() if callable(v) and not k.startswith("_"))
        raise ArgumentError(f"{words!r} is not a function x (B, *event) -> (B,); that file has {names or 'none'}.")

    def called(x):
        with as_argument(words):
            return found(x)

    return called
