"""Every Python block of the README runs, in order, in one session."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    session: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), session)
    out = capsys.readouterr().out
    assert "Sensitivity by pathwise, 100000 paths x 100 steps" in out
    assert "torch.Size([51, 5, 3]) torch.Size([51, 5, 3])" in out
    # the block of output in the README, but for its seconds
    shown = re.search(r"```text\n(.*?)```", README.read_text(), flags=re.DOTALL)[1]
    for line in shown.splitlines()[1:]:
        assert line in out


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README.read_text()))
def test_links_point_at_files(link):
    assert (README.parent / link).exists()
