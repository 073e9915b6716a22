"""What is done with a run that is trained: samples, report and steering by their commands, and what each of them refuses."""

import errno
import json
from unittest.mock import Mock

import matplotlib.figure
import numpy as np
import pytest
import torch

import sdesens.cli.training as commands
from sdesens.cli import main
from sdesens.errors import (
    ArgumentError,
    ArgumentTypeError,
    CheckpointError,
    CheckpointWarning,
    HighVarianceWarning,
    NonFiniteError,
)
from sdesens.training import Batches, Samples, load_data, make_denoiser, make_report, open_run, recipe, score, train
from sdesens.training.files import whole_file
from sdesens.training.log import read_log
from sdesens.training.steer_objective import LinearReward
from sdesens.training.steer_run import steer_run

FEW = {"rounds": 2, "batch": 8, "steps": 4, "n": 40}
WORDS = ("--rounds", "2", "--batch", "8", "--steps", "4")


def small(data, **changes):
    usual = {"steps": 6, "batch": 16, "width": 8, "depth": 1, "picture_every": 0, "checkpoint_every": 3, "log_every": 2}
    return recipe(str(data), **{**usual, **changes})


def trained(path, data, **changes):
    return train(small(data, **changes), path, tensorboard=False, progress=False)


@pytest.fixture
def labelled(tmp_path):
    """A table with units of its own, of two classes."""
    x = np.random.default_rng(0).normal(size=(60, 2)) * [1.0, 100.0] + [5.0, 0.0]
    np.savez(tmp_path / "rows.npz", x=x, labels=np.arange(60) % 2)
    return tmp_path / "rows.npz"


@pytest.fixture
def say(tmp_path, monkeypatch, capsys):
    """Give a command, in a folder of its own; its exit status, output and complaints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)

    def command(*words):
        monkeypatch.setattr("sys.argv", ["sdesens", *words])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code or 0, *capsys.readouterr()

    return command


def names(folder):
    return {p.name for p in folder.iterdir() if not p.name.startswith(".")}


# samples


def test_where_samples_go(say, tmp_path):
    trained(tmp_path / "run", "gmm8")
    (tmp_path / "folder").mkdir()
    for words, stem in (
        ((), "run/sample-heun"),
        (("--sampler", "ddim"), "run/sample-ddim"),
        (("--out", "here"), "here"),
        (("--out", "there.npz"), "there"),
        (("--out", "v1.2"), "v1.2"),
        (("--out", "folder"), "folder/samples"),
    ):
        status, said, wrong = say("sample", "run", "-n", "4", "--steps", "4", *words)
        assert (status, said.strip()) == (0, f"{stem}.npz, {stem}.png"), wrong
        assert np.load(tmp_path / f"{stem}.npz")["x"].shape == (4, 2)
    status, _, wrong = say("sample", "run", "--out", "nowhere/x")
    assert (status, "make the folder" in wrong) == (2, True), wrong
    assert not (tmp_path / "nowhere").exists()


def test_guidance_and_classes_that_the_model_has_not_learnt(say, tmp_path, labelled):
    for drop, words, message in (
        ("0.0", ("--guidance", "2"), "train with --drop-label above 0"),
        ("1.0", ("--class", "1"), "or training hid them"),
    ):
        trained(tmp_path / drop, labelled, drop_label=float(drop))
        status, _, wrong = say("sample", drop, "-n", "4", *words)
        assert (status, message in wrong) == (2, True), wrong
        assert names(tmp_path / drop) == {"run.json", "log.jsonl", "checkpoints"}
    assert say("sample", "0.0", "-n", "4", "--class", "1")[0] == 0
    hidden = open_run(tmp_path / "1.0")
    assert hidden.form.classes == 0  # a model without classes, and its report and samples know none
    assert "class hit rate" not in [s.name for s in make_report(hidden).scores]
    assert say("sample", "1.0", "-n", "4")[0] == 0


def test_samples_and_pictures_of_a_table_are_in_its_units(tmp_path, labelled, monkeypatch):
    run, seen = trained(tmp_path / "run", labelled), []
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda figure, file, **_: (seen.append(figure), file.touch())
    )
    commands._picture(run.denoiser(), load_data(str(labelled)), tmp_path / "points.png")
    axes = seen[0].axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_aspect()) == ("x[0]", "x[1]", "auto")
    data = np.concatenate([line.get_ydata() for line in axes.get_lines() if line.get_label() == "data"])
    with np.load(labelled) as file:
        rows = file["x"][:, 1]
    off = np.abs(data[:, None] - rows).min(1)
    assert len(data) == 54  # a tenth is held out
    assert off.max() < 1e-4  # float32 of numbers up to 300


# files that cannot be written


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a" / "b.txt"
    with whole_file(file) as part:
        part.write_text("first")

    def write(words, then):
        with whole_file(file) as part:
            part.write_text(words)
            then()

    with pytest.raises(ArgumentError, match=r"b\.txt' could not be written .*No space left.*make room"):
        write("sec", full)
    with pytest.raises(KeyboardInterrupt):
        write("thi", Mock(side_effect=KeyboardInterrupt))
    assert file.read_text() == "first"
    assert [p.name for p in file.parent.iterdir()] == ["b.txt"]
    with pytest.raises(ArgumentError, match="could not be written"), whole_file(file / "c"):
        pass


@pytest.mark.parametrize("broken", ["savez", "savefig"])
def test_a_full_disk_leaves_samples_and_reports_as_they_were(say, tmp_path, monkeypatch, broken):
    trained(tmp_path / "run", "gmm8")
    assert say("sample", "run", "-n", "4", "--out", "s")[0] == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.setattr(*((np, "savez", full) if broken == "savez" else (matplotlib.figure.Figure, "savefig", full)))
    status, _, wrong = say("sample", "run", "-n", "4", "--seed", "1", "--out", "s")
    assert (status, "No space left on device" in wrong) == (2, True)
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    changed = {p.name for p in after if before.get(p) != after[p]}
    assert changed == (set() if broken == "savez" else {"s.npz"})  # whole, and new
    with np.load(tmp_path / "s.npz") as found:
        assert found["x"].shape == (4, 2)
    assert not list(tmp_path.rglob("*.part-*"))


# training that goes on, and descriptions


def test_a_log_that_was_removed_or_cut_is_heard_of(tmp_path):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    config = small("gmm8", picture_every=4)
    with pytest.raises(Stop):
        train(config, tmp_path, tensorboard=False, progress=False, picture=stop)
    (tmp_path / "log.jsonl").unlink()
    with pytest.warns(CheckpointWarning, match="lacks lines of steps before 3"):
        train(config, tmp_path, tensorboard=False, progress=False)
    assert [row["step"] for row in read_log(tmp_path)] == [4, 6, 6]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: [],
        lambda d: {**d, "form": {**d["form"], "colour": 1}},
        lambda d: {**d, "form": {k: v for k, v in d["form"].items() if k != "event"}},
        lambda d: {**d, "config": {**d["config"], "steps": "many"}},
        lambda d: {**d, "config": None},
    ],
)
def test_a_description_that_is_none(tmp_path, change):
    file = trained(tmp_path, "gmm8").path / "run.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(
        (CheckpointError, ArgumentError), match=r"does not describe a run|made by another version|`steps`"
    ):
        open_run(tmp_path)


def test_ranks_that_cannot_be():
    config, data = small("gmm8"), load_data("gmm8")
    for rank, size, message in ((2, 2, "`rank`"), (-1, 2, "`rank`"), (0, 0, "`size`"), (0, 3, "multiple of ranks")):
        with pytest.raises(ArgumentError, match=message):
            Batches(config, data, rank, size)
    with pytest.raises(ArgumentTypeError, match="`rank` must be an int"):
        Batches(config, data, True, 2)


def test_of_several_processes_the_first_reports(say, tmp_path, monkeypatch):
    run = trained(tmp_path / "run", "gmm8")
    monkeypatch.setattr(commands, "train_run", lambda *_, **__: run)
    for rank, done in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        status, said, _ = say("train", "gmm8", "--out", "run")
        assert (status, "sliced W2" in said, (tmp_path / "run" / "report.json").exists()) == (0, done, done)


def test_a_device_without_values(say, tmp_path):
    trained(tmp_path / "run", "gmm8")
    status, _, wrong = say("sample", "run", "--device", "meta")
    assert (status, "`device` 'meta' cannot be used here" in wrong) == (2, True)


# steering


REWARDS = {
    "none.": (lambda x: None, "one real number a sample"),
    "complex": (lambda x: x[:, 0] + 0j, "one real number a sample"),
    "column": (lambda x: x[:, :1], "one real number a sample"),
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_that_is_none_makes_no_directory(tmp_path, name):
    run = trained(tmp_path / "run", "gmm8")
    reward, message = REWARDS[name]
    with pytest.raises(ArgumentError, match=message):
        steer_run(run, reward, tmp_path / "out", **FEW)
    assert not (tmp_path / "out").exists()


def test_rewards_of_the_users_own(say, tmp_path):
    trained(tmp_path / "run", "gmm8")
    (tmp_path / "mine.py").write_text(
        "calls = []\n"
        "def breaks(x): return x.no_such_name\n"
        "def later(x):\n    calls.append(1)\n    return x[:, 0] / (len(calls) < 8)\n"  # six before the first round
        "def jumps(x): return (x[:, 0] > 0).to(x)\n"
        "def square(x): return -x.square().sum(1)\n"
    )
    status, _, wrong = say("steer", "run", "--reward", "mine.py:breaks", *WORDS)
    assert (status, "no_such_name" in wrong, names(tmp_path)) == (
        2,
        True,
        {"run", "mine.py"} | ({"__pycache__"} & names(tmp_path)),
    )
    status, _, wrong = say("steer", "run", "--reward", "mine.py:later", *WORDS)  # infinite in the second round
    assert (status, "infinite or NaN in round 1" in wrong) == (1, True), wrong
    with pytest.warns(UserWarning, match="no derivatives of the mean reward"):
        status, said, wrong = say("steer", "run", "--reward", "mine.py:jumps", *WORDS)  # the directory is free again
    assert (status, "target, from weighted samples" in said) == (0, True), wrong
    assert json.loads((tmp_path / "run-steered" / "steer.json").read_text())["derivatives"] is None
    status, _, wrong = say("steer", "run", "--reward", "mine.py:square", *WORDS)
    assert (status, "reward = 'mine.py:square' here, 'mine.py:jumps' there" in wrong) == (2, True), wrong


def test_a_steered_model_is_steered_on_but_not_judged_by_its_data(say, tmp_path):
    run, reward = trained(tmp_path / "run", "gmm8"), LinearReward([0.5, 0.25])
    once = steer_run(run, reward, tmp_path / "once", **FEW)
    twice = steer_run(open_run(tmp_path / "once"), reward, tmp_path / "twice", **FEW)
    assert (once.exact, twice.exact) == (True, False)
    status, _, wrong = say("report", "once")
    assert (status, "steer.json has its report" in wrong) == (2, True), wrong
    with pytest.raises(CheckpointError, match=r"holds another run.*slopes|holds another run.*reward"):
        steer_run(run, LinearReward([0.5, 0.5]), tmp_path / "once", **FEW)


def test_a_reward_whose_target_rests_on_few_samples(tmp_path):
    run = trained(tmp_path / "run", "gmm8")
    with pytest.warns(HighVarianceWarning, match="take a smaller reward"):
        steer_run(run, lambda x: 40 * x[:, 0], tmp_path / "out", **FEW)


def test_counts_of_steering_have_the_commands_names(say, tmp_path):
    trained(tmp_path / "run", "gmm8")
    bad = (("rounds", "0"), ("steps", "1"), ("batch", "1"), ("eta", "0"), ("lr", "0"), ("method", "reinforce"))
    for option, value in bad:
        words, name = (f"--{option}", value), f"`{option}`"
        status, _, wrong = say("steer", "run", "--reward", "linear:1,0", *words)
        assert (status, name in wrong) == (2, True), wrong
    assert names(tmp_path) == {"run"}


def test_one_class_of_labelled_data_is_steered(say, tmp_path, labelled):
    trained(tmp_path / "run", labelled, drop_label=0.2)
    status, _, wrong = say("steer", "run", "--reward", "linear:1,0", *WORDS)
    assert (status, "0 ... 1" in wrong) == (2, True), wrong
    status, said, wrong = say("steer", "run", "--reward", "linear:0.1,0", "--class", "1", *WORDS)
    assert (status, "d/d guidance" in said) == (0, True), wrong
    found = json.loads((tmp_path / "run-steered" / "steer.json").read_text())
    assert 0 < found["before"]["mean"]["mean"][0] < 10  # the table's own units: 5 +/- 1
    assert found["before"]["cov"]["mean"][1][1] > 1000
    tuned = torch.cat([v.flatten() for v in open_run(tmp_path / "run-steered").denoiser().weights.values()])
    assert bool(torch.isfinite(tuned).all())


def test_an_offset_of_the_reward_costs_no_digits(tmp_path):
    """A column far from 0, whose reward in float32 would be one number: moments and tuned weights are those of the column at 0."""
    x, found = np.random.default_rng(1).normal(size=(60, 2)), []
    for name, offset in (("near", 0.0), ("far", 1.7e9)):
        np.save(tmp_path / f"{name}.npy", x + np.array([offset, 0.0]))
        run = trained(tmp_path / name, tmp_path / f"{name}.npy")
        found.append(steer_run(run, LinearReward([1.0, 0.0]), tmp_path / f"{name}-steered", **FEW))
    near, far = found
    for of in ("before", "after", "target"):
        a, b = (getattr(f, of).reward for f in found)
        # float64 of 1.7e9 is good to 2e-7, which the data's own scaling has seen too
        assert float(b.mean - a.mean) == pytest.approx(1.7e9, abs=1e-4), of
        assert float(b.standard_error) == pytest.approx(float(a.standard_error), rel=1e-3), of
    assert float(near.target.reward.mean - near.before.reward.mean) > 0.3
    for k, v in near.after.deviation(near.target).items():
        assert float(far.after.deviation(far.target)[k].mean) == pytest.approx(float(v.mean), rel=1e-3), k


@pytest.mark.parametrize("name", ["mixes", "random", "rarely"])
def test_rewards_of_no_single_sample_are_refused(tmp_path, name):
    def mixes(x):
        return x[:, 0] - x[:, 0].mean()

    def random(x):
        return torch.rand(len(x))

    def rarely(x):
        return torch.where(x[:, 0] > x[:, 0].new_tensor(2.0), torch.nan, x[:, 0])

    run, reward = trained(tmp_path / "run", "gmm8"), {"mixes": mixes, "random": random, "rarely": rarely}[name]
    words = "infinite or NaN" if name == "rarely" else "may not depend on others, nor be random"
    with pytest.raises((ArgumentError, NonFiniteError), match=words):
        steer_run(run, reward, tmp_path / "out", **FEW)


def test_a_model_steered_for_a_class_is_sampled_for_it(say, tmp_path, labelled):
    trained(tmp_path / "run", labelled, drop_label=0.0)
    status, said, wrong = say("steer", "run", "--reward", "linear:0.1,0", "--class", "1", *WORDS)
    assert (status, "d/d guidance" in said) == (0, False), wrong  # which means nothing without hidden labels
    assert say("sample", "run-steered", "-n", "4")[0] == 0
    assert np.load(tmp_path / "run-steered" / "sample-heun.npz")["labels"].tolist() == [1, 1, 1, 1]
    status, _, wrong = say("sample", "run-steered", "--class", "0")
    assert (status, "was steered for class 1" in wrong) == (2, True), wrong


def test_places_that_cannot_be(say, tmp_path):
    trained(tmp_path / "run", "gmm8")
    (tmp_path / "file").write_text("words")
    for out in ("file/x", "n" * 300):
        for words in (
            ("train", "gmm8", "--steps", "1", "--out", out),
            ("steer", "run", "--reward", "linear:1,0", *WORDS, "--out", out),
            ("sample", "run", "--out", out),
        ):
            status, _, wrong = say(*words)
            assert (status, wrong.startswith("sdesens: ")) == (2, True), wrong


def test_levels_of_a_grid_are_those_of_all_rows(tmp_path):
    x = np.random.default_rng(2).integers(0, 16, size=(60, 4, 4))
    np.save(tmp_path / "x.npy", x)
    held_out = load_data(str(tmp_path / "x.npy"))
    row = int(np.abs(x - held_out.form.restore(held_out.test)[:1].numpy()).sum((1, 2)).argmin())
    x[row, 0, 0] = 40  # the extreme is in a row that is held out
    np.save(tmp_path / "x.npy", x)
    run = trained(tmp_path / "run", tmp_path / "x.npy")
    assert make_report(run)["test bits per dimension"].value > 0
    data = load_data("moons")
    denoiser, wrong = make_denoiser(small("moons"), data.form), Samples(data.test, data.test_labels + 9)
    with pytest.raises(ArgumentError, match=r"labels 0 \.\.\. 1"):
        score(denoiser, data, wrong)


def test_images_have_variances_and_no_covariance(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(3).normal(size=(40, 9, 9)))
    run = trained(tmp_path / "run", tmp_path / "x.npy")
    found = steer_run(run, lambda x: x.mean((1, 2)), tmp_path / "out", **FEW)
    assert found.before.cov.mean.shape == found.target.cov.mean.shape == (81,)
    assert 0 < float(found.after.deviation(found.target)["cov"].mean) < 1
