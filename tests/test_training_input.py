"""Bad input to the trainer: data, options, directories, classes; each an error that says what to do, and nothing left half done."""

import json

import numpy as np
import pytest
import torch

from sdesens.cli import main
from sdesens.errors import ArgumentError, ArgumentTypeError, CheckpointError, DtypeError, NonFiniteError, ShapeError
from sdesens.training import (
    Ranks,
    TrainConfig,
    Trainer,
    draw_samples,
    load_data,
    make_denoiser,
    open_run,
    recipe,
    train,
)

CPU = Ranks(0, 1, torch.device("cpu"))


def rows(n=40, shape=(3,), seed=0):
    return np.random.default_rng(seed).normal(size=(n, *shape))


def small(data, **changes):
    return recipe(str(data), **{"steps": 4, "batch": 8, "width": 8, "depth": 1, "picture_every": 0, **changes})


@pytest.fixture
def table(tmp_path):
    np.save(tmp_path / "rows.npy", rows())
    return tmp_path / "rows.npy"


def spoilt(x, where, value):
    x = x.copy()
    x[where] = value
    return x


ARRAYS = {
    "text": (np.array(["a", "b"]), DtypeError, "real numbers, got <U1"),
    "complex": (rows() + 0j, DtypeError, "complex128"),
    "numbers": (rows()[:, 0], ShapeError, r"\(rows, \*event\), got \(40,\)"),
    "no columns": (rows()[:, :0], ShapeError, r"got \(40, 0\)"),
    "empty": (rows(0), ShapeError, r"got \(0, 3\)"),
    "few": (rows(29), ShapeError, "at least 30 rows are needed, got 29"),
    "nan": (spoilt(rows(), (7, 1), np.nan), ArgumentError, "1 of 40 rows hold NaN or infinite values, the first is row 7"),
    "infinite": (spoilt(rows(), (slice(3, 5), 1), np.inf), ArgumentError, "2 of 40 rows"),
    "constant": (np.full((40, 3), 2.5), ArgumentError, "all rows are the same"),
    "huge": (abs(rows()) * 5e307, ArgumentError, "scale them down"),
    "channels last": (rows(30, (8, 8, 3)), ShapeError, r"x.transpose\(0, 3, 1, 2\)"),
    "long integers": (np.arange(40)[:, None] + 2**60, ArgumentError, "beyond 2\\^53"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_cannot_be_used(tmp_path, name):
    array, error, words = ARRAYS[name]
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(error, match=words):
        load_data(str(tmp_path / "x.npy"))


def test_files_that_cannot_be_read(tmp_path, table):
    whole = table.read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npy").write_text("1, 2, 3")
    (tmp_path / "text.npz").write_text("1, 2, 3")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}] * 30, dtype=object), allow_pickle=True)
    np.savez(tmp_path / "names.npz", y=rows())
    for name in ("cut.npy", "text.npy", "text.npz", "objects.npy"):
        with pytest.raises(ArgumentError, match="could not be read as an array of numbers"):
            load_data(str(tmp_path / name))
    with pytest.raises(ArgumentError, match=r"must hold arrays `x`.*it holds y"):
        load_data(str(tmp_path / "names.npz"))
    with pytest.raises(ArgumentError, match="there is no file"):
        load_data(str(tmp_path / "none.npy"))
    with pytest.raises(ArgumentError, match="must be gmm8, moons, digits"):
        load_data("mnist")
    with pytest.raises(ArgumentError, match="there is no file"):
        load_data(str(tmp_path / "folder.npy"))  # not there; nor is a folder a file
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(ArgumentError, match="there is no file"):
        load_data(str(tmp_path / "folder.npy"))


def test_a_class_that_is_only_in_the_test_rows(tmp_path):
    x = np.arange(40.0)[:, None]
    np.save(tmp_path / "x.npy", x)
    data = load_data(str(tmp_path / "x.npy"))
    held_out = int(data.form.restore(data.test)[0].round())
    np.savez(tmp_path / "x.npz", x=x, labels=(np.arange(40) == held_out).astype(int))
    with pytest.raises(ArgumentError, match="no row of class 1 is left to train on"):
        load_data(str(tmp_path / "x.npz"))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros(39, int), r"shape \(40,\)"),
        (np.zeros((40, 1), int), r"shape \(40,\)"),
        (np.zeros(40), "float64"),
        (np.arange(40) % 3 + 1, "3 labels from 1 to 3"),
        (np.arange(40) % 3 - 1, "3 labels from -1 to 1"),
        (np.arange(40) % 2 * 5, "2 labels from 0 to 5"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, labels, words):
    np.savez(tmp_path / "x.npz", x=rows(), labels=labels)
    with pytest.raises(ArgumentError, match=words):
        load_data(str(tmp_path / "x.npz"))


OPTIONS = {
    "steps": (0, "at least 1"), "batch": (-4, "at least 1"), "lr": (0.0, "above 0"), "clip": (0.0, "above 0"), "ema": (1.5, "at most 1"),
    "schedule": ("linear", "one of edm, vp"), "prediction": ("epsilon", "one of edm, eps"), "weight": ("snr", "one of auto"),
    "times": ("cosine", "one of auto"), "network": ("unet", "one of mlp, conv"), "drop_label": (-0.1, "at least 0"),
    "weight_decay": (float("inf"), "at least 0"), "seed": (2**64, "64-bit"), "keep_last": (0, "at least 1"), "accumulate": (3, "multiple"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_out_of_range(name):
    value, words = OPTIONS[name]
    with pytest.raises(ArgumentError, match=words):
        small("gmm8", **{name: value})


@pytest.mark.parametrize(("name", "value"), [("steps", 1.5), ("lr", "fast"), ("bf16", 1), ("steps", True), ("data", 8)])
def test_options_of_another_type(name, value):
    with pytest.raises(ArgumentTypeError, match=f"`{name}` must be"):
        recipe(**{"data": "gmm8", name: value})


def test_unknown_options_and_what_does_not_go_together():
    with pytest.raises(ArgumentTypeError, match="no option learning_rate"):
        recipe("gmm8", learning_rate=1e-3)
    with pytest.raises(ArgumentError, match="nan"):
        recipe("gmm8", lr=float("nan"))
    assert recipe("gmm8", lr=1).lr == 1.0  # a whole number is one
    data = load_data("gmm8")
    with pytest.raises(ShapeError, match="network mlp"):
        Trainer(small("gmm8", network="conv"), data, CPU)
    with pytest.raises(ArgumentError, match="no signal left"):
        Trainer(small("gmm8", schedule="condot", prediction="eps"), data, CPU)
    with pytest.raises(ArgumentError, match="`batch` = 8 must be a multiple of ranks"):
        Trainer(small("gmm8"), data, Ranks(0, 3, torch.device("cpu")))
    with pytest.raises(ArgumentError, match="multiple of 8"):
        make_denoiser(small("digits", network="conv", width=12), load_data("digits").form)


def test_a_configuration_of_another_version():
    plain = small("gmm8").to_json()
    assert TrainConfig.from_json(json.loads(json.dumps(plain))) == small("gmm8")
    infinite = small("gmm8", clip=float("inf"))
    assert TrainConfig.from_json(json.loads(json.dumps(infinite.to_json()))) == infinite
    with pytest.raises(ArgumentError, match=r"unknown options .'dropout'.* made by another version"):
        TrainConfig.from_json({**plain, "dropout": 0.1})
    with pytest.raises(ArgumentError, match=r"lacks .'lr'"):
        TrainConfig.from_json({k: v for k, v in plain.items() if k != "lr"})


def quiet(config, path, **options):
    return train(config, path, tensorboard=False, progress=False, **options)


def test_directories_of_something_else(tmp_path, table):
    run = tmp_path / "run"
    quiet(small(table), run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=r"holds another run.*lr = 0.5 here, 0.001 there"):
        quiet(small(table, lr=0.5), run)
    np.save(table, rows(seed=1))
    with pytest.raises(CheckpointError, match="fingerprint"):
        quiet(small(table), run)
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("words")
    with pytest.raises(CheckpointError, match="not empty and is not a run"):
        quiet(small(table), full)
    with pytest.raises(CheckpointError, match="is a file"):
        quiet(small(table), full / "thesis.txt")
    assert [p.name for p in full.iterdir()] == ["thesis.txt"]
    with pytest.raises(CheckpointError, match="is not a run"):
        open_run(full)
    (run / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="does not describe a run"):
        open_run(run)


def test_one_process_at_a_time(tmp_path, table):
    config, seen = small(table, steps=6, picture_every=3), []

    def meanwhile(denoiser, data, file):
        with pytest.raises(CheckpointError, match="another process works in"):
            quiet(config, tmp_path / "run")
        seen.append(open_run(tmp_path / "run").config.steps)  # but it may be read

    quiet(config, tmp_path / "run", picture=meanwhile)
    assert seen == [6]
    quiet(config, tmp_path / "run")  # the hold has ended with the run


def test_checkpoints_of_another_run_are_not_taken(tmp_path, table):
    quiet(small(table), tmp_path / "a")
    quiet(small(table, lr=0.5), tmp_path / "b")
    (tmp_path / "a" / "checkpoints").rename(tmp_path / "kept")
    (tmp_path / "b" / "checkpoints").rename(tmp_path / "a" / "checkpoints")
    for use in (lambda: quiet(small(table), tmp_path / "a"), lambda: open_run(tmp_path / "a").denoiser()):
        with pytest.raises(CheckpointError, match=r"of another run.*lr"):
            use()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        open_run(tmp_path / "b").denoiser()


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(tmp_path, table):
    config = small(table, steps=40, lr=1e30, clip=float("inf"), log_every=7, warmup=0)
    with pytest.raises(NonFiniteError, match=r"the loss is .* at step .*lower `lr`"):
        quiet(config, tmp_path / "wild")
    assert not (tmp_path / "wild" / "checkpoints").exists()

    def poison(denoiser, data, file):
        next(iter(denoiser.weights.values())).data.fill_(float("nan"))

    config = small(table, steps=8, checkpoint_every=2, picture_every=3)
    with pytest.raises(NonFiniteError, match="held-out loss is nan at step 4"):
        quiet(config, tmp_path / "poisoned", picture=poison)
    assert [p.name for p in (tmp_path / "poisoned" / "checkpoints").iterdir()] == ["step-00000002"]
    assert quiet(config, tmp_path / "poisoned").denoiser() is not None  # and it goes on from there


def test_samples_that_cannot_be_drawn():
    form = load_data("gmm8").form
    denoiser = make_denoiser(small("gmm8"), form)
    for options, words in (
        ({"sampler": "euler"}, "one of heun"),
        ({"label": 1}, "its data had no labels"),
        ({"guidance": 2.0}, "its data had no labels"),
        ({"guidance": float("nan")}, "guidance"),
        ({"eta": 0.5}, "for em and ddim"),
        ({"sampler": "em", "eta": -1.0}, "eta"),
        ({"steps": 1}, "n_steps"),
        ({"steps": 0}, "n_steps"),
    ):
        with pytest.raises(ArgumentError, match=words):
            draw_samples(denoiser, form, 3, **options)
    with pytest.raises(ArgumentError, match="`n`"):
        draw_samples(denoiser, form, 0)
    digits = load_data("digits").form
    for label in (10, -1, True, 1.0):
        with pytest.raises(ArgumentError, match=r"0 \.\.\. 9"):
            draw_samples(make_denoiser(small("digits"), digits), digits, 3, label=label)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "mnist"), "must be gmm8"),
        (("train", "gmm8", "--lr", "-1"), "`lr` must be above 0"),
        (("train", "gmm8", "--device", "cuda:99"), "cannot be used here"),
        (("train", "gmm8", "--device", "gpu"), "cannot be used here"),
        (("sample", "nowhere"), "is not a run"),
        (("report", "nowhere"), "is not a run"),
        (("steer", "nowhere", "--reward", "linear:1,0"), "is not a run"),
    ],
)
def test_the_command_line_says_so_and_leaves_with_2(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sdesens", *words])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
