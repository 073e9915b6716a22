"""Pictures, each a function that takes and returns matplotlib Axes.

Readable in black and white: lines differ in style and markers, not in colour alone. matplotlib is an optional extra and is
imported when the first picture is drawn.
"""

from sdesens.plot.common import check_file
from sdesens.plot.curves import coefficients, family, roughness
from sdesens.plot.diffusion import couplings, sampler_errors, schedules
from sdesens.plot.estimators import comparison, estimates, study_report, variance_study
from sdesens.plot.problems import costs, refinement, report, sample_paths
from sdesens.plot.series import band, fitted_series

__all__ = [
    "band", "check_file", "coefficients", "comparison", "costs", "couplings", "estimates", "family", "fitted_series", "refinement",
    "report", "roughness", "sample_paths", "sampler_errors", "schedules", "study_report", "variance_study",
]  # fmt: skip
