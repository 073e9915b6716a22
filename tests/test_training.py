"""The trainer's parts against formulas, and a run from the command line to samples and a report."""

import json
import math
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

from sdesens.diffusion import EDM, VP, dsm_loss, simple_weight, uniform_times
from sdesens.training import (
    Batch,
    Batches,
    Ranks,
    Samples,
    Trainer,
    batch_loss,
    checkpoints,
    draw_samples,
    floors,
    load_data,
    loss_weight,
    make_denoiser,
    make_network,
    network_of,
    open_run,
    read_log,
    recipe,
    sampler_grid,
    score,
    train,
)
from sdesens.training.pictures import is_image, tiles
from sdesens.training.samples import SAMPLERS

CPU = Ranks(0, 1, torch.device("cpu"))
SMALL = {"steps": 6, "batch": 8, "width": 8, "depth": 1, "picture_every": 0}


def quiet(config, path, **options):
    return train(config, path, tensorboard=False, progress=False, **options)


def randomised(net, seed=0):
    """The network with weights that are nowhere zero."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for p in net.parameters():
            p.data.normal_(0, 0.3)
    return net


def test_the_learning_rate_is_a_function_of_the_step():
    config = recipe("gmm8", steps=1000, warmup=10, lr=2.0)
    assert [config.lr_at(k) for k in (0, 4)] == pytest.approx([0.2, 1.0], rel=1e-4)  # cos(pi k/1000) is 1 to 8e-5
    assert config.lr_at(500) == pytest.approx(1.0, rel=1e-12)
    assert 0 < config.lr_at(999) < 1e-5 * 2
    assert recipe("gmm8", warmup=0, lr=2.0).lr_at(0) == 2.0


def test_averaged_weights_are_their_formula():
    config = recipe("gmm8", **SMALL)
    trainer = Trainer(config, load_data("gmm8"), CPU)
    names = list(trainer.net.state_dict())
    averaged = None
    for step in trainer.steps():
        now = {k: v.double().clone() for k, v in trainer.net.state_dict().items()}
        i = step - 1  # updates done before this one; the first one copies
        decay = min(0.999, (1 + i) / (10 + i)) if i else 0.0
        averaged = {k: now[k] if averaged is None else decay * averaged[k] + (1 - decay) * now[k] for k in names}
    for k, v in trainer.averaged.net.state_dict().items():
        assert torch.allclose(v.double(), averaged[k], rtol=1e-5, atol=1e-7)  # float32, six updates


def test_a_step_is_adamw_on_the_mean_loss():
    """Against torch's plain AdamW on a loss written out from its equation."""
    config, data = recipe("gmm8", **SMALL, clip=0.1), load_data("gmm8")
    trainer = Trainer(config, data, CPU)
    net = network_of(config, data.form)
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=config.weight_decay, fused=False, foreach=False)
    sd = data.form.sigma_data
    for step, ((batch,), done) in enumerate(zip(Batches(config, data).steps(0, 6), trainer.steps(), strict=True)):
        r = batch.t.float()[:, None]
        x = batch.x0 + r * batch.eps
        skip, scale = sd**2 / (r**2 + sd**2), r * sd / (r**2 + sd**2).sqrt()
        D = skip * x + scale * net(x / (r**2 + sd**2).sqrt(), r[:, 0].log() / 4)
        loss = ((D - batch.x0).square() * ((r**2 + sd**2) / (r * sd) ** 2)).mean()
        for group in optimiser.param_groups:
            group["lr"] = config.lr_at(step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip)
        optimiser.step()
        assert done == step + 1
        assert float(trainer.losses[-1]) == pytest.approx(float(loss.detach()), rel=2e-5)  # float32, sums of 16 numbers
    # AdamW divides by the root of squares: entries whose gradient is rounding differ by their full step, 1e-3 of it here
    for ours, theirs in zip(trainer.net.parameters(), net.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("prediction", ["edm", "eps", "v", "x0", "velocity"])
def test_weights_are_stated_on_the_eps_error(prediction):
    config = recipe("gmm8", **SMALL, prediction=prediction, schedule="vp", weight="simple")
    denoiser = make_denoiser(config, load_data("gmm8").form)
    randomised(denoiser.net)
    (batch,) = next(Batches(config, load_data("gmm8")).steps(0, 1))
    loss = batch_loss(denoiser, batch, loss_weight(config, 1.0)).double()
    x = VP().reparameterise(batch.x0.double(), batch.t, batch.eps.double())
    double = make_denoiser(config, load_data("gmm8").form, denoiser.net.double())
    error = (batch.eps.double() - double.eps(x, batch.t)).square().mean(1).detach()
    # float32 against float64; cancellation costs 1/sigma^2 = 1e4 of 1e-7 at the earliest of these times
    assert torch.allclose(loss.detach(), error, rtol=2e-3)


def test_auto_weight_is_one_on_v():
    config, data = recipe("gmm8", **SMALL, prediction="v", schedule="vp"), load_data("gmm8")
    denoiser = make_denoiser(config, data.form)  # returns 0 at first, so that the loss is that of v = 0
    (batch,) = next(Batches(config, data).steps(0, 1))
    alpha, sigma = VP().alpha(batch.t).float()[:, None], VP().sigma(batch.t).float()[:, None]
    v = alpha * batch.eps - sigma * batch.x0
    assert torch.allclose(batch_loss(denoiser, batch, loss_weight(config, 1.0)), v.square().mean(1), rtol=1e-4)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_networks_start_at_zero_and_use_all_they_are_told(kind):
    before = torch.random.get_rng_state()
    net = make_network(kind, (1, 8, 8), 16, 2, classes=3, norm=True, seed=5)
    assert torch.equal(before, torch.random.get_rng_state())
    x, t, label = torch.ones(2, 1, 8, 8), torch.tensor([0.1, 0.2]), torch.tensor([0, 3])
    assert torch.equal(net(x, t, label), torch.zeros_like(x))
    same, other = (make_network(kind, (1, 8, 8), 16, 2, classes=3, norm=True, seed=s) for s in (5, 6))
    for p, q, r in zip(net.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, r) or p.unique().numel() == 1
    randomised(net)
    y = net(x, t, label)
    for changed in ((2 * x, t, label), (x, 2 * t, label), (x, t, label.flip(0))):
        assert not torch.allclose(net(*changed), y, atol=1e-3)


def test_a_network_that_is_told_the_time_sees_the_same_noise_level():
    told = [make_network("mlp", (2,), 16, 1, schedule=s).condition.clock for s in (VP(), EDM(), None)]
    t = VP().t_of_log_snr(torch.tensor([3.0, -2.0]))
    c = torch.tensor([-3.0 / 8, 2.0 / 8])
    assert torch.allclose(told[0](t.float()), c, atol=1e-5)  # float32 t
    assert torch.allclose(told[1](EDM().t_of_log_snr(torch.tensor([3.0, -2.0])).float()), c, atol=1e-6)
    assert torch.equal(told[2](c), c)


def test_floors_are_those_of_the_laws():
    t = uniform_times(VP(), (torch.arange(4000) + 0.5) / 4000, t_min=1e-3)
    ring = floors(load_data("gmm8"), VP(), t, simple_weight)
    assert ring["oracle"] == pytest.approx(0.2378, abs=0.008)  # 4 standard errors of 2^14 draws
    rows = load_data("gmm8").train.double()
    variances = torch.linalg.eigvalsh(torch.cov(rows.mT, correction=0))
    alpha, sigma = VP().alpha(t)[:, None], VP().sigma(t)[:, None]
    linear = (alpha**2 * variances / (alpha**2 * variances + sigma**2)).mean()
    assert ring["linear"] == pytest.approx(float(linear), rel=1e-10)
    assert ring["oracle"] < ring["linear"]


def test_the_memorisation_floor_of_classes_is_below_that_of_all_rows():
    data, t = load_data("digits"), torch.tensor([0.4], dtype=torch.float64)
    own, mixed, hidden = (floors(data, VP(), t, simple_weight, drop_label=d)["memorisation"] for d in (0.0, 0.5, 1.0))
    assert own < hidden
    assert mixed == pytest.approx((own + hidden) / 2, rel=1e-12)


def test_a_network_that_recites_has_the_memorisation_floor():
    """The exact denoiser of the training rows, scored by the loss, has the floor that the report shows."""
    from sdesens.diffusion import Empirical, draw_noise

    data, t = load_data("digits"), torch.full((1400,), 0.3, dtype=torch.float64)
    rows = data.train.flatten(1)
    loss = dsm_loss(Empirical(rows).denoiser(VP()), rows, t, draw_noise(1, 1, tuple(rows.shape))).loss
    floor = floors(data, VP(), t[:1], simple_weight, drop_label=1.0)["memorisation"]
    error = float(loss.std()) * math.sqrt(1 / 1400 + 1 / 4096)
    assert abs(float(loss.mean()) - floor) < 4 * error


def test_rows_are_split_and_scaled_and_come_back(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2)) * [1e-3, 1e5] + [1e4, -3.0]
    x = np.concatenate((x, np.full((200, 1), 7.0)), 1)  # a constant column stays one
    np.savez(tmp_path / "x.npz", x=x, labels=np.arange(200) % 3)
    data = load_data(str(tmp_path / "x.npz"))
    assert (len(data.train), len(data.test), data.form.classes) == (180, 20, 3)
    both = torch.cat((data.train, data.test)).double()
    assert torch.allclose(both.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(both.std(0, correction=0)[:2], torch.ones(2, dtype=torch.float64), atol=1e-6)
    back = data.form.restore(both.float()).numpy()
    order = np.lexsort(back.T[:1]), np.lexsort(x.T[:1])
    # float32 once, of numbers within 4 standard deviations
    assert np.allclose(back[order[0]], x[order[1]], rtol=0, atol=np.array([1e-3, 1e5, 1]) * 4 * 2e-7)
    labels = torch.cat((data.labels, data.test_labels))[torch.from_numpy(order[0].copy())]
    assert labels.tolist() == (np.arange(200) % 3)[order[1]].tolist()
    again = load_data(str(tmp_path / "x.npz"))
    assert torch.equal(again.train, data.train)
    assert again.form == data.form


@pytest.mark.parametrize("sizes", [(1e-6, 1e10), (1e-300, 1e200), (1.0, 1e-9)])
def test_small_columns_beside_large_ones_are_scaled_too(tmp_path, sizes):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(100, 2)) * sizes)
    data = load_data(str(tmp_path / "x.npy"))
    both = torch.cat((data.train, data.test)).double()
    assert torch.allclose(both.std(0, correction=0), torch.ones(2, dtype=torch.float64), atol=1e-6)  # float32
    assert data.form.scale == pytest.approx(sizes, rel=0.3)  # 4 standard errors of a deviation of 100 rows


def test_images_are_scaled_as_a_whole(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, size=(30, 3, 4, 4), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    data = load_data(str(tmp_path / "x.npy"))
    assert data.form.shift == (pytest.approx(x.mean()),)
    assert data.form.scale == (pytest.approx(x.std()),)
    found = data.form.restore(torch.cat((data.train, data.test))).numpy()
    assert sorted(np.rint(found).astype(int).ravel().tolist()) == sorted(x.astype(int).ravel().tolist())
    assert is_image(data.form)
    assert data.form.cell == pytest.approx(1 / x.std())  # whole numbers lie on a grid


@pytest.mark.parametrize("schedule", ["edm", "vp", "cosine", "subvp", "ve", "condot"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_goes_with_every_schedule(schedule, sampler):
    """On the exact law, with its usual steps: the ring's mean radius is 2.0056 (Rice), and every sampler is near it."""
    law = load_data("gmm8").law
    denoiser = law.denoiser(recipe("gmm8", schedule=schedule).make_schedule())
    from sdesens.diffusion import prior

    walk, steps, _ = SAMPLERS[sampler]
    grid = sampler_grid(denoiser.schedule, sampler, steps)
    x = prior(denoiser.schedule, 2000, (2,), seed=3, dtype=torch.float64)
    found = walk(denoiser, x, grid, seed=3)
    # 4 standard errors of 2,000 radii of deviation 0.15 are 0.013; a sampler of order 1 adds some hundredths
    assert float(found.norm(dim=1).mean()) == pytest.approx(2.0056, abs=0.05)
    assert float(found.mean(0).abs().max()) < 4 * 1.42 / math.sqrt(2000) + 0.05


def test_a_sample_does_not_depend_on_how_many_are_drawn(monkeypatch):
    form = load_data("digits").form
    denoiser = make_denoiser(recipe("digits", width=16, depth=1), form)
    randomised(denoiser.net)
    options = {"sampler": "em", "steps": 8, "guidance": 2.0, "seed": 4}
    whole = draw_samples(denoiser, form, 25, **options)
    assert whole.labels.tolist() == [i % 10 for i in range(25)]
    monkeypatch.setattr("sdesens.training.samples.MOST_AT_ONCE", 64 * 7)
    pieces = draw_samples(denoiser, form, 25, **options)
    assert torch.allclose(whole.x, pieces.x, rtol=1e-4, atol=1e-4)  # matrices of other sizes round otherwise
    plain = draw_samples(denoiser, form, 25, **{**options, "guidance": 1.0})
    assert not torch.allclose(whole.x, plain.x, atol=1e-2)
    one = draw_samples(denoiser, form, 25, label=3, **options)
    assert one.labels.unique().tolist() == [3]
    assert torch.allclose(one.x[3::10], whole.x[3::10], rtol=1e-4, atol=1e-4)


def test_scores_of_real_rows_are_their_floors():
    data = load_data("digits")
    net = make_denoiser(recipe("digits", width=16, depth=1), data.form)
    real = score(net, data, Samples(data.test, data.test_labels), likelihood=False)
    for name in ("sliced W2", "classifier Frechet distance, test", "class hit rate", "nearest-neighbour ratio"):
        s = real[name]
        if name == "classifier Frechet distance, test":
            assert s.value == pytest.approx(0.0, abs=1e-8)  # test against test
        else:
            assert s.value == pytest.approx(s.floor, rel=1e-6)
    noise = Samples(torch.randn(397, 1, 8, 8, generator=torch.Generator().manual_seed(0)), data.test_labels)
    bad = score(net, data, noise, likelihood=False)
    assert bad["sliced W2"].value > 5 * bad["sliced W2"].floor
    assert bad["classifier Frechet distance, test"].value > 5 * bad["classifier Frechet distance, test"].floor
    assert bad["class hit rate"].value < 0.3
    assert bad["nearest-neighbour ratio"].value > 1.5
    # an untrained preconditioned network predicts x/(1 + ...): its loss is the best linear one of an isotropic law
    sd, lam = data.form.sigma_data, torch.tensor([lev.log_snr for lev in real.levels], dtype=torch.float64)
    r2 = torch.exp(-lam)
    second = float(data.test.double().square().mean())  # the data's mean is not 0, and F = 0 pays for it
    expected = (r2 * second + sd**4) / (r2 + sd**2) ** 2
    found = torch.tensor([lev.test for lev in real.levels])
    assert torch.allclose(found.double(), expected, rtol=0.02)  # 2,048 draws of 64 numbers: 4 standard errors


def test_likelihood_of_an_untrained_network_is_that_of_a_gaussian():
    data = load_data("gmm8")
    net = make_denoiser(recipe("gmm8", width=8, depth=1), data.form)
    found = score(net, data, Samples(data.train, None))["test log-likelihood"]
    x, sd2 = data.test[:512].double(), data.form.sigma_data**2  # F = 0 is exact for N(0, sd^2 I)
    expected = -(x.square().sum(1) / (2 * sd2) + math.log(2 * math.pi * sd2)).mean()
    assert found.value == pytest.approx(float(expected), abs=2e-3)  # the ODE's tolerance, and noise 0.0008 at its start


def test_tiles_put_images_side_by_side():
    form = load_data("digits").form
    x = (torch.arange(12.0) / 11 * 2 - 1)[:, None, None, None].expand(12, 1, 8, 8)  # digits lie in [-1, 1]
    sheet = tiles(x, form)
    assert sheet.shape == (17, 89)
    assert sheet[0, 0] == 0
    assert sheet[9, 9] == pytest.approx(1.0)  # the twelfth, in the second row
    assert sheet[0, 9 * 9] == pytest.approx(9 / 11)
    assert sheet[8, 5] == sheet[5, 8] == sheet[16, 88] == 0.5  # between images, and where the last row has none
    assert tiles(10 * x, form).max() == 1.0


def run_cli(*words, cwd, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "sdesens", *words], cwd=cwd, env=environment, capture_output=True, text=True, **options)  # fmt: skip


def test_from_the_command_line_to_a_report(tmp_path):
    words = (
        "train",
        "digits",
        "--steps",
        "30",
        "--batch",
        "32",
        "--width",
        "16",
        "--picture-every",
        "10",
        "--checkpoint-every",
        "15",
    )
    done = run_cli(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "memorisation floor" in done.stderr
    assert "step 15/30: held-out loss" in done.stderr
    assert "classifier Frechet distance, test" in done.stdout
    run = tmp_path / "runs" / "digits"
    assert {p.name for p in (run / "pictures").iterdir()} == {"step-00000010.png", "step-00000020.png"}
    assert {p.name for p in run.iterdir()} == {
        ".lock", "run.json", "checkpoints", "log.jsonl", "tensorboard", "pictures", "report.json", "report.png", "samples.npz",
    }  # fmt: skip
    report = json.loads((run / "report.json").read_text())
    assert {s["name"] for s in report["scores"]} >= {"test bits per dimension", "class hit rate", "eps-loss, train"}
    rows = read_log(run)
    assert [r["step"] for r in rows if "loss" in r] == [10, 20, 30]
    assert [r["step"] for r in rows if "validation" in r] == [15, 30]
    with safe_open(run / "checkpoints" / "step-00000030" / "ema.safetensors", "pt") as file:
        assert json.loads(file.metadata()["sdesens"])["config"]["width"] == 16

    out = run_cli("sample", "runs/digits", "--class", "3", "--guidance", "2", "--steps", "4", "-n", "7", "--out", "threes", cwd=tmp_path)  # fmt: skip
    assert out.returncode == 0, out.stderr
    with np.load(tmp_path / "threes.npz") as found:
        assert found["x"].shape == (7, 1, 8, 8)
        assert found["labels"].tolist() == [3] * 7
    assert (tmp_path / "threes.png").read_bytes().startswith(b"\x89PNG")
    wrong = run_cli("sample", "runs/digits", "--class", "10", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "0 ... 9" in wrong.stderr


def test_dry_run_prints_the_configuration_and_writes_nothing(tmp_path):
    done = run_cli("train", "gmm8", "--lr", "0.5", "--clip", "inf", "--dry-run", cwd=tmp_path)
    assert json.loads(done.stdout) == recipe("gmm8", lr=0.5, clip=math.inf).to_json()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_says_so_and_the_same_command_goes_on(tmp_path):
    """Files may not grow beyond 150 kB: the log and small files fit, a checkpoint does not. Then they may."""
    words = ("train", "gmm8", "--steps", "30", "--width", "64", "--checkpoint-every", "10", "--picture-every", "0", "--no-report",
             "--no-tensorboard", "--quiet")  # fmt: skip

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))

    failed = run_cli(*words, "--out", "a", cwd=tmp_path, preexec_fn=limited)
    assert failed.returncode == 2
    assert "failed: [Errno 27] File too large" in failed.stderr
    assert "run the same command again" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not list((tmp_path / "a" / "checkpoints").iterdir())
    for name in ("a", "b"):
        assert run_cli(*words, "--out", name, cwd=tmp_path).returncode == 0
    a, b = (open_run(tmp_path / name).denoiser().weights for name in ("a", "b"))
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert (tmp_path / "a" / "log.jsonl").read_bytes() == (tmp_path / "b" / "log.jsonl").read_bytes()


def test_the_best_checkpoint_is_kept_and_found(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(40, 2)))
    config = recipe(
        str(tmp_path / "x.npy"), **{**SMALL, "steps": 300, "lr": 0.02, "width": 64}, checkpoint_every=25, keep_last=1
    )
    run = quiet(config, tmp_path / "run")  # 36 rows: it overfits
    held = {r["step"]: r["validation"] for r in read_log(run.path) if "validation" in r}
    best = min(held, key=held.get)
    assert best < 300
    assert [p.name for p in checkpoints(run.checkpoints)] == [f"step-{best:08d}", "step-00000300"]
    weights = run.denoiser(which="best").weights
    assert any(not torch.equal(v, weights[k]) for k, v in run.denoiser().weights.items())
    with pytest.raises(ValueError, match="'last' or 'best'"):
        run.denoiser(which="first")


def test_bf16_keeps_the_loss_in_float32():
    config, data = recipe("gmm8", **SMALL, bf16=True), load_data("gmm8")
    trainer = Trainer(config, data, CPU)
    randomised(trainer.net)
    (batch,) = next(Batches(config, data).steps(0, 1))
    half, full = (batch_loss(trainer.denoiser, batch, trainer.weight, bf16=b) for b in (True, False))
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    assert torch.allclose(
        half, full, rtol=0.1
    )  # a product of bfloat16 numbers is good to 2^-8, and there are a few layers
    assert isinstance(batch, Batch)
