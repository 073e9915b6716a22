"""The command line: `sdesens check`, `sdesens models` and `sdesens estimators`.

Exit status: 0 when every check passes, 1 when one fails (or a path becomes non-finite), 2 for bad input.
"""

import csv
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sdesens.crosscheck import CrossCheck, crosscheck
from sdesens.errors import ArgumentError, NonFiniteError, SdesensError
from sdesens.estimators.study import COSTS, variance_study
from sdesens.models import MODELS, Known
from sdesens.plot import check_file, report, study_report
from sdesens.problem import Problem
from sdesens.verdict import Answer

app = typer.Typer(
    help="Sensitivities of stochastic differential equations, with error bars.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sdesens {importlib.metadata.version('sdesens')}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
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
    names = _split(wrt)
    answers = {
        label: Answer(*known.answers(which, names), of_scheme=which == "scheme")
        for label, which in (("exact scheme", "scheme"), ("closed form", "exact"))
        if getattr(known, which) is not None
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is in the table
        result = crosscheck(
            known.problem,
            methods=_split(methods),
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
        print(json.dumps(_plain({"target": target, "seed": seed, **result.to_dict()}), indent=2, allow_nan=False))
    else:
        _show(target, known, result, plot)
    raise typer.Exit(0 if result.ok else 1)


@app.command()
def models() -> None:
    """List the built-in problems."""
    table = Table("name", "what it is", "known answer")
    for name, make in MODELS.items():
        kinds = {"exact": "SDE", "scheme": "scheme"}
        known = make()
        answers = [word for attribute, word in kinds.items() if getattr(known, attribute) is not None]
        table.add_row(name, (make.__doc__ or "").strip().splitlines()[0], " and ".join(answers) or "none")
    Console().print(table)


@app.command()
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
    study = variance_study(mean=mean, scale=scale, n_samples=samples, seed=seed, costs=_split(costs) or tuple(COSTS))
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
        print(json.dumps(_plain({"seed": seed, "rows": rows, "crossings": crossings}), indent=2, allow_nan=False))
        return
    console = _console()
    console.print(study.table())
    console.print(
        "* least of all. Each gradient estimate is unbiased; a run of n draws has the standard error (variance / n)^(1/2)."
    )
    for (cost, parameter), (found, exact) in study.crossings.items():
        console.print(
            f"{COSTS[cost][1]}, {parameter}: the score function varies less than pathwise beyond k = {exact:.4f} "
            f"(sampled: {found:.3f})."
        )
    console.print(f"table: {table}, picture: {picture}", soft_wrap=True)


def main() -> None:
    """Entry point: errors of the library become a message and an exit status."""
    try:
        app()
    except NonFiniteError as error:
        sys.exit(_complain(error, 1))
    except SdesensError as error:
        sys.exit(_complain(error, 2))


def _complain(error: Exception, status: int) -> int:
    print(f"sdesens: {error}", file=sys.stderr)
    return status


def _split(names: str | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    found = tuple(n.strip() for n in names.split(",") if n.strip())
    if not found:
        raise ArgumentError(f"{names!r} names nothing: separate names by commas, or leave the option out.")
    return found


def _load(target: str, steps: int | None) -> Known:
    """A built-in problem, or the user's own from FILE.py:NAME."""
    if target in MODELS:
        return MODELS[target]() if steps is None else MODELS[target](n_steps=steps)
    file, colon, name = target.rpartition(":")
    if not colon:
        raise ArgumentError(f"{target!r} is neither a built-in problem ({', '.join(MODELS)}) nor FILE.py:NAME.")
    path = Path(file)
    if not path.is_file():
        raise ArgumentError(f"there is no file {file!r}: give FILE.py:NAME, NAME being a Problem in that file.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ArgumentError(f"{file!r} is not a Python file: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as `python FILE.py` would
    try:
        spec.loader.exec_module(module)
        found = getattr(module, name, None)
        if inspect.isfunction(found):
            found = found()
    except SdesensError:
        raise
    except Exception as error:
        raise ArgumentError(f"{target!r} could not be run: {type(error).__name__}: {error}") from error
    if isinstance(found, Problem):
        found = Known(found, None, None)
    if not isinstance(found, Known):
        names = [k for k, v in vars(module).items() if isinstance(v, Problem | Known)]
        raise ArgumentError(f"{name!r} in {file!r} is not a Problem; that file has {', '.join(names) or 'none'}.")
    # a chain's exact answer is stated for its own number of steps
    return found if steps is None else replace(found, problem=found.problem.with_steps(steps), scheme=None)


def _plain(x):
    """Numbers that JSON has no word for become null."""
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _console() -> Console:
    """A console that is wide enough for tables where nothing says how wide it is."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 150
    return Console(width=width, emoji=False, markup=False, highlight=False)


def _show(target: str, known: Known, result: CrossCheck, plot: Path | None) -> None:
    console = _console()
    if known.notes:
        console.print(known.notes, soft_wrap=True)
    console.print(result.table(narrow=console.width < 130))
    console.print(result.cost_table())
    failed = [c for c in result.comparisons if c.ok is False]
    console.print(f"{target}: {len(failed)} of {len(result.comparisons)} checks failed." if failed else f"{target}: all {len(result.comparisons)} checks passed.")  # fmt: skip
    if plot is not None:
        console.print(f"picture: {plot}")


if __name__ == "__main__":
    main()
