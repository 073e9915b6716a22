"""Checkpoints: round trips to the bit, kills at every file operation, full disks, flipped bits, hostile pickles.

Run as a script this file is a nursery: it imports torch once, then forks a child for each test that wants one to kill
or to restrict.
"""

import errno
import hashlib
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from sdesens.errors import ArgumentError, ArgumentTypeError, CheckpointError, CheckpointWarning, SdesensError
from sdesens.training.checkpoint import (
    Snapshot,
    checkpoints,
    load_best,
    load_checkpoint,
    load_latest,
    load_weights,
    save_checkpoint,
)

FILES = ("model.safetensors", "ema.safetensors", "train_state.pt", "manifest.json")
OWN_ID = os.getpid  # some tests replace it
MUTATING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}  # and opening a file to write


def make(step, salt=0, score=None, size=5):
    """A snapshot all of whose content is a function of the arguments."""
    source = torch.Generator().manual_seed(1000 * step + salt)
    model = {"w": torch.randn(size, generator=source), "b": torch.randn(2, generator=source).to(torch.bfloat16)}
    state = {
        "salt": salt,
        "size": size,
        "optimiser": {0: {"m": torch.randn(size, generator=source), "betas": (0.9, 0.99)}},
    }
    return Snapshot(step, model, {k: -v for k, v in model.items()}, state, {"run": "a", "hidden": [8, 8]}, score)


def bits(x):
    """Everything that distinguishes two nested values, as bytes; NaNs by their payload, -0.0 from 0.0, 1 from True."""
    if isinstance(x, torch.Tensor):
        raw = x.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8) if x.numel() else x
        return x.dtype, tuple(x.shape), raw.numpy().tobytes()
    if isinstance(x, dict):
        return {k: bits(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x), [bits(v) for v in x]
    return type(x), struct.pack("d", x) if isinstance(x, float) else x


def contents(s):
    return s.step, bits(s.model), bits(s.ema), bits(s.state), s.meta, s.score


def save(folder, *steps, keep_last=99, **options):
    return [save_checkpoint(folder, make(step, **options), keep_last=keep_last) for step in steps][-1]


def names(folder):
    return sorted(os.listdir(folder))


def reseal(path, **entries):
    """Write the manifest anew over whatever the files now hold, as the format is documented."""
    body = json.loads((path / "manifest.json").read_text()) | entries
    del body["sha256"]
    for name in FILES[:3]:
        data = (path / name).read_bytes()
        body["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(body, indent=1) + "\n")


# What comes back


def test_every_bit_comes_back(tmp_path):
    source = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**63), 2**63 - 1, (4096,), generator=source)
    weights = {
        "every bfloat16": torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16),
        "float32": patterns.view(torch.float32),  # among them subnormals, infinities, NaNs with payloads
        "float64": patterns.view(torch.float64),
        "int64": patterns,
        "bool": patterns > 0,
        "zeros": torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324], dtype=torch.float64),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "transposed": patterns.view(64, 64).T,
        "expanded": torch.ones(1).expand(7),
        "channels last": torch.randn(2, 3, 4, 5, generator=source).to(memory_format=torch.channels_last),
        "negated view": torch.tensor([1 + 2j]).conj().imag,
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }
    assert weights["float32"].isnan().any()
    state = {"nested": [(1, (True, None)), {"x": [math.nan, -0.0, 2**100, "é"]}], 3: patterns.float(), "": {}, "t": ()}
    given = Snapshot(7, weights, {}, state, {"lr": 0.1, "é": [None, {"x": 1e-300}]}, 0.1 + 0.2)
    loaded = load_checkpoint(save_checkpoint(tmp_path, given))
    assert contents(loaded) == contents(given)
    loaded.model["scalar"] += 1  # writable, with no warning


def test_an_optimiser_goes_on_as_if_never_saved(tmp_path):
    def fresh():
        net = torch.nn.Linear(3, 2, dtype=torch.float64)
        torch.nn.init.constant_(net.weight, 0.5)
        torch.nn.init.constant_(net.bias, 0.1)
        return net, torch.optim.AdamW(net.parameters(), lr=0.01)

    def step(net, optimiser, i):
        optimiser.zero_grad()
        net(torch.tensor([[i, 1.0, -i]], dtype=torch.float64)).square().sum().backward()
        optimiser.step()

    net, optimiser = fresh()
    for i in range(3):
        step(net, optimiser, i)
    path = save_checkpoint(tmp_path, Snapshot(3, net.state_dict(), net.state_dict(), optimiser.state_dict(), {}))
    step(net, optimiser, 3)
    again, second = fresh()
    loaded = load_checkpoint(path)
    again.load_state_dict(loaded.model)
    second.load_state_dict(loaded.state)
    step(again, second, 3)
    assert bits(again.state_dict()) == bits(net.state_dict())


def test_other_programs_read_the_files(tmp_path):
    given = make(3, score=0.5)
    path = save_checkpoint(tmp_path, given)
    assert path == tmp_path / "step-00000003"
    assert names(path) == sorted(FILES)
    for which in ("model", "ema"):
        assert bits(safetensors.torch.load_file(path / f"{which}.safetensors")) == bits(getattr(given, which))
        with safetensors.safe_open(path / f"{which}.safetensors", "pt") as file:
            assert json.loads(file.metadata()["sdesens"]) == given.meta
    assert bits(torch.load(path / "train_state.pt", weights_only=True)) == bits({"step": 3, "state": given.state})
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["score"]) == (1, 3, 0.5)
    for name in FILES[:3]:
        data = (path / name).read_bytes()
        assert manifest["files"][name] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_shared_memory_and_views_are_stored_by_value(tmp_path):
    big = torch.arange(100_000.0)
    given = Snapshot(1, {"a": big[:4], "b": big[2:6], "tied": big[:4]}, {"a": big[:4]}, {"x": big[:4]}, {})
    path = save_checkpoint(tmp_path, given)
    assert contents(load_checkpoint(path)) == contents(given)
    assert sum(f.stat().st_size for f in path.iterdir()) < 10_000  # the 400,000 bytes viewed are not stored


def test_the_files_are_a_function_of_the_values(tmp_path):
    given = make(4, score=1.0)
    given.state["betas"] = "".join(["bet", "as"])  # equal to the key, yet another object
    first = save_checkpoint(tmp_path / "a", given)
    second = save_checkpoint(tmp_path / "b", load_checkpoint(first))
    given.state["betas"] = "betas"
    third = save_checkpoint(tmp_path / "c", given)
    assert len({(path / "manifest.json").read_bytes() for path in (first, second, third)}) == 1


def test_weights_alone(tmp_path):
    path = save(tmp_path, 1)
    (path / "train_state.pt").unlink()
    (path / "model.safetensors").write_bytes(b"")
    weights, meta = load_weights(path)
    assert bits(weights) == bits(make(1).ema)
    assert meta == make(1).meta
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated: 0 bytes of"):
        load_weights(path, "model")
    with pytest.raises(ArgumentError, match="`which`"):
        load_weights(path, "both")


# What is kept


def test_the_last_and_the_best_are_kept(tmp_path):
    for step, score in enumerate([5.0, 1.0, 3.0, 1.0, 2.0, 4.0]):
        save(tmp_path, step, score=score, keep_last=2)
    assert names(tmp_path) == ["step-00000001", "step-00000004", "step-00000005"]
    assert [load_latest(tmp_path).step, load_best(tmp_path).step] == [5, 1]
    assert checkpoints(tmp_path) == [tmp_path / name for name in names(tmp_path)]
    save(tmp_path, 3, score=0.5, keep_last=1)  # a run that went back to step 2: what lies ahead is not its to remove
    assert names(tmp_path) == ["step-00000003", "step-00000004", "step-00000005"]


def test_without_scores_the_last_is_the_best(tmp_path):
    save(tmp_path, 8, 9, 100_000_000, keep_last=2)
    assert names(tmp_path) == ["step-00000009", "step-100000000"]
    assert load_best(tmp_path).step == load_latest(tmp_path).step == 100_000_000


def test_only_own_names_are_removed(tmp_path):
    foreign = [
        "best",
        "step-1",
        "step-0000001",
        "step-000000001",
        "step-00000001.bak",
        "xstep-00000001",
        "step-0000000\u0661",
    ]
    foreign += [".step-00000001.tmp-", ".step-00000001.tmp-7x", ".step-1.tmp-7", "step-00000001.new.new"]
    own = ["step-00000001", ".step-00000001.tmp-7"]
    for name in foreign + own:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "step-00000000").write_text("a file")
    save(tmp_path, 2, keep_last=1)
    assert names(tmp_path) == sorted([*foreign, "step-00000000", "step-00000002"])


def test_a_moved_checkpoint_works_through_its_link(tmp_path):
    save(tmp_path / "run", 1)
    (tmp_path / "disk").mkdir()
    moved = shutil.move(tmp_path / "run" / "step-00000001", tmp_path / "disk")
    (tmp_path / "run" / "step-00000001").symlink_to(moved)
    (tmp_path / "latest").symlink_to(moved)
    assert (
        contents(load_latest(tmp_path / "run")) == contents(load_checkpoint(tmp_path / "latest")) == contents(make(1))
    )
    save(tmp_path / "run", 2, keep_last=1)
    assert names(tmp_path / "run") == ["step-00000002"]
    assert contents(load_checkpoint(moved)) == contents(make(1))


def test_a_step_saved_again(tmp_path):
    path = save(tmp_path, 1)
    inode = path.stat().st_ino
    assert save(tmp_path, 1) == path
    assert path.stat().st_ino == inode  # the same: kept
    save(tmp_path, 1, salt=1)
    assert contents(load_checkpoint(path)) == contents(make(1, salt=1))
    (path / "ema.safetensors").write_bytes(b"x")
    save(tmp_path, 1, salt=1)  # no longer valid: written anew, though the manifest is the same
    assert contents(load_checkpoint(path)) == contents(make(1, salt=1))
    assert names(tmp_path) == ["step-00000001"]


# What is refused


def test_every_altered_byte_is_refused(tmp_path):
    path = save(tmp_path, 1, score=0.25)
    for name in FILES:
        whole = (path / name).read_bytes()
        for i in range(len(whole)):
            (path / name).write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
            with pytest.raises(CheckpointError, match=f"{path / name} "):
                load_checkpoint(path)
        for size in (0, 1, len(whole) // 2, len(whole) - 1):
            (path / name).write_bytes(whole[:size])
            with pytest.raises(CheckpointError, match=f"{path / name} "):
                load_checkpoint(path)
        (path / name).write_bytes(whole + b"\0")
        with pytest.raises(CheckpointError, match=f"{path / name} "):
            load_checkpoint(path)
        (path / name).write_bytes(whole)
    assert contents(load_checkpoint(path)) == contents(make(1, score=0.25))  # it was the alterations


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["altered", "truncated", "is missing"])
def test_the_one_before_is_used_with_a_warning(tmp_path, name, how):
    path = save(tmp_path, 1, 2)
    whole = bytearray((path / name).read_bytes())
    whole[len(whole) // 2] ^= 1
    (path / name).write_bytes(whole[:-1] if how == "truncated" else whole)
    if how == "is missing":
        (path / name).unlink()
    with pytest.warns(CheckpointWarning, match=f"step-00000002/{name} .*{how}.* step-00000001 is used instead") as seen:
        assert contents(load_latest(tmp_path)) == contents(make(1))
    assert [w.filename for w in seen] == [__file__]
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match=f"no checkpoint in .* is valid: .*{name} .*{how}"):
        load_latest(tmp_path)


def test_the_next_best_is_used_with_a_warning(tmp_path):
    for step, score in [(1, 2.0), (2, 1.0), (3, 3.0), (4, None)]:
        save(tmp_path, step, score=score)
    (tmp_path / "step-00000002" / "ema.safetensors").unlink()
    with pytest.warns(CheckpointWarning, match="step-00000002/ema.safetensors is missing.* step-00000001 is used"):
        assert load_best(tmp_path).step == 1
    (tmp_path / "step-00000002" / "manifest.json").unlink()  # its score is unknown: it may have been the best
    with pytest.warns(CheckpointWarning, match="step-00000002/manifest.json is missing.* step-00000001 is used"):
        assert load_best(tmp_path).step == 1


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("dump", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, 2))])
def test_no_pickled_code_runs(tmp_path, dump):
    path = save(tmp_path / "run", 1, 2)
    marker = tmp_path / "marker"
    dump({"step": 2, "state": Hostile(marker)}, path / "train_state.pt")
    reseal(path)
    with pytest.warns(CheckpointWarning, match=r"train_state.pt cannot be decoded \(UnpicklingError"):
        assert load_latest(tmp_path / "run").step == 1
    assert not marker.exists()
    with open(path / "train_state.pt", "rb") as file:  # negative control: the code is live
        torch.load(file, weights_only=False) if dump is torch.save else pickle.load(file)
    assert marker.exists()


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    path, other = save(tmp_path, 1), save(tmp_path / "other", 2)
    reseal(path)
    assert contents(load_checkpoint(path)) == contents(make(1))  # a new seal alone changes nothing
    shutil.copy(other / "train_state.pt", path)
    reseal(path)
    with pytest.raises(CheckpointError, match=r"train_state.pt is not the state of step 1"):
        load_checkpoint(path)
    save(tmp_path, 1)
    run_b = save_checkpoint(tmp_path / "b", replace(make(1), meta={"run": "b"}))
    shutil.copy(run_b / "ema.safetensors", path)
    reseal(path)
    with pytest.raises(CheckpointError, match=r"ema.safetensors is of another run than model.safetensors"):
        load_checkpoint(path)
    reseal(path, format=2)
    with pytest.raises(CheckpointError, match=r"has format 2, newer than 1.*pip install -U"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"manifest.json is of step 2, yet lies in step-00000003"):
        load_checkpoint(other.rename(other.with_name("step-00000003")))


def test_none_at_all(tmp_path):
    assert load_latest(tmp_path) is load_latest(tmp_path / "none") is None
    with pytest.raises(CheckpointError, match=r"there are no checkpoints in .*: check the path"):
        load_best(tmp_path)
    with pytest.raises(CheckpointError, match=r"manifest.json is missing"):
        load_checkpoint(tmp_path)


def test_a_folder_that_is_a_file(tmp_path):
    file = tmp_path / "run"
    file.write_text("mine")
    for call in (checkpoints, load_latest, load_best, lambda folder: save(folder, 1)):
        with pytest.raises(CheckpointError, match=f"no folder of checkpoints: {file} .*Not a directory"):
            call(file)
    with pytest.raises(CheckpointError, match="Not a directory"):
        save(file / "below", 1)
    assert file.read_text() == "mine"


SPARSE = torch.eye(2).to_sparse()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"step": -1}, ArgumentError, "`step`"),
        ({"step": True}, ArgumentError, "`step`"),
        ({"score": math.nan}, ArgumentError, "`score` .* nan"),
        ({"score": np.float64(1)}, ArgumentError, "`score`"),
        ({"meta": {"hidden": (8, 8)}}, ArgumentTypeError, "`meta` does not survive JSON"),
        ({"meta": {1: 2}}, ArgumentTypeError, "`meta` does not survive JSON"),
        ({"meta": {"x": math.nan}}, ArgumentTypeError, "`meta` must be JSON"),
        ({"meta": {"x": torch}}, ArgumentTypeError, "`meta` must be JSON"),
        ({"meta": [1]}, ArgumentTypeError, "`meta`"),
        ({"state": {"a": [np.float64(1)]}}, ArgumentTypeError, r"`state\['a'\]\[0\]` is a float64"),
        ({"state": {"f": len}}, ArgumentTypeError, r"`state\['f'\]` is a builtin"),
        ({"state": {"s": SPARSE}}, ArgumentTypeError, r"`state\['s'\]` must be dense"),
        ({"model": {"s": SPARSE}}, ArgumentTypeError, r"`model\['s'\]` must be dense"),
        ({"ema": {"m": torch.empty(1, device="meta")}}, ArgumentTypeError, r"`ema\['m'\]` must be dense"),
        ({"ema": {"w": 1.0}}, ArgumentTypeError, r"`ema` must map names to tensors, not so \['w'\]"),
        ({"model": {"__metadata__": torch.ones(1)}}, ArgumentTypeError, "`model` must map names"),
        ({"model": {"z": torch.ones(1, dtype=torch.complex128)}}, ArgumentTypeError, "complex128"),
    ],
)
def test_what_would_not_come_back_is_not_saved(tmp_path, change, error, match):
    with pytest.raises(error, match=match):
        save_checkpoint(tmp_path / "run", replace(make(1), **change))
    assert names(tmp_path) == []


def test_keep_last_and_a_missing_library(tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match="`keep_last`"):
        save(tmp_path, 1, keep_last=0)
    save(tmp_path, 1)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: save(tmp_path, 2), lambda: load_latest(tmp_path)):  # not taken for a bad checkpoint
        with pytest.raises(SdesensError, match=r"pip install 'sdesens\[train\]'"):
            call()


# Kills, full disks: in children


@pytest.fixture(scope="module")
def child():
    """Call a function of this file by its name in a process of its own."""
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as nursery:

        def call(name, *args):
            nursery.stdin.write(json.dumps([name, *map(str, args)]) + "\n")
            nursery.stdin.flush()
            result, error = json.loads(nursery.stdout.readline())
            assert error is None, error
            return result

        yield call
        nursery.stdin.close()


def forked(work):
    """Run `work` in a fork; its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def survivors(folder):
    """(step, salt) of each checkpoint, all of them whole and what was saved; the last one is what load_latest finds."""
    found = [load_checkpoint(path) for path in checkpoints(folder)]
    for s in found:
        assert contents(s) == contents(make(s.step, s.state["salt"], s.score, s.state["size"]))
    latest = load_latest(folder)
    assert latest is not None
    assert contents(latest) == contents(found[-1])
    return [(s.step, s.state["salt"]) for s in found]


def killed_at_random(folder, kills):
    """Kill a process that saves without end, at random moments; how many kills left something half-done."""
    folder, chance, half_done = Path(folder), random.Random(0), 0
    pace = 0.0
    for salt in range(3):
        start = time.perf_counter()
        save(folder, 1, salt=salt, size=30_000)
        pace = max(pace, time.perf_counter() - start)
    for kill in range(int(kills)):
        read, write = os.pipe()
        begin = survivors(folder)[-1][0]

        def work(begin=begin, kill=kill, write=write):
            for step in range(begin, 10**6):  # first the one that is there already, with other values
                save_checkpoint(folder, make(step, salt=3 + kill, size=30_000))
                os.write(write, struct.pack("q", step))

        pid = forked(work)
        time.sleep(chance.uniform(0, 4 * pace))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        os.close(write)
        told = os.read(read, 1 << 20)
        os.close(read)
        half_done += any(name not in [p.name for p in checkpoints(folder)] for name in names(folder))
        step, salt = survivors(folder)[-1]
        if told:  # what save_checkpoint returned from is there
            assert step >= struct.unpack("q", told[-8:])[0]
            assert salt == 3 + kill
    save(folder, step + 1)
    assert names(folder) == [p.name for p in checkpoints(folder)]
    return [step, half_done]


def test_kills_at_random_moments(child, tmp_path):
    steps, half_done = child("killed_at_random", tmp_path, 20)
    # not vacuous: it did get on, and was hit amid the work. Two saves get to step 2, a delay is uniform on 0 to 4 times
    # the slowest of three saves: no kill of 20 comes so late with chance 2^-20, and a save is most of what the loop does
    assert steps >= 2
    assert half_done >= 2


def careless(folder, snapshot, *, keep_last):
    """What save_checkpoint must not do: the old one is removed, then the new one is given its name."""
    whole = save_checkpoint(folder.with_name("apart"), snapshot)
    shutil.rmtree(folder / whole.name, ignore_errors=True)
    os.replace(whole, folder / whole.name)


def killed_before(k, saver, folder, snapshot):
    """Kill a save before its k-th file operation; whether it got that far."""

    def work():
        def count(event, args):
            nonlocal k
            if event in MUTATING or (event == "open" and args[1] == "xb"):
                k -= 1
                if k == 0:
                    os.kill(OWN_ID(), signal.SIGKILL)

        sys.addaudithook(count)  # called before the operation is done
        saver(folder, snapshot, keep_last=2)

    code = os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def killed_everywhere(folder, saver, case):
    """Kill a save before each of its operations, then the next save before each of its own; all outcomes."""
    folder, saver = Path(folder), globals()[saver]
    os.getpid = lambda: 1  # as in a container: the names of left-overs recur
    os.fsync = lambda handle: None  # a kill, unlike a power cut, loses nothing that was written
    origin, once, twice = folder / "origin", folder / "once", folder / "twice"
    for step, score in {"new": [(1, 1.0), (2, 2.0), (3, 3.0)], "again": [(3, 3.0)]}[case]:
        save(origin, step, score=score)
    snapshot = make(4 if case == "new" else 3, salt=1, score=4.0)
    outcomes, kills = [], 0
    for k in range(1, 1000):
        shutil.copytree(origin, once)
        reached = killed_before(k, saver, once, snapshot)
        for m in range(1, 1000):
            shutil.copytree(once, twice)
            reached_again = killed_before(m, saver, twice, snapshot)
            kills += 1
            outcomes += [found for found in [survivors(twice)] if found not in outcomes]
            saver(twice, snapshot, keep_last=2)  # all is well again
            assert names(twice) == [p.name for p in checkpoints(twice)]
            assert survivors(twice)[-1] == (snapshot.step, 1)
            shutil.rmtree(twice)
            if not reached_again:
                break
        shutil.rmtree(once)
        if not reached:
            return [kills, outcomes]
    raise AssertionError("no end")


def test_kills_before_every_file_operation_of_a_new_step(child, tmp_path):
    kills, outcomes = child("killed_everywhere", tmp_path, "save_checkpoint", "new")
    assert kills > 50  # not vacuous: a save has about twelve operations
    before, between, after = [[1, 0], [2, 0], [3, 0]], [[1, 0], [2, 0], [3, 0], [4, 1]], [[1, 0], [3, 0], [4, 1]]
    assert outcomes == [before, between, after]  # step 1 is the best


def test_kills_before_every_file_operation_of_a_replacement(child, tmp_path):
    kills, outcomes = child("killed_everywhere", tmp_path, "save_checkpoint", "again")
    assert kills > 50  # not vacuous: a save has about twelve operations
    assert outcomes == [[[3, 0]], [[3, 1]]]  # the only checkpoint is at each moment the old one or the new one


def test_negative_control_kills_find_a_careless_writer(child, tmp_path):
    with pytest.raises(AssertionError, match=r"CheckpointError: .* is missing|latest is not None"):
        child("killed_everywhere", tmp_path, "careless", "again")


def test_data_are_on_the_disk_before_names_that_count(tmp_path, monkeypatch):
    """A power cut can't be had here, so the order of fsync and rename is looked at instead."""
    save(tmp_path, 1, 2)
    log, fsync, rename = [], os.fsync, os.replace

    def spy_fsync(handle):
        log.append(os.readlink(f"/proc/self/fd/{handle}").removeprefix(f"{tmp_path}/"))
        fsync(handle)

    def spy_rename(source, target):
        log.append((source.name, target.name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_rename)
    aside = [f".step-0000000{i}.tmp-{os.getpid()}" for i in range(4)]
    save(tmp_path, 3, keep_last=2)
    written = [f"{aside[3]}/{name}" for name in FILES]
    top = str(tmp_path)
    assert log == [*written, aside[3], (aside[3], "step-00000003"), top, ("step-00000001", aside[1]), top]
    log.clear()
    save(tmp_path, 3, salt=1, keep_last=2)
    new = (aside[3], "step-00000003.new"), top
    swap = ("step-00000003", aside[3]), top, ("step-00000003.new", "step-00000003"), top
    assert log == [*written, aside[3], *new, *swap]


def limited(folder, limit):
    """Save step 2 with no file allowed above so many bytes: Python turns the signal into EFBIG."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    return refused(folder)


def unprivileged(folder):
    """Save step 2 without the right to write."""
    if os.getuid() == 0:
        os.setuid(65534)
    return refused(folder)


def refused(folder):
    try:
        save(Path(folder), 2, size=5000)
    except CheckpointError as error:
        return [str(error), error.__cause__.errno]
    return None


def test_a_full_disk(child, tmp_path):
    sizes = [f.stat().st_size for f in save(tmp_path / "unlimited", 2, size=5000).iterdir()]
    run = tmp_path / "run"
    save(run, 1)
    model = (tmp_path / "unlimited" / "step-00000002" / "model.safetensors").stat().st_size
    assert model < max(sizes)
    for limit in (0, 1000, model - 1, model, max(sizes) - 1):  # the last two stop the last large file
        message, cause = child("limited", run, limit)
        assert cause == errno.EFBIG
        assert f"saving {run / 'step-00000002'} failed: [Errno 27] File too large" in message
        assert f"needs {sum(sizes)} bytes" in message
        free = int(message.split("bytes, ")[1].split()[0])
        # other processes write, too; a tenth of the disk is a wide margin
        assert abs(free - shutil.disk_usage(run).free) < shutil.disk_usage(run).total / 10
        assert "The last good checkpoint, step-00000001, is intact. Make room" in message
        assert names(run) == ["step-00000001"]
        assert contents(load_latest(run)) == contents(make(1))
    message, _ = child("limited", tmp_path / "fresh", 0)
    assert "There is no valid checkpoint yet" in message
    assert child("limited", run, max(sizes)) is None  # negative control: just enough
    assert names(run) == ["step-00000001", "step-00000002"]


def test_a_read_only_folder(child):
    with tempfile.TemporaryDirectory() as top:  # not tmp_path: another user may not look into that one
        os.chmod(top, 0o755)
        run = Path(top) / "run"
        save(run, 1)
        for path in (run, run / "step-00000001"):
            path.chmod(0o555)
        message, cause = child("unprivileged", run)
        assert cause == errno.EACCES
        assert "Permission denied" in message
        assert "The last good checkpoint, step-00000001, is intact" in message
        assert "grant access" in message
        assert names(run) == ["step-00000001"]
        for path in (run, run / "step-00000001"):
            path.chmod(0o755)


def nursery():
    warnings.simplefilter("error")
    for line in sys.stdin:
        name, *args = json.loads(line)

        def work(name=name, args=args):
            try:
                answer = [globals()[name](*args), None]
            except BaseException:
                answer = [None, traceback.format_exc()]
            print(json.dumps(answer), flush=True)

        os.waitpid(forked(work), 0)


if __name__ == "__main__":
    nursery()
