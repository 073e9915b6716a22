"""Diffusion models: the same idea at one time, x_t = alpha_t x_0 + sigma_t eps, tied to the SDE with those marginals."""

from sdesens.diffusion.adjoint_matching import adjoint_matching_loss, lean_adjoint, matching_loss, remembered
from sdesens.diffusion.bridges import from_diffusers, to_diffusers, wrap_unet
from sdesens.diffusion.chain import sampler_sde
from sdesens.diffusion.conversions import convert
from sdesens.diffusion.dequantise import bits_per_dim, dequantise
from sdesens.diffusion.draws import draw_noise, draw_uniforms, keep_label, lognormal_times, uniform_times
from sdesens.diffusion.grids import edm_grid, log_snr_grid, uniform_grid
from sdesens.diffusion.likelihood import LogProb, log_prob
from sdesens.diffusion.losses import dsm_loss, prior_term, step_cost, vlb
from sdesens.diffusion.metrics import frechet, mmd2, mode_coverage, nn_ratio, sliced_w2
from sdesens.diffusion.moments import affine_moments
from sdesens.diffusion.one_draw import draw_problem, path_problem
from sdesens.diffusion.oracles import Empirical, Gaussian, GaussianMixture
from sdesens.diffusion.predict import Denoiser, Predictor
from sdesens.diffusion.preserving import VP, Cosine, SubVP
from sdesens.diffusion.samplers import ancestral, ddim, dpmpp_2m, euler_maruyama, heun, prior
from sdesens.diffusion.schedule import Schedule
from sdesens.diffusion.scheduler_view import SchedulerView
from sdesens.diffusion.schedules import EDM, VE, CondOT
from sdesens.diffusion.sensitivity import sampler_problem
from sdesens.diffusion.steps import ddim_step, dpmpp_2m_step, heun_step
from sdesens.diffusion.tables import Discrete, LogSNR, Table
from sdesens.diffusion.walk import walk
from sdesens.diffusion.weights import edm_weight, likelihood_weight, min_snr_weight, simple_weight, weight_on
from sdesens.diffusion.wrappers import Clipped, Guided, guide

__all__ = [
    "EDM",
    "VE",
    "VP",
    "Clipped",
    "CondOT",
    "Cosine",
    "Denoiser",
    "Discrete",
    "Empirical",
    "Gaussian",
    "GaussianMixture",
    "Guided",
    "LogProb",
    "LogSNR",
    "Predictor",
    "Schedule",
    "SchedulerView",
    "SubVP",
    "Table",
    "adjoint_matching_loss",
    "affine_moments",
    "ancestral",
    "bits_per_dim",
    "convert",
    "ddim",
    "ddim_step",
    "dequantise",
    "dpmpp_2m",
    "dpmpp_2m_step",
    "draw_noise",
    "draw_problem",
    "draw_uniforms",
    "dsm_loss",
    "edm_grid",
    "edm_weight",
    "euler_maruyama",
    "frechet",
    "from_diffusers",
    "guide",
    "heun",
    "heun_step",
    "keep_label",
    "lean_adjoint",
    "likelihood_weight",
    "log_prob",
    "log_snr_grid",
    "lognormal_times",
    "matching_loss",
    "min_snr_weight",
    "mmd2",
    "mode_coverage",
    "nn_ratio",
    "path_problem",
    "prior",
    "prior_term",
    "remembered",
    "sampler_problem",
    "sampler_sde",
    "simple_weight",
    "sliced_w2",
    "step_cost",
    "to_diffusers",
    "uniform_grid",
    "uniform_times",
    "vlb",
    "walk",
    "weight_on",
    "wrap_unet",
]
