"""The command line as a user meets it: output, exit status, files."""

import csv
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from sdesens.cli import app, main
from sdesens.errors import SdesensError

FAST = ["--paths", "400", "--steps", "16"]
SOURCE = """
import torch
from sdesens import SDE, Problem

one = torch.ones(1, dtype=torch.float64)
sde = SDE(lambda t, y, p: -p["k"] * y, lambda t, y, p: 0.1 * y, {"k": 0.5 * one[0]})
problem = Problem(sde, lambda ys, p: ys[-1, :, 0], y0=one, ts=(0.0, 1.0), n_steps=8)

def factory():
    return problem

jump = Problem(sde, lambda ys, p: (ys[-1, :, 0] > 0.6).to(ys.dtype) + 0 * p["k"], y0=one, ts=(0.0, 1.0), n_steps=8)
explosive = Problem(
    SDE(lambda t, y, p: p["k"] * y**5, lambda t, y, p: 0.1 * y, {"k": 100 * one[0]}),
    lambda ys, p: ys[-1, :, 0], y0=one, ts=(0.0, 1.0), n_steps=8,
)
not_a_problem = 3

def needs_an_argument(x):
    return problem
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return str(path)


def run(*args, monkeypatch=None):
    """Exit status of the real entry point."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sdesens", *args])
        patch.delenv("COLUMNS", raising=False)  # a test runner may set a narrow one
        with pytest.raises(SystemExit) as stop:
            main()
    return stop.value.code or 0


def test_check_prints_a_table_and_passes(capsys):
    assert run("check", "vasicek", *FAST) == 0
    out = capsys.readouterr().out
    for word in ("kappa", "pathwise", "torchsde_adjoint", "closed form", "exact scheme", "checks passed"):
        assert word in out


def test_failed_check_exits_1(capsys, file):
    assert run("check", f"{file}:jump", *FAST, "--methods", "pathwise,forward") == 1
    assert "refused: it misses the jump" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["digital", "barrier"])
def test_a_jump_is_refused_and_answered_beside_the_closed_form(capsys, name):
    assert run("check", name, "--paths", "4000", "--steps", "8") == 0
    out = capsys.readouterr().out
    for words in ("Audit: jump", "refused: it misses the jump", "closed form", "conditional", "checks passed"):
        assert words in out, words


def test_non_finite_path_exits_1(capsys, file):
    assert run("check", f"{file}:explosive", "--paths", "10") == 1
    assert "became NaN or infinite" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["problem", "factory"])
def test_own_file(capsys, file, name):
    assert run("check", f"{file}:{name}", "--paths", "400", "--methods", "pathwise,forward", "--no-refine") == 0
    assert "2 of 2" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nonsense"], "neither a built-in problem"),
        (["missing.py:problem"], "no file 'missing.py'"),
        (["gbm", "--methods", "pathwyse"], "pathwyse"),
        (["gbm", "--wrt", "nu"], "'nu'"),
        (["gbm", "--paths", "1"], "`n_paths` must be at least 2"),
        (["gbm", "--steps", "0"], "`n_steps` must be at least 1"),
        (["gbm", "--seed", str(2**70)], "`seed` must lie in"),
        (["gbm", "--plot", "/no/such/folder/x.png"], "no such folder"),
        (["gbm", "--plot", "x.foo"], "must end in one of"),
    ],
)
def test_bad_input_exits_2(capsys, args, message):
    assert run("check", *args) == 2
    assert message in capsys.readouterr().err


def test_object_that_is_no_problem_exits_2(capsys, file):
    assert run("check", f"{file}:not_a_problem") == 2
    assert "problem" in capsys.readouterr().err


def test_function_with_arguments_and_broken_file_exit_2(capsys, file, tmp_path):
    assert run("check", f"{file}:needs_an_argument") == 2
    assert "missing 1 required positional argument" in capsys.readouterr().err
    broken = tmp_path / "broken.py"
    broken.write_text("import sdesens\nx = (")
    assert run("check", f"{broken}:x") == 2
    assert "SyntaxError" in capsys.readouterr().err


def test_names_that_look_like_markup_are_printed_as_they_are(capsys, tmp_path):
    path = tmp_path / "my.py"
    path.write_text(SOURCE + "\nbasket = problem\n")
    assert run("check", f"{path}:basket", "--paths", "200", "--methods", "pathwise", "--no-refine") == 0
    assert "my.py:basket: all 1 checks passed" in capsys.readouterr().out


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("sdesens ")


def test_json_has_null_for_what_is_not_a_number(capsys):
    assert run("check", "gbm", *FAST, "--json", "--no-refine", "--methods", "pathwise") == 0
    out = capsys.readouterr().out
    assert "NaN" not in out
    lines = json.loads(out)["comparisons"]
    assert any(line["standard_error"] is None for line in lines if line["method"] == "closed form")


def test_json_is_json(capsys):
    assert run("check", "gbm", *FAST, "--json", "--no-refine", "--methods", "pathwise,forward") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] is True
    assert set(data["results"]) == {"pathwise", "forward"}
    assert data["results"]["pathwise"]["n_steps"] == 16


def test_plot_writes_a_picture(capsys, tmp_path):
    picture = tmp_path / "out.png"
    assert run("check", "ou", *FAST, "--methods", "pathwise,adjoint", "--plot", str(picture)) == 0
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 30_000  # four axes with lines, not an empty canvas


def test_seed_changes_the_numbers_and_only_they(capsys):
    numbers = []
    for seed in ("1", "1", "2"):
        run("check", "gbm", *FAST, "--json", "--no-refine", "--methods", "pathwise", "--seed", seed)
        numbers.append(json.loads(capsys.readouterr().out)["results"]["pathwise"]["value"]["mean"])
    assert numbers[0] == numbers[1] != numbers[2]


def test_models_lists_all():
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == 0
    for name in ("brownian", "digital", "heston", "lotka-volterra", "tbill"):
        assert name in result.stdout


def test_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "sdesens", "check", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "neither a built-in problem" in done.stderr


def test_estimators_writes_a_table_and_a_picture(tmp_path):
    out = tmp_path / "study.v1"  # a dot in the name is no suffix
    result = CliRunner().invoke(app, ["estimators", "--samples", "400", "--costs", "cos", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "the score function varies less than pathwise beyond k = 1.0638" in result.output
    assert (tmp_path / "study.v1.png").read_bytes()[:4] == b"\x89PNG"
    with (tmp_path / "study.v1.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13 * 2 * 5
    assert {r["method"] for r in rows} >= {"pathwise", "measure_valued"}
    assert float(rows[0]["exact_variance"]) > 0


def test_estimators_as_json(tmp_path):
    result = CliRunner().invoke(
        app, ["estimators", "--samples", "400", "--costs", "exp", "--out", str(tmp_path / "a"), "--json"]
    )
    found = json.loads(result.output)
    assert len(found["rows"]) == 130
    assert {c["parameter"] for c in found["crossings"]} == {"mean", "scale"}


@pytest.mark.parametrize(
    "arguments", [["--costs", "tan"], ["--samples", "1"], ["--scale", "0"], ["--out", "nowhere/a"]]
)
def test_estimators_refuses_bad_options(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["estimators", *arguments])
    assert isinstance(result.exception, SdesensError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("out", "found"), [(".", "estimators"), ("pic.png", "pic")])
def test_estimators_into_a_folder_or_a_named_picture(out, found, tmp_path):
    result = CliRunner().invoke(
        app, ["estimators", "--samples", "40", "--costs", "quadratic", "--out", str(tmp_path / out)]
    )
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{found}.csv", f"{found}.png"]
