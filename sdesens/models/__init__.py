"""Models: problems ready to run, most with a known answer.

Each is a function of keyword arguments that returns a `Known`. `MODELS` names them as the command line does.
"""

from collections.abc import Callable

from sdesens.models.asian import asian
from sdesens.models.barrier import barrier
from sdesens.models.basket import basket
from sdesens.models.black_scholes import gbm_call, gbm_digital
from sdesens.models.brownian import brownian
from sdesens.models.cir import cir
from sdesens.models.cir_lamperti import cir_lamperti
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
    "call": gbm_call,
    "digital": gbm_digital,
    "barrier": barrier,
    "asian": asian,
    "basket": basket,
    "ou": ou,
    "ou-nd": ou_nd,
    "vasicek": vasicek,
    "cir": cir,
    "cir-lamperti": cir_lamperti,
    "heston": heston,
    "lotka-volterra": lotka_volterra,
    "tbill": tbill,
}

__all__ = [
    "MODELS",
    "Known",
    "asian",
    "barrier",
    "basket",
    "brownian",
    "cir",
    "cir_lamperti",
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
