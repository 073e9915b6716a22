"""Training of diffusion models: data, networks, a trainer that resumes to the bit, samples, scores and steering."""

from sdesens.training.batches import Batch, Batches, training_times
from sdesens.training.checkpoint import (
    checkpoints,
    load_best,
    load_checkpoint,
    load_latest,
    load_weights,
    save_checkpoint,
)
from sdesens.training.config import TrainConfig, recipe
from sdesens.training.data import Data, Form, load_data
from sdesens.training.floors import floors, training_floors
from sdesens.training.log import read_log
from sdesens.training.model import batch_loss, loss_weight, make_denoiser, network_of
from sdesens.training.networks import make_network
from sdesens.training.ranks import Ranks, join
from sdesens.training.report import make_report
from sdesens.training.run import Run, open_run
from sdesens.training.samples import Samples, draw_samples, sampler_grid
from sdesens.training.scores import Report, Score, score
from sdesens.training.snapshot import Snapshot
from sdesens.training.steer import steer
from sdesens.training.steer_objective import LinearReward, Sampling, objective_problem, steering_grid
from sdesens.training.steer_report import Derivatives, Steered, derivatives, moments, predicted, tilted
from sdesens.training.steer_run import Outcome, steer_run
from sdesens.training.train import train
from sdesens.training.trainer import Trainer

__all__ = [
    "Batch", "Batches", "Data", "Derivatives", "Form", "LinearReward", "Outcome", "Ranks", "Report", "Run", "Samples", "Sampling", "Score",
    "Snapshot", "Steered", "TrainConfig", "Trainer", "batch_loss", "checkpoints", "derivatives", "draw_samples", "floors", "join",
    "load_best", "load_checkpoint", "load_data", "load_latest", "load_weights", "loss_weight", "make_denoiser", "make_network",
    "make_report", "moments", "network_of", "objective_problem", "open_run", "predicted", "read_log", "recipe", "sampler_grid",
    "save_checkpoint", "score", "steer", "steer_run", "steering_grid", "tilted", "train", "training_floors", "training_times",
]  # fmt: skip
