"""Diffusion models: the same idea at one time, x_t = alpha_t x_0 + sigma_t eps."""

from sdesens.diffusion.chain import sampler_sde
from sdesens.diffusion.grids import edm_grid, log_snr_grid, uniform_grid
from sdesens.diffusion.moments import affine_moments
from sdesens.diffusion.predict import Denoiser, Predictor, convert
from sdesens.diffusion.samplers import ancestral, ddim, dpmpp_2m, euler_maruyama, heun, prior, walk
from sdesens.diffusion.schedule import Schedule
from sdesens.diffusion.schedules import EDM, VE, VP, CondOT, Cosine, SubVP
from sdesens.diffusion.sensitivity import sampler_problem
from sdesens.diffusion.steps import ddim_step, dpmpp_2m_step, heun_step
from sdesens.diffusion.tables import Discrete, LogSNR, Table
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
    "Guided",
    "LogSNR",
    "Predictor",
    "Schedule",
    "SubVP",
    "Table",
    "affine_moments",
    "ancestral",
    "convert",
    "ddim",
    "ddim_step",
    "dpmpp_2m",
    "dpmpp_2m_step",
    "edm_grid",
    "euler_maruyama",
    "guide",
    "heun",
    "heun_step",
    "log_snr_grid",
    "prior",
    "sampler_problem",
    "sampler_sde",
    "uniform_grid",
    "walk",
]
