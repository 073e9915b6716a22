"""Tables as text, for a `repr`."""

import io

from rich.console import Console
from rich.table import Table


def as_text(*tables: Table) -> str:
    """What a wide console without colours would show."""
    out = io.StringIO()
    console = Console(
        width=150,
        file=out,
        emoji=False,
        markup=False,
        highlight=False,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
    )  # plain in a notebook and under FORCE_COLOR too
    for table in tables:
        console.print(table)
    return out.getvalue().rstrip("\n")
