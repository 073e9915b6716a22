"""Tables as text, for a `repr`."""

import io

from rich.console import Console
from rich.table import Table


def as_text(*tables: Table) -> str:
    """What a wide console without colours would show."""
    out = io.StringIO()
    console = Console(width=150, file=out, emoji=False, markup=False, highlight=False)
    for table in tables:
        console.print(table)
    return out.getvalue().rstrip("\n")
