"""Every Python block of the README runs, in order, in one session."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


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


def test_greeks_of_the_page_on_shapes():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "shapes.md").read_text(), flags=re.DOTALL)
    session: dict = {}
    exec(compile(block, "docs/shapes.md", "exec"), session)
    # Black-Scholes at S = K = 100, r = 0.05, sigma = 0.2, T = 1: z below 4.5 (false alarm 3e-5), and 1 percent for the step
    exact = {"delta": 0.636831, "vega": 37.52403, "rho": 53.23248, "theta": -6.414028}
    greeks = session["greeks"]
    errors = {"delta": greeks["y0"].standard_error[0], "vega": greeks["sigma"].standard_error}
    errors |= {"rho": greeks["r"].standard_error, "theta": greeks["t1"].standard_error}
    for name, value in exact.items():
        allowed = 4.5 * float(errors[name]) + 0.01 * abs(value)
        assert abs(float(session[name]) - value) < allowed, name


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README.read_text()))
def test_links_point_at_files(link):
    assert (README.parent / link).exists()


def test_blocks_of_the_page_on_jumps(capsys):
    session: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "jumps.md").read_text(), flags=re.DOTALL):
        exec(compile(block, "docs/jumps.md", "exec"), session)
    out = capsys.readouterr().out
    for words in ("jump: ", "Unbiased methods that apply: 'conditional'", "Sensitivity by ", "Hessian by "):
        assert words in out


def test_blocks_of_the_page_on_estimators(capsys):
    session: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "estimators.md").read_text(), flags=re.DOTALL):
        exec(compile(block, "docs/estimators.md", "exec"), session)
    assert "ExpectationGradient by pathwise, 100000 draws" in capsys.readouterr().out
    policy = session["logits"].softmax(1)
    assert policy[0, 0] > 0.8
    assert policy[1, 2] > 0.8


def test_page_on_diffusion_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "diffusion.md").read_text(), flags=re.DOTALL)
    session: dict = {}
    for block in blocks:
        exec(compile(block, "docs/diffusion.md", "exec"), session)
    guidance = session["result"].gradient["guidance"]
    # mu (1 - alpha_T^2) = 1.5 in continuous time; 50 steps of order 1 leave a few per cent
    assert abs(float(guidance.mean) - 1.5) < 0.05
    assert session["samples"].shape == (1000, 2)
    assert (
        float(
            (session["found"].log_prob - session["law"].log_density(session["law"].sample(8, 3), session["VP"](), 1e-5))
            .abs()
            .max()
        )
        < 5e-3
    )


def test_page_on_fitting_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "fitting.md").read_text(), flags=re.DOTALL)
    exec(compile(block, "docs/fitting.md", "exec"), {})
    assert "Fit to 20 transitions" in capsys.readouterr().out
