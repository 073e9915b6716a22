"""Interrupted and resumed training against uninterrupted training, to the bit: weights, averages, optimiser, log, samples.

No tolerance anywhere: both are to be the same operations on the same numbers.
"""

import os
import random
import shutil
from dataclasses import replace

import pytest
import torch
from training_cases import (
    PARTS,
    argv,
    equal_parts,
    killed,
    losses,
    nursery,
    results,
    small,
    trained,
    write_table,
)

from sdesens.errors import CheckpointError, CheckpointWarning
from sdesens.training.checkpoint import load_checkpoint
from sdesens.training.data import load_data
from sdesens.training.snapshot import FILES
from sdesens.training.train import train

WHOLE = dict.fromkeys((*PARTS, "log", "samples"), True)
ALL, NONE = dict.fromkeys(PARTS, True), dict.fromkeys(PARTS, False)
LAST = 11  # of the runs in memory


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes that the runs are compared with: sums in several threads are other sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# In memory: a new trainer from each step


CASES = {
    "a law": ("gmm8", {}),
    "labels, amid epochs": (100, {}),  # 90 rows to train on, 33 items a step
    "epochs shorter than a batch": (30, {"batch": 64}),
    "one item": (30, {"batch": 1, "drop_label": 0.5}),
    "pieces": (100, {"batch": 36, "accumulate": 3}),
    "bf16": (100, {"bf16": True, "norm": True}),
    "images": ((30, 1, 4, 4), {"network": "conv", "batch": 8, "prediction": "v", "schedule": "cosine"}),
    "digits": ("digits", {"batch": 16, "prediction": "eps", "schedule": "vp", "weight": "min_snr"}),
}


def case(name, folder, **changes):
    about, options = CASES[name]
    if about == "digits":
        pytest.importorskip("sklearn")
    if not isinstance(about, str):
        rows, *event = (about, 2) if isinstance(about, int) else about
        about = write_table(folder / "table.npz", rows, tuple(event))
    config = small(about, **{"steps": LAST + 2, **options, **changes})
    return config, load_data(config.data)


@pytest.mark.parametrize("name", CASES)
def test_a_new_trainer_goes_on_from_any_step(name, tmp_path):
    config, data = case(name, tmp_path)
    straight = trained(config, data, LAST)
    assert [s.step for s in straight] == list(range(LAST + 1))
    for k in range(LAST + 1):
        again = trained(config, data, LAST, start=straight[k])
        same = [equal_parts(a, b) for a, b in zip(again, straight[k:], strict=True)]
        assert same == [ALL] * len(again)
    moved = equal_parts(straight[0], straight[-1])
    assert moved == NONE  # it did train


def spoil(s, what):
    """A snapshot with something wrong in it."""
    state = {**s.state, "optimiser": {**s.state["optimiser"]}}
    if what == "EMA count":
        state["averaged"] += 1
    elif what == "pending losses":
        state["losses"] = state["losses"][1:]
    else:
        key = {"first moment": "exp_avg", "second moment": "exp_avg_sq", "optimiser's count": "step"}[what]
        old = state["optimiser"]["state"]
        new = {i: {**v, key: v[key] + 1 if key == "step" else v[key].flip(0)} for i, v in old.items()}
        state["optimiser"]["state"] = new
    return replace(s, state=state)


WRONG = {
    "EMA count": ("EMA", "rest"),
    "pending losses": ("rest",),
    "first moment": PARTS,
    "second moment": PARTS,
    "optimiser's count": PARTS,
}


@pytest.mark.parametrize("what", WRONG)
def test_negative_control_something_wrong_in_the_state(what, tmp_path):
    config, data = case("labels, amid epochs", tmp_path)
    straight = trained(config, data, LAST)
    again = trained(config, data, LAST, start=spoil(straight[4], what))
    assert equal_parts(again[-1], straight[-1]) == {k: k not in WRONG[what] for k in PARTS}


def test_negative_control_another_run(tmp_path):
    config, data = case("labels, amid epochs", tmp_path)
    straight = trained(config, data, LAST)
    fresh = trained(config, data, 0)[0]
    for other in (
        trained(replace(config, seed=1), data, LAST)[-1],
        trained(config, data, LAST + 1)[-1],
        trained(config, data, LAST - 1)[-1],
        trained(config, data, LAST, start=replace(fresh, model=straight[1].model))[-1],
        trained(replace(config, lr=config.lr * (1 + 2**-20)), data, LAST)[-1],
    ):
        found = equal_parts(straight[-1], other)
        assert found == NONE


# On the disk: the same call again


class Interrupt(Exception):
    pass


def until(step, *, config, path):
    """Train until an interrupt after a step; it comes from the picture that is drawn then."""

    def picture(denoiser, data, file):
        if file.name == f"step-{step:08d}.png":
            raise Interrupt

    with pytest.raises(Interrupt):
        train(replace(config, picture_every=1), path, device="cpu", tensorboard=False, progress=False, picture=picture)


def finish(config, path):
    train(config, path, device="cpu", tensorboard=False, progress=False)
    return results(path)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Finite data, and losses that wait in the checkpoints for a line of the log: 5 is no multiple of 3."""
    folder = tmp_path_factory.mktemp("table")
    config = small(write_table(folder / "table.npz", 100), batch=256, log_every=3, checkpoint_every=5)
    return config, folder / "run", finish(config, folder / "run")


def names(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def test_interrupts_of_the_loop(table, tmp_path):
    config, path, straight = table
    assert len(load_checkpoint(path / "checkpoints" / "step-00000024").state["losses"]) == 0
    # before the first checkpoint, at one, just after one, twice amid the same five steps, on a line of the log
    for step in (3, 5, 6, 12, 13, 15, 23):
        until(step, config=config, path=tmp_path / "run")
        if step == 5:
            waiting = load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000005").state["losses"]
            assert len(waiting) == 2  # of steps 4 and 5; the line of step 6 has their mean
    found = finish(config, tmp_path / "run")
    assert found.equal(straight) == WHOLE
    assert names(tmp_path / "run") == names(path)
    rows = found.log.decode().count("\n")
    assert rows == 8 + 5  # lines of losses, and of the held-out loss


def test_the_same_call_after_the_end_changes_nothing(table):
    config, path, straight = table
    before = {name: (path / name).stat().st_mtime_ns for name in names(path)}
    assert finish(config, path).equal(straight) == WHOLE
    assert {name: (path / name).stat().st_mtime_ns for name in names(path)} == before


def test_free_options_may_change(table, tmp_path):
    config, path, straight = table
    until(12, config=config, path=tmp_path / "run")
    until(19, config=replace(config, checkpoint_every=4, keep_last=2), path=tmp_path / "run")
    found = finish(replace(config, checkpoint_every=7, keep_last=3), tmp_path / "run")
    assert equal_parts(found.last, straight.last) == ALL
    assert found.samples == straight.samples
    assert torch.equal(losses(tmp_path / "run"), losses(path))
    assert found.log != straight.log  # negative control: held-out losses are of other steps


def test_other_options_may_not(table, tmp_path):
    config, _, _ = table
    until(12, config=config, path=tmp_path / "run")
    for changes in ({"seed": 1}, {"steps": 25}, {"log_every": 4}, {"batch": 128}, {"accumulate": 2}):
        with pytest.raises(CheckpointError, match=rf"{next(iter(changes))} = .* here, .* there"):
            finish(replace(config, **changes), tmp_path / "run")


def test_what_is_renamed_is_on_the_disk(table, tmp_path, monkeypatch):
    """A power cut can't be had here, so the order of fsync and rename is looked at instead."""
    config, safe, renamed, fsync, replace_file = table[0], set(), [], os.fsync, os.replace

    def spy_fsync(handle):
        fsync(handle)
        safe.add(os.fstat(handle).st_ino)

    def spy_replace(source, target):
        assert os.stat(source).st_ino in safe
        renamed.append(os.path.basename(target))
        replace_file(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    finish(config, tmp_path)
    assert {"run.json", "log.jsonl", "step-00000024"} <= set(renamed)


# Damage


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run with checkpoints of steps 5, 10 and 15 that was interrupted at step 17, and its uninterrupted twin."""
    folder = tmp_path_factory.mktemp("damage")
    config = small(write_table(folder / "table.npz", 100), batch=256, steps=20, keep_last=3)
    until(17, config=config, path=folder / "run")
    return config, folder / "run", finish(config, folder / "straight")


def truncate(file, source):
    os.truncate(file, source.randrange(file.stat().st_size))


def change(file, source):
    data = bytearray(file.read_bytes())
    data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, change])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(interrupted, tmp_path, name, damage):
    config, path, straight = interrupted
    run, source = tmp_path / "run", random.Random(f"{name} {damage.__name__}")
    shutil.copytree(path, run)
    damage(run / "checkpoints" / "step-00000015" / name, source)
    with pytest.warns(CheckpointWarning, match=rf"step-00000015/{name}.*Until then step-00000010 is used"):
        found = finish(config, run)
    assert found.equal(straight) == WHOLE
    assert names(run) == names(path.with_name("straight"))


# Processes that are killed


@pytest.fixture(scope="module")
def children():
    with nursery() as found:
        yield found


def content(path):
    return {name: (path / name).read_bytes() for name in names(path) if (path / name).is_file()}


def test_without_a_valid_checkpoint_nothing_is_overwritten(interrupted, children, tmp_path):
    config, path, _ = interrupted
    run, source = tmp_path / "run", random.Random(0)
    shutil.copytree(path, run)
    for i, checkpoint in enumerate(sorted((run / "checkpoints").iterdir())):
        (truncate if i % 2 else change)(checkpoint / FILES[i % 3], source)
    before = content(run)
    end = children.run(argv(config, run))
    assert end.status == 2
    assert "no checkpoint in" in end.words
    for step in (5, 10, 15):
        assert f"step-{step:08d}" in end.words
    assert content(run) == before


def test_kills_of_a_process(children, tmp_path):
    config = small("gmm8", steps=200, batch=256, width=16, checkpoint_every=20, log_every=7, keep_last=2)
    chance = random.Random(0)
    # amid the description of the run and the log, then amid the first checkpoints of an attempt, then at random
    kills = [{"call": call} for call in (1, 2, 3, 4, 7, 11, 25)] + [{"delay": chance.random()} for _ in range(4)]
    found = killed(children, tmp_path, config, kills)
    assert found == [WHOLE] * len(found)
    here = finish(config, tmp_path / "here")
    assert results(tmp_path / "whole").equal(here) == WHOLE  # a process on its own does the sums of this one
