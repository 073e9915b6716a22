"""Execute the notebooks: `python notebooks/build.py [--fast] [NAME ...]`, `make notebooks`.

Each notebook is a script NAME.py with cells (jupytext's percent format), which is what is edited and what a diff shows; NAME.ipynb beside it
is the script executed, with its outputs. `--fast` executes small runs, as the test suite does, and saves nothing. The pictures of the README are
taken from them.
"""

import argparse
import base64
import os
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
SCRIPTS = sorted(HERE.glob("[0-9]*.py"))
LONGEST = 600  # seconds of a cell
IMAGES = HERE.parent / "docs" / "images"
PICTURES = {"two_paths.png": ("01", 2), "lynx_hare.png": ("06", 0)}  # which picture of which notebook


def execute(script: Path, *, fast: bool = False) -> nbformat.NotebookNode:
    """The executed notebook of a script; raise CellExecutionError where a cell fails."""
    notebook = jupytext.read(script)
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i:02d}"  # the same at each execution
    environment = {**os.environ, "SDESENS_FAST": "1" if fast else "0"}
    resources = {"metadata": {"path": str(HERE)}}
    client = NotebookClient(
        notebook,
        timeout=LONGEST,
        kernel_name="python3",
        resources=resources,
        record_timing=False,
        extra_arguments=["--log-level=40"],
    )
    client.execute(env=environment)
    return notebook


def pictures(notebook: nbformat.NotebookNode) -> list[bytes]:
    """The pictures of an executed notebook, in order."""
    found = [out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", [])]
    return [base64.b64decode(data["image/png"]) for data in found if "image/png" in data]


def main() -> None:
    """Execute and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of names, such as 01; all if left out")
    parser.add_argument("--fast", action="store_true", help="small runs; nothing is saved")
    given = parser.parse_args()
    chosen = [s for s in SCRIPTS if not given.names or any(s.name.startswith(n) for n in given.names)]
    for script in chosen:
        begun = time.perf_counter()
        notebook = execute(script, fast=given.fast)
        if not given.fast:
            nbformat.write(notebook, script.with_suffix(".ipynb"))
            for file, (name, which) in PICTURES.items():
                if script.name.startswith(name):
                    (IMAGES / file).write_bytes(pictures(notebook)[which])
        print(f"{script.stem}: {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
