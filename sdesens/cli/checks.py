"""`sdesens check`, `sdesens models` and `sdesens estimators`."""

import csv
import inspect
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sdesens.cli.common import as_argument, console, load_object, plain, split
from sdesens.crosscheck import CrossCheck, crosscheck
from sdesens.errors import ArgumentError
from sdesens.estimators.study import COSTS, variance_study
from sdesens.models import MODELS, Known
from sdesens.plot import check_file, report, study_report
from sdesens.problem import Problem
from sdesens.verdict import Answer


def check(
    target: Annotated[
        str,
        typer.Argument(help="A built-in problem (see `sdesens models`), or FILE.py:NAME.", metavar="NAME|FILE.py:NAME"),
    ],
    paths: Annotated[int, typer.Option(help="Monte Carlo paths.")] = 20_000,
    steps: Annotated[int | None, typer.Option(help="Steps of the grid, instead of the problem's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    methods: Annotated[str | None, typer.Option(help="Comma-separated routes; all that apply if left out.")] = None,
    wrt: Annotated[
        str | None,
        typer.Option(help="Comma-separated parameters, 'y0' and 't1' among them; all parameters if left out."),
    ] = None,
    refine: Annotated[bool, typer.Option(help="Follow the routes as dt shrinks.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture to this file.")] = None,
) -> None:
    """Compute the sensitivities of a problem by several routes on the same noise, and say whether they agree."""
    if plot is not None:
        check_file(plot)  # before the work, not after it
    known = _load(target, steps)
    names = split(wrt)
    answers = {
        label: Answer(*known.answers(which, names), of_scheme=which == "scheme")
        for label, which in (("exact scheme", "scheme"), ("closed form", "exact"))
        if getattr(known, which) is not None
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is in the table
        result = crosscheck(
            known.problem,
            methods=split(methods),
            wrt=names,
            n_paths=paths,
            seed=seed,
            refine=refine,
            answers=answers,
        )
    if plot is not None:
        report(
            known.problem,
            next(iter(result.results[result.reference].gradient)),
            result.refinement,
            plot,
            seed=seed,
        )
    if as_json:
        print(json.dumps(plain({"target": target, "seed": seed, **result.to_dict()}), indent=2, allow_nan=False))
    else:
        _show(target, known, result, plot)
    raise typer.Exit(0 if result.ok else 1)


def models() -> None:
    """List the built-in problems."""
    table = Table("name", "what it is", "known answer")
    for name, make in MODELS.items():
        kinds = {"exact": "SDE", "scheme": "scheme"}
        known = make()
        answers = [word for attribute, word in kinds.items() if getattr(known, attribute) is not None]
        table.add_row(name, (make.__doc__ or "").strip().splitlines()[0], " and ".join(answers) or "none")
    Console().print(table)


def estimators(
    out: Annotated[
        Path, typer.Option(help="Write OUT.csv and OUT.png; into a folder, estimators.csv and estimators.png.")
    ] = Path("estimators"),
    samples: Annotated[int, typer.Option(help="Draws at each point.")] = 100_000,
    mean: Annotated[float, typer.Option(help="Mean of the normal law.")] = 1.0,
    scale: Annotated[float, typer.Option(help="Standard deviation of the normal law.")] = 1.0,
    costs: Annotated[str | None, typer.Option(help="Comma-separated, of quadratic, exp, cos; all if left out.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Sample the variance of gradient estimators on three costs of a normal draw, beside the exact variances."""
    if out.suffix in (".png", ".csv"):
        out = out.with_suffix("")
    if out.is_dir():
        out = out / "estimators"
    picture, table = out.with_name(out.name + ".png"), out.with_name(out.name + ".csv")
    check_file(picture)
    study = variance_study(mean=mean, scale=scale, n_samples=samples, seed=seed, costs=split(costs) or tuple(COSTS))
    study_report(study, picture)
    rows = study.rows()
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    if as_json:
        crossings = [
            {"cost": c, "parameter": p, "sampled": found, "exact": exact}
            for (c, p), (found, exact) in study.crossings.items()
        ]
        print(json.dumps(plain({"seed": seed, "rows": rows, "crossings": crossings}), indent=2, allow_nan=False))
        return
    screen = console()
    screen.print(study.table())
    screen.print(
        "* least of all. Each gradient estimate is unbiased; a run of n draws has the standard error (variance / n)^(1/2)."
    )
    for (cost, parameter), (found, exact) in study.crossings.items():
        screen.print(
            f"{COSTS[cost][1]}, {parameter}: the score function varies less than pathwise beyond k = {exact:.4f} "
            f"(sampled: {found:.3f})."
        )
    screen.print(f"table: {table}, picture: {picture}", soft_wrap=True)


def _load(target: str, steps: int | None) -> Known:
    """A built-in problem, or the user's own from FILE.py:NAME."""
    if target in MODELS:
        return MODELS[target]() if steps is None else MODELS[target](n_steps=steps)
    if ":" not in target:
        raise ArgumentError(f"{target!r} is neither a built-in problem ({', '.join(MODELS)}) nor FILE.py:NAME.")
    found, there = load_object(target)
    if inspect.isfunction(found):
        with as_argument(target):
            found = found()
    if isinstance(found, Problem):
        found = Known(found, None, None)
    if not isinstance(found, Known):
        names = [k for k, v in there.items() if isinstance(v, Problem | Known)]
        file, _, name = target.rpartition(":")
        raise ArgumentError(f"{name!r} in {file!r} is not a Problem; that file has {', '.join(names) or 'none'}.")
    # a chain's exact answer is stated for its own number of steps
    return found if steps is None else replace(found, problem=found.problem.with_steps(steps), scheme=None)


def _show(target: str, known: Known, result: CrossCheck, plot: Path | None) -> None:
    screen = console()
    if known.notes:
        screen.print(known.notes, soft_wrap=True)
    screen.print(result.table(narrow=screen.width < 130))
    screen.print(result.cost_table())
    failed = [c for c in result.comparisons if c.ok is False]
    screen.print(f"{target}: {len(failed)} of {len(result.comparisons)} checks failed." if failed else f"{target}: all {len(result.comparisons)} checks passed.")  # fmt: skip
    if plot is not None:
        screen.print(f"picture: {plot}")
