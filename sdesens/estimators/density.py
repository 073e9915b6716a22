"""Is a log density one, and that of the draws?

    E[grad log q] = 0,        E[h grad log q] = E[grad h]                                        (1)

The first holds for every density whose support does not move, the second where the draw has a derivative too, here for h = z.
Both are tested on draws, for densities that are not our own: a user's, or torch's.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from sdesens.estimators.model import with_graph
from sdesens.estimators.own import Own
from sdesens.estimators.probe import PROBE
from sdesens.estimators.run import Task, gradients
from sdesens.estimators.torch_law import TorchLaw

GROUPS, GROUP = 50, 40  # draws from which a density is judged
REPEATS = 0.01  # share of draws that may be one another's equals, by rounding
ALARM = 6.0  # of Student's t with 49 degrees of freedom: 2e-7 a coordinate


def density_fault(task: Task) -> str | None:
    """Why a density that is not our own cannot be used: its score must have mean zero, and fit the draw where that has a derivative."""
    q = task.question
    law = with_graph(q)  # sees which of its tensors depend on the parameters
    if not isinstance(law, Own | TorchLaw) or law.no_density() is not None:
        return None
    probe = replace(task, noise=PROBE)
    leaves = {k: v.detach().requires_grad_() for k, v in q.theta.items()}
    rows, seen = [], []
    with probe.generator(1), torch.enable_grad():
        for g in range(GROUPS):
            eps, extra = probe.normals(g * GROUP, GROUP)
            draws = probe.draws(leaves, eps, extra, q.x)
            z = draws.made()
            seen.append(z.detach())
            log_q = draws.log_prob(z.detach())
            tests = [log_q.mean()]
            if isinstance(law, Own) and law.reparameterised:
                h = draws.per_item(z)
                centred = (h - h.mean(0)).detach() * (GROUP / (GROUP - 1))
                tests.append((centred * log_q - h).mean())
            rows.append(torch.stack([torch.cat([g.flatten().double() for g in gradients(t, leaves)]) for t in tests]))
    if isinstance(law, TorchLaw) and not law.discrete and _repeats(torch.cat(seen)) > REPEATS:
        return "torch clamps draws of so extreme a law, and the density is not that of clamped draws"
    found = torch.stack(rows)  # (GROUPS, tests, P)
    spread = found.std(0) / math.sqrt(GROUPS)
    wrong = (found.mean(0).abs() > ALARM * spread + 1e-9 * found.abs().mean(0)).any(-1)
    if bool(wrong[0]):
        return (
            "`log_prob` is no log density of the draws, the mean of its gradient is not zero: it must have its normalising constant, as "
            "far as that depends on the parameters, and a support that does not"
        )
    return "`log_prob` does not belong to g(eps), their gradients of E[z] differ" if bool(wrong.any()) else None


def _repeats(z: Tensor) -> float:
    """Share of draws, in the component where it is largest, that have occurred before."""
    ordered = z.reshape(len(z), -1).sort(0).values
    return float((ordered.diff(dim=0) == 0).double().mean(0).max())
