"""Euler-Maruyama: one step.

    y_{n+1} = y_n + b(t_n, y_n) dt + sum_j s_j(t_n, y_n) dW^j_n                                  (1)

Ito; strong order 1/2 (1 for additive noise), weak order 1. Reference: G. Maruyama, Rend. Circ. Mat. Palermo 4 (1955) 48.
"""

from torch import Tensor

from sdesens.sde import SDE, Params, noise_product


def step(sde: SDE, p: Params, t: Tensor, dt: Tensor, y: Tensor, dW: Tensor) -> Tensor:
    """One step of equation (1).

    Parameters
    ----------
    t, dt : 0-dim tensors
        Left end and length of the step.
    y : Tensor, shape (B, *event)
    dW : Tensor, shape (B, m)
        Brownian increments over the step.

    Returns
    -------
    Tensor, shape (B, *event)
    """
    return y + sde.drift(t, y, p) * dt + noise_product(sde, sde.diffusion(t, y, p), dW)
