"""Diffusion models: the same idea at one time, x_t = alpha_t x_0 + sigma_t eps."""

from sdesens.diffusion.predict import Denoiser, Predictor, convert
from sdesens.diffusion.schedule import Schedule
from sdesens.diffusion.schedules import EDM, VE, VP, CondOT, Cosine, SubVP
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
    "convert",
    "guide",
]
