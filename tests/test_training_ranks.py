"""Several ranks: the sample stream of one, its losses, and runs that are killed and resumed to the bit."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_cases
from training_cases import PARTS, argv, killed, losses, nursery, results, small, write_table

from sdesens.training.batches import Batches
from sdesens.training.checkpoint import load_latest
from sdesens.training.data import load_data

WHOLE = dict.fromkeys((*PARTS, "log", "samples"), True)
UNIT = 2**-24  # relative rounding of float32

# The sample stream

STREAMS = {
    "a law": ("gmm8", {}),
    "a table": (100, {"drop_label": 0.5}),  # 90 rows to train on, 60 items a step
    "epochs shorter than a batch": (30, {}),
    "images": ((40, 1, 3, 3), {"prediction": "v", "schedule": "cosine"}),
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ranks_and_pieces_share_out_one_stream(name, size, pieces, tmp_path):
    about, options = STREAMS[name]
    if not isinstance(about, str):
        rows, *event = (about, 2) if isinstance(about, int) else about
        about = write_table(tmp_path / "table.npz", rows, tuple(event))
    config = small(about, batch=60, **options)
    data = load_data(config.data)
    alone = [batch for (batch,) in Batches(config, data).steps(0, 9)]
    shared = replace(config, accumulate=pieces)
    for first in (0, 4):  # a stream that is begun later is the same one
        ranks = [Batches(shared, data, r, size).steps(first, 9) for r in range(size)]
        for whole, *parts in zip(alone[first:], *ranks, strict=True):
            items = [batch for part in parts for batch in part]
            assert len(items) == size * pieces
            for field in ("x0", "t", "eps") if whole.label is None else whole._fields:
                assert torch.equal(torch.cat([getattr(b, field) for b in items]), getattr(whole, field))
    other = next(Batches(replace(config, seed=1), data).steps(0, 1))[0]
    for field in ("x0", "t", "eps"):  # negative control
        assert not torch.equal(getattr(other, field), getattr(alone[0], field))
    if whole.label is not None:
        seen = torch.cat([b.label for b in alone])
        assert seen.unique().tolist() == [0, 1, 2, 3]  # 3 is a hidden one


@pytest.mark.parametrize(("rows", "batch"), [(100, 33), (30, 64)])
def test_an_epoch_has_each_row_once(rows, batch, tmp_path):
    config = small(write_table(tmp_path / "table.npz", rows), batch=batch)
    data = load_data(config.data)
    n = len(data.train)
    rows = torch.cat([b.x0 for (b,) in Batches(config, data).steps(0, 20)])
    labels = torch.cat([b.label for (b,) in Batches(config, data).steps(0, 20)])
    epochs = rows[: len(rows) // n * n].reshape(-1, n, 2)
    order = data.train[:, 0].argsort()
    for epoch, shown in zip(epochs, labels[: len(rows) // n * n].reshape(-1, n), strict=True):
        place = epoch[:, 0].argsort()
        assert torch.equal(epoch[place], data.train[order])
        hidden = shown[place] == 3
        assert torch.equal(shown[place][~hidden], data.labels[order][~hidden])
    assert len(epochs) > 3
    assert not torch.equal(epochs[0], epochs[1])


# Processes


@pytest.fixture(scope="module")
def children():
    with nursery() as found:
        yield found


@pytest.fixture(scope="module")
def one(children, tmp_path_factory):
    """A run of one rank, with every step in the log."""
    folder = tmp_path_factory.mktemp("one")
    table = write_table(folder / "table.npz", 100)
    config = small(table, steps=60, batch=2400, width=16, lr=1e-2, log_every=1, checkpoint_every=60)
    children.run_to_the_end(argv(config, folder / "run"))
    return config, folder / "run"


def gap(path, one):
    """The largest relative distance of losses from those of one rank, in units of rounding."""
    ours, theirs = losses(path), losses(one[1])
    return float((ours / theirs - 1).abs().max() / UNIT)


# At equal weights the mean of 480 losses of one sign is summed in an other order, by some 20 additions one after another:
# 20 units at worst, some 4 if their roundings are independent. The gradients differ likewise, by sqrt(480) units, as their
# terms have either sign; an update that is off by r moves the losses by less than r (a learning rate off by 0.001, below,
# by 0.0002), so that adds less than 22. Measured: at most 5 units.
LIMIT = 32


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_have_the_losses_of_one(children, one, tmp_path, ranks):
    children.run_to_the_end(argv(one[0], tmp_path), ranks=ranks)
    assert 0 < gap(tmp_path, one) < LIMIT
    assert load_latest(tmp_path / "checkpoints").state["ranks"] == ranks


def test_two_ranks_are_two_pieces_to_the_bit(children, one, tmp_path):
    """Both compute the gradients of the halves, and add halves of them: exact but for one addition, the same one."""
    children.run_to_the_end(argv(one[0], tmp_path / "ranks"), ranks=2)
    children.run_to_the_end(argv(replace(one[0], accumulate=2), tmp_path / "pieces"))
    ranks, pieces = results(tmp_path / "ranks"), results(tmp_path / "pieces")
    assert ranks.equal(pieces) == {**WHOLE, "rest": False}  # it says how many ranks there were
    assert gap(tmp_path / "pieces", one) < LIMIT


def test_negative_control_a_thousandth_of_the_learning_rate(children, one, tmp_path):
    children.run_to_the_end(argv(replace(one[0], lr=one[0].lr * 1.001), tmp_path), ranks=2)
    assert gap(tmp_path, one) > 30 * LIMIT


def test_the_number_of_ranks_may_change(children, one, tmp_path):
    config = replace(one[0], checkpoint_every=10)
    for ranks, call in ((2, 14), (1, 14), (3, 0)):  # 14 is amid the second checkpoint of a process
        end = children.run(argv(config, tmp_path), ranks=ranks, call=call)
        assert end.killed == bool(call), end.words
    assert gap(tmp_path, one) < LIMIT
    assert load_latest(tmp_path / "checkpoints").state["ranks"] == 3
    assert len(losses(tmp_path)) == 60


@pytest.mark.parametrize(("ranks", "pieces"), [(2, 1), (3, 2)])
def test_kills_of_ranks(children, tmp_path, ranks, pieces):
    config = small(
        "gmm8", steps=120, batch=240, width=16, checkpoint_every=20, log_every=7, keep_last=2, accumulate=pieces
    )
    chance = random.Random(ranks)
    # the first rank amid a checkpoint; all at once; the first one, or the last one, alone
    kills = [
        {"call": chance.randrange(5, 16)},
        *({"delay": chance.random(), "victim": v} for v in (None, 0, ranks - 1)),
    ]
    found = killed(children, tmp_path, config, kills, ranks=ranks)
    assert found == [WHOLE] * len(found)


def test_three_ranks_log_the_same_losses_whenever_they_save(children, tmp_path):
    """A checkpoint between two lines of the log has the means over the ranks; what comes of them is to be the same."""
    config = small("gmm8", batch=240, log_every=7)
    for every in (3, 24):
        children.run_to_the_end(argv(replace(config, checkpoint_every=every), tmp_path / str(every)), ranks=3)
    assert torch.equal(losses(tmp_path / "3"), losses(tmp_path / "24"))
    assert len(losses(tmp_path / "3")) == 4


def test_negative_control_without_the_passes_that_settle_the_sums(children, tmp_path):
    """With three ranks the order of a sum matters, and DistributedDataParallel changes it after a process's first step."""
    config = small("gmm8", steps=40, batch=240, width=16, checkpoint_every=20)
    for name, call in (("whole", 0), ("resumed", 16), ("resumed", 0)):
        end = children.run(argv(config, tmp_path / name), ranks=3, call=call, careless=True)
        assert end.killed == bool(call), end.words
        if call:
            assert load_latest(tmp_path / name / "checkpoints").step == 20
    found = results(tmp_path / "resumed").equal(results(tmp_path / "whole"))
    assert not found["weights"]
    assert not found["optimiser"]


def torchrun(*words):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *words]
    return subprocess.Popen(launch, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_torchrun_and_a_rank_that_is_killed(children, tmp_path):
    """The others are ended by torchrun; runs of torchrun and of the other tests' agent are the same."""
    config = small("gmm8", steps=200, batch=240, width=16, checkpoint_every=20, keep_last=20)
    run = tmp_path / "run"
    agent = torchrun("-m", "sdesens", *argv(config, run))
    while not (run / "checkpoints" / "step-00000020").exists():
        assert agent.poll() is None, agent.stderr.read()
        time.sleep(0.01)
    ranks = [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]
    os.kill(ranks[1], signal.SIGKILL)
    agent.communicate()
    assert agent.returncode == 1
    assert len(ranks) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert 20 <= load_latest(run / "checkpoints").step < 200
    again = torchrun(training_cases.__file__, "0", *argv(config, run))
    _, said = again.communicate()
    assert again.returncode == 0, said
    # a thread of the group that is left may abort the process while Python shuts down
    assert said.count("threads at the end:") == 2, said
    assert "gloo" not in said
    children.run_to_the_end(argv(config, tmp_path / "whole"), ranks=2)
    assert results(run).equal(results(tmp_path / "whole")) == WHOLE
    for checkpoint in (tmp_path / "whole" / "checkpoints").iterdir():  # those of before the kill as well
        manifest = checkpoint / "manifest.json"
        assert (run / "checkpoints" / checkpoint.name / "manifest.json").read_bytes() == manifest.read_bytes()
