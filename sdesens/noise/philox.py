"""Philox4x32-10: a random function of a counter, in plain torch integer operations.

    (x0, x1, x2, x3) -> (hi(M1 x2) ^ x1 ^ k0,  lo(M1 x2),  hi(M0 x0) ^ x3 ^ k1,  lo(M0 x0)),   ten rounds,
    (k0, k1) -> (k0 + W0, k1 + W1) between rounds.                                              (1)

A 32-bit word lives in the low half of an int64, because torch has no full set of unsigned operations. The high half
may hold rubbish between rounds: only the two factors of a product are masked. An int64 product of two 32-bit words
wraps, but its 64 bits are the right ones; an arithmetic shift drags sign bits into the high half only.

Reference: J. Salmon, M. Moraes, R. Dror, D. Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011. The tests hold
its published known-answer vectors. This file knows nothing of normals, paths or steps.
"""

import torch
from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, ...]:
    """Four 32-bit words from a 128-bit counter and a 64-bit key, equation (1).

    Parameters
    ----------
    counter : four int64 tensors of shapes that broadcast, each read modulo 2^32
    key : two integers or 0-dim int64 tensors, each read modulo 2^32

    Returns
    -------
    Four int32 tensors of the broadcast shape: the words, reinterpreted as signed.

    Example
    -------
    >>> zero = torch.zeros((), dtype=torch.int64)
    >>> [hex(int(w) & MASK) for w in philox4x32((zero, zero, zero, zero), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    x0, x1, x2, x3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        low, high = (x0 & MASK).mul_(M0), (x2 & MASK).mul_(M1)
        x0 = (high >> 32).bitwise_xor_(x1).bitwise_xor_(k0 & MASK)
        x2 = (low >> 32).bitwise_xor_(x3).bitwise_xor_(k1 & MASK)
        x1, x3 = high, low
        k0, k1 = k0 + W0, k1 + W1
    return tuple(x.to(torch.int32) for x in (x0, x1, x2, x3))
