"""The loops of the page on training, driven by hand, by Accelerate and by Fabric: they see the trainer's numbers."""

import re
from pathlib import Path

import pytest
import torch

from sdesens.training import load_data

PAGE = Path(__file__).parent.parent / "docs" / "training.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def block(word: str) -> str:
    (found,) = [b for b in BLOCKS if word in b]
    return found


@pytest.fixture(scope="module")
def plain() -> dict:
    session: dict = {}
    exec(compile(block("import torch"), str(PAGE), "exec"), session)
    return session


def test_the_rest_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    session: dict = {}
    for text in BLOCKS:
        if "torch" not in text:
            exec(compile(text, str(PAGE), "exec"), session)
    assert session["x"].shape == (100, 2)
    assert load_data("rows.npz").form.cell > 0
    assert session["closeness"](session["x"]).shape == (100,)
    before, exact = capsys.readouterr().out.splitlines()
    assert "(95% CI, n=1000)" in before
    assert exact == "0.551123 (exact)"


def test_the_plain_loop_trains(plain):
    # an untrained network returns 0, and the loss of F = 0 is that of unit-variance targets, 1 a dimension, to some per cent
    assert 0.5 < float(plain["loss"].detach()) < 1.1
    assert all(bool(p.detach().isfinite().all()) for p in plain["net"].parameters())


@pytest.mark.parametrize("launcher", ["accelerate", "lightning_fabric"])
def test_other_launchers_see_the_same_stream(plain, launcher):
    pytest.importorskip(launcher)
    session = dict(plain)
    exec(compile(block(f"from {launcher} import"), str(PAGE), "exec"), session)
    assert session["net"] is not plain["net"]
    # the same operations on the same numbers on one CPU: the same bits
    for ours, theirs in zip(plain["net"].parameters(), session["net"].parameters(), strict=True):
        assert torch.equal(ours, theirs)
