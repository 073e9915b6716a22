"""The claims about diffusion models: `python benchmarks/diffusion.py [1 2 ...]`, one line a figure.

    1  schedules: moment equations, inverses; conversions between predictions
    2  the forward SDE and the exact sample path
    3  the draw against the SDE's pathwise gradient
    4  orders of the samplers, without Monte Carlo noise
    5  likelihood of the eight-Gaussian ring
    6  parity with diffusers
    7  guidance and rewards: every method against closed forms
    8  the lean adjoint, and adjoint matching with the start remembered

Exit status 1 if one fails.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from bars import Row, below, main, within
from test_diffusion_samplers import LAW, ODE, law_at, moments, slopes
from test_diffusion_sensitivity import Net, Shifted, guided, paths, tilted_mean

import sdesens as ss
from sdesens.diffusion import (
    EDM,
    VE,
    VP,
    CondOT,
    Cosine,
    Denoiser,
    GaussianMixture,
    LogSNR,
    SubVP,
    Table,
    affine_moments,
    convert,
    ddim_step,
    edm_grid,
    guide,
    heun_step,
    lean_adjoint,
    log_prob,
    log_snr_grid,
    matching_loss,
    remembered,
    sampler_problem,
    sampler_sde,
    uniform_grid,
)

F64, ONE = torch.float64, torch.ones(1, dtype=torch.float64)
SCHEDULES = {
    "VP": VP(),
    "SubVP": SubVP(),
    "Cosine": Cosine(),
    "VE": VE(),
    "EDM": EDM(),
    "CondOT": CondOT(),
    "LogSNR": LogSNR(lambda t, p: 12 - 24 * t),
    "Table": Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=F64)),
}


def normals(*shape: int, seed: int = 1) -> Tensor:
    z = ss.Philox(seed).normals(0, shape[0], 0, 1, math.prod(shape[1:]), dtype=F64, device=torch.device("cpu"))
    return z[0].reshape(shape)


def schedules() -> Iterator[Row]:
    for name, s in SCHEDULES.items():
        t = (torch.arange(1, 1000, dtype=F64) - 0.3) / 1000 * s.t_max  # off the knots of the table
        alpha, (da,) = s.alpha(t), torch.func.jvp(s.alpha, (t,), (torch.ones_like(t),))[1:]
        (dv,) = torch.func.jvp(lambda t, s=s: s.sigma(t) ** 2, (t,), (torch.ones_like(t),))[1:]
        f, g2, sigma = s.f(t), s.g2(t), s.sigma(t)
        first = (
            ((da - f * alpha).abs() / (f * alpha).abs().clamp_min(1e-300)).max() if da.abs().max() else da.abs().max()
        )
        second = ((dv - 2 * f * sigma**2 - g2).abs() / (dv.abs() + g2)).max()
        yield below(f"{name}: alpha' = f alpha, relative", float(first), 1e-10)
        yield below(f"{name}: (sigma^2)' = 2 f sigma^2 + g^2, relative", float(second), 1e-10)
        yield below(
            f"{name}: inverse of the log-SNR, relative",
            float(((s.t_of_log_snr(s.log_snr(t)) - t) / t).abs().max()),
            1e-10,
        )
    kinds = ("eps", "x0", "v", "score", "velocity")
    for dtype, limit in ((F64, 1e-11), (torch.float32, 2e-4)):
        worst = 0.0
        for s in SCHEDULES.values():
            t = s.t_of_log_snr(torch.linspace(-12, 12, 241, dtype=F64)).clamp_min(1e-9)
            t = t[(s.log_snr(t) >= -12.001) & (s.log_snr(t) <= 12.001)]
            x0, eps = normals(len(t), 4).to(dtype), normals(len(t), 4, seed=2).to(dtype)
            x = s.reparameterise(x0, t, eps)
            for have in kinds:
                out = convert(eps, x, t, s, "eps", have) if have != "eps" else eps
                for want in kinds:
                    back = convert(convert(out, x, t, s, have, want), x, t, s, want, have)
                    scale = out.abs().amax(1).clamp_min(float(out.abs().amax(1).median()) * 1e-12)
                    worst = max(worst, float(((back - out).abs().amax(1) / scale).max()))
        yield below(f"conversions there and back, {dtype}, relative", worst, limit)


def forward() -> Iterator[Row]:
    for name in ("VP", "SubVP", "Cosine", "EDM"):
        s = SCHEDULES[name]
        errors: dict[str, list[float]] = {"alpha": [], "sigma^2": []}
        for n in (256, 512, 1024):
            end = 0.25 * s.t_max
            sde = s.as_sde()
            mean, cov = affine_moments(sde, ONE, torch.zeros(1, 1, dtype=F64), n, dt=end / n)
            errors["alpha"].append(abs(float(mean[0] - s.alpha(end))))
            errors["sigma^2"].append(abs(float(cov[0, 0] - s.sigma(end) ** 2)))
        for what, e in errors.items():
            if max(e) > 0:
                yield within(f"Euler-Maruyama, {name}, {what}: order", slopes(e)[-1], 0.95, 1.05)
                if name == "VP":
                    yield below(f"Euler-Maruyama, {name}, {what}: error at t = 0.25, 1,024 steps", e[-1], 2e-4)
    n, x0 = 200_000, 1.3
    xs = VP().sample_path(torch.full((n, 1), x0, dtype=F64), (0.2, 0.5), ss.Philox(1))[..., 0]
    for k, t in enumerate((0.2, 0.5)):
        a, s = float(VP().alpha(t)), float(VP().sigma(t))
        yield within(f"exact path, mean at {t}: standard errors", float(xs[k].mean() - a * x0) / (s / n**0.5), -4, 4)
        yield within(
            f"exact path, variance at {t}: standard errors", float(xs[k].var() - s**2) / (s**2 * (2 / n) ** 0.5), -4, 4
        )
    cov = float(torch.cov(xs)[0, 1])
    exact = float(VP().alpha(0.5) * VP().sigma(0.2) ** 2 / VP().alpha(0.2))
    spread = math.sqrt((exact**2 + float(VP().sigma(0.2) * VP().sigma(0.5)) ** 2) / n)
    yield within("exact path, covariance: standard errors", (cov - exact) / spread, -4, 4)
    for method in ("pathwise", "forward", "adjoint"):
        problem = ss.Problem(VP().as_sde(), lambda ys, p: ys[-1, :, 0], ONE, (0.0, 0.5), 2000)
        found = ss.sensitivity(problem, n_paths=16, method=method, wrt="y0", audit=False).gradient["y0"]
        yield below(f"dx_t/dx_0 - alpha_t, {method}, 2,000 steps", abs(float(found.mean[0] - VP().alpha(0.5))), 1e-3)


def rao_blackwell() -> Iterator[Row]:
    n, t, n_steps = 400_000, 0.3, 256
    sde = VP().as_sde()
    found: dict[str, list] = {}
    functions = {
        "x^2": lambda x: x**2,
        "cos 2x": lambda x: torch.cos(2 * x),
        "sigmoid 4x": lambda x: torch.sigmoid(4 * x),
    }
    ratios = {"x^2": 1.16, "cos 2x": 1.09, "sigmoid 4x": 1.10}
    for name, function in functions.items():
        problem = ss.Problem(sde, lambda ys, p, h=function: h(ys[-1, :, 0]), ONE, (0.0, t), n_steps)
        path = ss.sensitivity(problem, n_paths=n, method="forward", wrt="beta_max", seed=1, audit=False).gradient[
            "beta_max"
        ]
        eps = normals(n, 1, seed=9)
        beta = torch.tensor(20.0, dtype=F64)

        def draw(beta, e, h=function):
            return h(VP(beta_max=beta).reparameterise(ONE[None], t, e[None]))[0, 0]

        each = torch.func.vmap(torch.func.grad(draw), in_dims=(None, 0))(beta, eps)
        found[name] = [path, each]
        error = math.hypot(float(path.standard_error), float(each.std()) / n**0.5)
        yield within(
            f"{name}: means of SDE and draw, standard errors apart",
            (float(path.mean) - float(each.mean())) / error,
            -4,
            4,
        )
        ratio = (float(path.standard_error) * n**0.5) ** 2 / float(each.var())
        yield within(f"{name}: variance of the SDE's over the draw's", ratio, ratios[name] - 0.03, ratios[name] + 0.03)


def orders() -> Iterator[Row]:
    for schedule in (VP(), EDM()):
        for name, (step, options, grid, order) in ODE.items():
            errors = []
            for n in (64, 128, 256):
                times = edm_grid(schedule, n + 1)[:-1] if isinstance(schedule, EDM) else grid(schedule, n)
                _, std = moments(schedule, times, step, **options)
                errors.append(abs(std - law_at(schedule, times[-1])[1]) / law_at(schedule, times[0])[1])
            for k, slope in enumerate(slopes(errors)):
                yield within(
                    f"{type(schedule).__name__}, {name}: order, halving {k + 1}", slope, order - 0.1, order + 0.1
                )
            if isinstance(schedule, EDM) and order == 2:
                yield below(f"EDM, {name}: error of the slope at 128 steps", errors[1], 6e-6)
    for step, name in ((None, "reverse Euler-Maruyama"), (ddim_step, "ancestral")):
        means, variances = [], []
        for n in (512, 1024, 2048):
            grid = uniform_grid(VP(), n)
            mean, std = moments(VP(), grid, step, eta=1.0)
            exact = law_at(VP(), grid[-1])
            means.append(abs(mean - exact[0]))
            variances.append(abs(std**2 - exact[1] ** 2))
        if step is None:
            yield within(f"{name}: weak order of the mean", slopes(means)[-1], 0.95, 1.05)
        else:
            yield below(f"{name}: error of the mean", max(means), 1e-10)
        yield within(f"{name}: weak order of the variance", slopes(variances)[-1], 0.95, 1.05)
    for n, mean, std in ((18, 0.99340, 0.52762), (36, 0.99367, 0.50610)):
        found = moments(EDM(), edm_grid(EDM(), n), heun_step, start="prior")
        yield below(
            f"EDM Heun {n} from the prior: mean {found[0]:.6f}, std {found[1]:.6f}, off by",
            max(abs(found[0] - mean), abs(found[1] - std)),
            1e-5,
        )


def likelihoods() -> Iterator[Row]:
    ring = GaussianMixture.ring()
    x, denoiser = ring.sample(512, 1), ring.denoiser(VP())
    exact = ring.log_density(x, VP(), 1e-5)
    for rtol, mean, worst in ((1e-5, 1e-4, 5e-3), (1e-7, 5e-6, 5e-4)):
        with torch.no_grad():
            found = log_prob(denoiser, x, rtol=rtol, atol=rtol)
        error = (found.log_prob - exact).abs()
        yield below(
            f"rtol {rtol:g}, {found.evaluations} evaluations: mean error, nats",
            abs(float((found.log_prob - exact).mean())),
            mean,
        )
        yield below(f"rtol {rtol:g}: mean absolute error, nats", float(error.mean()), 10 * mean)
        yield below(f"rtol {rtol:g}: worst error, nats", float(error.max()), worst)
    # the model starts from N(0, I), the data's law at t_max is not that: VP(0.1, 20) keeps 3e-5 of the score's size
    for schedule, limit in ((Cosine(), 1e-5), (VP(0.1, 40.0), 1e-5), (VP(), 1e-4)):
        y = x[:64].clone().requires_grad_()
        value = log_prob(ring.denoiser(schedule), y, rtol=1e-7, atol=1e-7).log_prob
        (grad,) = torch.autograd.grad(value.sum(), y)
        score = ring.score(x[:64], schedule, 1e-5 * schedule.t_max)
        gap = float((grad - score).norm() / score.norm())
        yield below(f"{schedule!r}: gradient in x against the exact score, relative", gap, limit)


def parity() -> Iterator[Row]:
    from diffusers import DDPMScheduler

    from sdesens.diffusion import SchedulerView

    theirs = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)
    ours = SchedulerView(Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=F64)))
    x0, eps = normals(1000, 16).float(), normals(1000, 16, seed=2).float()
    index = torch.arange(1000)
    for name in ("add_noise", "get_velocity"):
        gap = getattr(theirs, name)(x0, eps, index) - getattr(ours, name)(x0, eps, index)
        yield below(f"{name}, float32, largest difference", float(gap.abs().max()), 5e-6)


def steering() -> Iterator[Row]:
    grid = log_snr_grid(VP(), 2000, t_min=1e-4)
    problem = sampler_problem(guided(), grid, lambda x: x[:, 0], step=heun_step, x=0.3 * ONE)
    exact = 1.5 * float(VP().alpha(grid[-1]) - VP().alpha(1.0))
    for method in ("pathwise", "forward", "finite_difference"):
        found = ss.sensitivity(problem, n_paths=2, method=method, wrt="guidance", audit=False, check=False).gradient[
            "guidance"
        ]
        yield below(f"flow, d E x_0 / dw, {method}: error", abs(float(found.mean) - exact), 1e-6)
    grid = uniform_grid(VP(), 200, t_min=1e-4)
    problem = sampler_problem(guided(), grid, lambda x: x[:, 0] ** 2, event=(1,))
    mean, slope = tilted_mean(2.0, 1.5, 1.0, 1.0, VP(), grid, 1.0)
    for method in (
        "pathwise",
        "forward",
        "adjoint",
        "torchsde_adjoint",
        "finite_difference",
        "likelihood_ratio",
        "malliavin",
        "vibrato",
    ):
        result = ss.sensitivity(problem, n_paths=10_000, method=method, wrt="guidance", bias=True, seed=6, audit=False)
        found, bias = result.gradient["guidance"], result.bias["guidance"]
        error = math.hypot(float(found.standard_error), float(bias.standard_error))
        yield within(
            f"SDE, d E x_0^2 / dw, {method}: standard errors ({error:.2g})",
            (float(found.mean - bias.mean) - 2 * mean * slope) / error,
            -4,
            4,
        )
    denoiser = guide(Denoiser(Net(), VP(), "v", null=torch.tensor(0.0, dtype=F64)), 1.5, torch.tensor(0.3, dtype=F64))
    for step, options in ((None, {"eta": 0.7}), (ddim_step, {"eta": 0.7}), (heun_step, {"gamma": 0.2})):
        problem = sampler_problem(
            denoiser, log_snr_grid(VP(), 30, t_min=0.02), lambda x: (x**2).sum(1), step=step, event=(2,), **options
        )
        found = {
            m: ss.sensitivity(problem, n_paths=200, method=m, seed=1, audit=False).gradient
            for m in ("pathwise", "forward", "finite_difference")
        }
        for other, limit in (("forward", 1e-11), ("finite_difference", 1e-6)):
            gap = max(
                float((found[other][k].mean - g.mean).abs().max() / g.mean.abs().max())
                for k, g in found["pathwise"].items()
            )
            name = "Euler-Maruyama" if step is None else step.__name__
            yield below(
                f"{name}, all {len(found['pathwise'])} parameters: {other} against pathwise, relative", gap, limit
            )


def matching() -> Iterator[Row]:
    base, a = LAW.denoiser(VP()), 0.8
    grid = uniform_grid(VP(), 1600, t_min=1e-5)
    xs = paths(base, normals(64, 1), grid, 1.0, 1)
    found = lean_adjoint(base, xs, grid, lambda x: a * x[:, 0])[..., 0]
    alpha, sigma = VP().alpha(grid), VP().sigma(grid)
    exact = -a * alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
    yield below("lean adjoint: largest standard deviation over paths", float(found.std(1).max()), 1e-12)
    yield below(
        "lean adjoint: distance from the continuous one, 1,600 steps", float((found[:, 0] - exact).abs().max()), 5e-3
    )
    for eta, start in ((1.0, None), (0.7, 0.5), (0.5, 0.5)):
        grid = uniform_grid(VP(), 2000, t_start=start, t_min=1e-5)
        first, std = law_at(VP(), grid[0])
        xs = paths(base, first + std * normals(8, 1), grid, eta, 3)
        shift = torch.zeros(2000, 1, dtype=F64)
        adjoint = lean_adjoint(base, xs, grid, lambda x: a * x[:, 0], eta=eta)
        best = Shifted(base, grid[:-1], shift - 2 * eta**2 / (1 + eta**2) * adjoint[1:, 0])
        loss = matching_loss(best, base, xs, adjoint, grid, eta=eta)
        yield below(f"eta {eta}: loss at the optimum, every path", float(loss.max()), 1e-20)
        ends = []
        for denoiser in (base, best):
            sde = sampler_sde(denoiser, grid, start=0.0, eta=eta)
            ends.append(float(affine_moments(sde, first * ONE, std**2 * torch.ones(1, 1, dtype=F64), 2001)[0]))
        share = 1 - remembered(VP(), eta, data_std=0.5, t=float(grid[0]))
        moved = (ends[1] - ends[0]) / (0.25 * a)
        yield within(f"eta {eta}: shift over the full one, {share:.4f} predicted", moved, share - 0.01, share + 0.01)


BARS = {1: schedules, 2: forward, 3: rao_blackwell, 4: orders, 5: likelihoods, 6: parity, 7: steering, 8: matching}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], BARS))
