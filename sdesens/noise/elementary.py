"""The elementary functions of the Box-Muller transform, written out for fused kernels.

A library's log, cos and sin are calls out of a fused loop; a polynomial stays inside it. Inputs are Philox words: s is a
signed 32-bit integer, and

    uniform       u = (s + 1/2) / 2^32 mod 1,                                                    (1)
    log           u = m 2^k,  sqrt(1/2) <= m < sqrt(2),  w = (m - 1) / (m + 1),
                  log m = 2 artanh w = 2 w (1 + w^2/3 + w^4/5 + ...),                            (2)
    cos and sin   2 pi (s + 1/2) / 2^32 = q pi/2 + x,  |x| <= pi/4,  polynomials in x.           (3)

The quarter turn q and the rest of the angle are cut out in integers, so nothing is lost. Each result is within 3 units of
the last place of the largest value near by; the tests compare with extended precision.

Coefficients: float64, the minimax polynomials of Sun's fdlibm (k_sin.c, k_cos.c); float32, of the Cephes library (sinf.c) and
of fdlibm's e_logf.c.
"""

import math

import torch
from torch import Tensor

RADIANS = 2.0**-32 * 2.0 * math.pi

SIN = {
    torch.float64: (-1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04,
                    2.75573137070700676789e-06, -2.50507602534068634195e-08, 1.58969099521155010221e-10),
    torch.float32: (-1.6666654611e-1, 8.3321608736e-3, -1.9515295891e-4),
}  # fmt: skip
COS = {
    torch.float64: (4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05,
                    -2.75573143513906633035e-07, 2.08757232129817482790e-09, -1.13596475577881948265e-11),
    torch.float32: (4.166664568298827e-2, -1.388731625493765e-3, 2.443315711809948e-5),
}  # fmt: skip
LOG = (0.66666662693, 0.40000972152, 0.28498786688, 0.24279078841)
LN2_HIGH, LN2_LOW = 6.9313812256e-01, 9.0580006145e-06  # the high part times a small integer is exact in float32
SQRT_HALF_BITS = 0x3F3504F3  # of float32
NEAR_ONE = -1257966797  # sqrt(1/2) - 1, in units of 2^-32


def uniform(s: Tensor) -> Tensor:
    """Equation (1), exactly, in float64."""
    u = s.double() * 2.0**-32 + 2.0**-33
    return u - torch.floor(u)


def minus_two_log(s: Tensor, dtype: torch.dtype) -> Tensor:
    """-2 log u for an int32 word, equations (1) and (2)."""
    if dtype != torch.float32:
        return -2.0 * torch.log(uniform(s))
    offset = s.float() * 2.0**-32 + 2.0**-33  # u, or u - 1 where s < 0: rounded once, however near 1 u is
    near_one = (s < 0) & (s >= NEAR_ONE)
    bits = torch.where(s < 0, offset + 1.0, offset).view(torch.int32)
    k = (bits - SQRT_HALF_BITS) >> 23
    m = (bits - (k << 23)).view(torch.float32)
    f = torch.where(near_one, offset, m - 1.0)
    exponent = torch.where(near_one, 0.0, k.float())
    w = f / (2.0 + f)
    half = 0.5 * f * f
    tail = w * (half + w * w * _polynomial(w * w, LOG)) + exponent * LN2_LOW  # 2 artanh w = f - half + w (half + ...)
    return -2.0 * (exponent * LN2_HIGH - ((half - tail) - f))


def cos_sin(s: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi (s + 1/2) / 2^32 for an int32 word, equation (3)."""
    q = ((s >> 29) + 1) >> 1  # nearest quarter turn, -2 ... 2
    x = ((s - (q << 30)).to(dtype) + 0.5) * RADIANS
    z = x * x
    sin = x + x * z * _polynomial(z, SIN[dtype])
    cos = 1.0 - (0.5 * z - z * z * _polynomial(z, COS[dtype]))
    turn = q.to(dtype)
    size = turn.abs()
    even, odd = 1.0 - size, size * (2.0 - size) * turn  # one of the two is 0, the other +-1: no branch, no mask
    return even * cos - odd * sin, even * sin + odd * cos


def _polynomial(z: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = coefficients[-2] + z * coefficients[-1]
    for c in coefficients[-3::-1]:
        value = c + z * value
    return value
