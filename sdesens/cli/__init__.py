"""The command line: `sdesens check`, `models`, `estimators`, `train`, `sample`, `report` and `steer`.

Exit status: 0 when every check passes, 1 when one fails (or a path or a loss becomes non-finite), 2 for bad input.
"""

import importlib.metadata
import sys
import warnings
from collections.abc import Callable
from typing import Annotated

import typer

from sdesens.cli import checks, training
from sdesens.errors import NonFiniteError, SdesensError

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


COMMANDS: tuple[Callable[..., None], ...] = (
    checks.check,
    checks.models,
    checks.estimators,
    training.train,
    training.sample,
    training.report,
    training.steer,
)
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """Entry point: errors and warnings of the library become a message, errors an exit status too."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *rest, **options: f"sdesens: warning: {message}\n"
    try:
        app()
    except NonFiniteError as error:
        sys.exit(_complain(error, 1))
    except (SdesensError, OSError) as error:  # the latter of names that no file can have, folders that refuse
        sys.exit(_complain(error, 2))
    finally:
        warnings.formatwarning = usual


def _complain(error: Exception, status: int) -> int:
    print(f"sdesens: {error}", file=sys.stderr)
    return status
