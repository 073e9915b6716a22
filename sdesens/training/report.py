"""The report at the end of training: RUN/report.json, RUN/report.png, RUN/samples.npz, and a table."""

import json

from rich.table import Column, Table

from sdesens.errors import ArgumentError
from sdesens.training.data import Data, data_of
from sdesens.training.files import whole_file
from sdesens.training.floors import training_floors
from sdesens.training.log import read_log
from sdesens.training.pictures import save_report
from sdesens.training.run import Run
from sdesens.training.samples import draw_samples
from sdesens.training.scores import Report, score

MOST_SAMPLES = 4000


def make_report(run: Run, data: Data | None = None, *, seed: int = 1, likelihood: bool = True) -> Report:
    """Sample the trained model, score it, and write the files.

    Parameters
    ----------
    run : Run
    data : Data, optional
        Loaded by the run's name for them if left out.
    seed : int
        Of the samples.
    likelihood : bool
        Whether to compute the likelihood of test rows.

    Raises
    ------
    CheckpointError, ArgumentError
        If there is no checkpoint; if the data are not those of the run, or files cannot be written.
    """
    if run.steered:
        raise ArgumentError(
            f"{str(run.path)!r} was steered away from its data, which its samples would be judged by: steer.json has its report."
        )
    data = data_of(run.config) if data is None else data
    if data.form != run.form:
        raise ArgumentError(f"{run.config.data!r} is not what {str(run.path)!r} was trained on: its rows have changed.")
    denoiser = run.denoiser()
    n = min(MOST_SAMPLES, len(data.train))
    samples = draw_samples(denoiser, run.form, n, seed=seed)
    report = score(denoiser, data, samples, likelihood=likelihood)
    samples.save(run.path / "samples.npz", run.form)
    with whole_file(run.path / "report.json") as part:
        part.write_text(json.dumps(report.to_json(), indent=2) + "\n")
    save_report(report, data, read_log(run.path), training_floors(run.config, data), run.path / "report.png")
    return report


def table(report: Report) -> Table:
    """The scores, each beside its floor."""
    found = Table(
        Column("score", no_wrap=True),
        "value",
        "real rows, or best",
        "good is",
        "remark",
        title=f"{len(report.samples.x)} samples",
        title_justify="left",
    )
    for s in report.scores:
        error = "" if s.standard_error is None else f" +/- {s.standard_error:.2g}"
        found.add_row(s.name, f"{s.value:.4g}{error}", "" if s.floor is None else f"{s.floor:.4g}", s.better, s.note)
    return found


def level_table(report: Report) -> Table:
    """The eps-loss at each log-SNR."""
    names = list(report.levels[0].floors)
    found = Table("log-SNR", "eps-loss, test", "train", *(f"{name} floor" for name in names))
    for level in report.levels:
        values = (level.test, level.train, *level.floors.values())
        found.add_row(f"{level.log_snr:g}", *(f"{v:.4g}" for v in values))
    return found
