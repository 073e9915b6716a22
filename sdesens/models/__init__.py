"""Models: problems ready to run, most with a known answer.

Each is a function of keyword arguments that returns a `Known`. `MODELS` names them as the command line does.
"""

from collections.abc import Callable

from sdesens.models.black_scholes import gbm_call, gbm_digital
from sdesens.models.brownian import brownian
from sdesens.models.cir import cir
from sdesens.models.gbm import gbm
from sdesens.models.heston import heston
from sdesens.models.known import Known
from sdesens.models.lotka_volterra import lotka_volterra
from sdesens.models.ou import ou
from sdesens.models.ou_nd import ou_nd
from sdesens.models.tbill import tbill
from sdesens.models.vasicek import vasicek

MODELS: dict[str, Callable[..., Known]] = {
    "brownian": brownian,
    "gbm": gbm,
    "gbm-call": gbm_call,
    "gbm-digital": gbm_digital,
    "ou": ou,
    "ou-nd": ou_nd,
    "vasicek": vasicek,
    "cir": cir,
    "heston": heston,
    "lotka-volterra": lotka_volterra,
    "tbill": tbill,
}

__all__ = [
    "MODELS",
    "Known",
    "brownian",
    "cir",
    "gbm",
    "gbm_call",
    "gbm_digital",
    "heston",
    "lotka_volterra",
    "ou",
    "ou_nd",
    "tbill",
    "vasicek",
]
