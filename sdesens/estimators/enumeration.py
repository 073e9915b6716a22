"""Enumeration: where a law has few values, the expectation is a sum and nothing is sampled.

    E[f] = sum_s q(s; p) f(s, p),   differentiated as it stands.                                 (1)

A draw of C independent components with S values each has S^C values.
"""

import torch
from torch import Tensor

from sdesens.estimators.discrete import Bernoulli, Categorical
from sdesens.estimators.draws import Draws, Surrogate
from sdesens.estimators.laws import Law
from sdesens.estimators.torch_law import TorchLaw

MAX_STATES = 4096


def enumerate_states(draws: Draws) -> Surrogate:
    """Equation (1): one row, whatever the draws."""
    support = values_of_component(draws.law)
    assert support is not None  # `too_large` was asked
    batch, event = components(draws.law), support.shape[1:]
    item = batch[(draws.x is not None) :]  # components of one item
    count = item.numel()
    index = torch.cartesian_prod(*[torch.arange(len(support), device=support.device)] * count).reshape(-1, count)
    states = support.to(draws.eps.dtype)[index].reshape(-1, *item, *event)
    if draws.x is not None:
        states = states[:, None].expand(-1, batch[0], *states.shape[1:])
    law = draws.law
    q = law.prob(states) if isinstance(law, Bernoulli | Categorical) else law.log_prob(states).exp()
    q = q.reshape(*q.shape[: 1 if draws.x is None else 2], -1).prod(-1)  # of independent components
    q = q[:, None] if draws.x is None else q
    values = draws.value(states)
    mean = (q * values).sum(0, keepdim=True)
    return Surrogate(mean.detach(), mean)


def values_of_component(law: Law) -> Tensor | None:
    """The values that one component can take, shape (S, *event); None if they are not few."""
    return law.support() if isinstance(law, Bernoulli | Categorical | TorchLaw) else None


def components(law: Law) -> torch.Size:
    """Shape of the independent components of a draw, items first."""
    if isinstance(law, TorchLaw):
        return law.distribution.batch_shape
    assert isinstance(law, Bernoulli | Categorical)
    return torch.Size(law.shape if isinstance(law, Bernoulli) else law.shape[:-1])


def states(law: Law, with_items: bool) -> int:
    """How many values a draw (of one item) has."""
    support = values_of_component(law)
    assert support is not None
    return len(support) ** components(law)[with_items:].numel()


def too_large(law: Law, with_items: bool, max_states: int = MAX_STATES) -> str | None:
    """Why (1) cannot be used."""
    support = values_of_component(law)
    if support is None:
        return "its values cannot be enumerated"
    count = states(law, with_items)
    if count > max_states:
        return f"a draw has {count} values, more than max_states = {max_states}"
    return None
