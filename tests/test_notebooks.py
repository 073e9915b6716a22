"""The notebooks: each script runs in its small setting, its assertions included, and its executed copy is of the same text, whole and clean."""

import importlib.util
from pathlib import Path

import jupytext
import nbformat
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
spec = importlib.util.spec_from_file_location("build", NOTEBOOKS / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
LONGEST_CELL = 24  # lines


def of_kind(notebook, kind):
    return [cell for cell in notebook.cells if cell.cell_type == kind]


@pytest.mark.parametrize("script", build.SCRIPTS, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the notebook machinery
def test_it_runs(script):
    notebook = build.execute(script, fast=True)
    assert sum("assert" in cell.source for cell in of_kind(notebook, "code")) >= 5
    assert len(build.pictures(notebook)) >= 2


@pytest.mark.parametrize("script", build.SCRIPTS, ids=lambda p: p.stem)
def test_the_executed_copy_is_whole(script):
    source, copy = jupytext.read(script), nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert [c.source for c in copy.cells] == [c.source for c in source.cells]  # `make notebooks` brings it up to date
    cells = of_kind(copy, "code")
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert cell.source.count("\n") < LONGEST_CELL
        for out in cell.outputs:
            assert out.output_type != "error"
            assert out.get("name") != "stderr", out.get("text")
            assert "\x1b" not in out.get("text", "")  # colours of a terminal
    assert "What to read next" in of_kind(copy, "markdown")[-1].source
    assert copy.cells[0].cell_type == "markdown"  # the question comes before the code


def test_the_readmes_pictures_are_theirs():
    for file, (name, which) in build.PICTURES.items():
        (script,) = [s for s in build.SCRIPTS if s.name.startswith(name)]
        copy = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
        assert (build.IMAGES / file).read_bytes() == build.pictures(copy)[which]


def test_there_are_six():
    assert [s.name[:2] for s in build.SCRIPTS] == ["01", "02", "03", "04", "05", "06"]
