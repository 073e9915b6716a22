"""The loops of the page on training, driven by hand, by Accelerate and by Fabric: they see the trainer's numbers."""

import re
from pathlib import Path

import pytest
import torch

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
