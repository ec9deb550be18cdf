# SPDX-License-Identifier: Apache-2.0
"""The tables of `elementary.py`, and the constants that bring an argument near to one of their entries.

The method and the layout follow Tang 1989 and 1990. Each comment names a real number and how it is rounded. Where a
number is stored in parts, the last part is the rest that the other parts leave, rounded to float64.
`tests/arithmetic/test_elementary.py` checks every value against Arb.
"""

from __future__ import annotations

import numpy as np

from refmoe.arithmetic.arrays import Array


def _table(text: str) -> Array:
    """[2, n]: leading parts and remainders, from pairs of hexadecimal floats."""
    return np.array([float.fromhex(word) for word in text.split()]).reshape(-1, 2).T.copy()


# fmt: off
STEPS_PER_LN2 = float.fromhex("0x1.71547652b82fep+4")  # 16 / ln 2
LN2_STEP_1 = float.fromhex("0x1.62e42fefap-5")  # ln 2 / 16 to a multiple of 2^-42: 38 bits, times 15 bits is exact
LN2_STEP_2 = float.fromhex("0x1.cf79abc9e3b3ap-44")  # the rest of ln 2 / 16
EXP_TABLE = _table("""
    0x1p+0 0x0p+0                          0x1.0b5587p+0 -0x1.833b784eb3a37p-27  0x1.172b84p+0 -0x1.c15742919041cp-27
    0x1.2387a7p+0 -0x1.8a9dc7993e052p-28   0x1.306fe08p+0 0x1.18db8a96f46adp-27  0x1.3dea65p+0 -0x1.f6e5eee525f6fp-27
    0x1.4bfdad8p+0 -0x1.64eaec715e343p-27  0x1.5ab07ep+0 -0x1.5bd5eb539b67fp-27  0x1.6a09e68p+0 -0x1.80c4336f74d05p-28
    0x1.7a1147p+0 0x1.f580c36bea881p-27    0x1.8ace54p+0 0x1.15506dadd3e2bp-27   0x1.9c4918p+0 0x1.51f8480e3e236p-27
    0x1.ae89f98p+0 0x1.5ad3ad5e8734dp-28   0x1.c199bep+0 -0x1.3d56b1eeef9a7p-27  0x1.d5818ep+0 -0x1.822dbc6d12fd3p-27
    0x1.ea4afap+0 0x1.52486cc2c7b9dp-27
""")  # 2^(j/16), j = 0 .. 15: rounded to 26 bits, and the rest

SQRT_HALF_BITS = 0x3FE6A09E667F3BCD  # of sqrt(1/2), rounded up
LN2_1 = float.fromhex("0x1.62e42fefa38p-1")  # ln 2 to a multiple of 2^-42: 42 bits, times 11 bits is exact
LN2_2 = float.fromhex("0x1.ef35793c7673p-45")  # the rest of ln 2
LOG_TABLE = _table("""
    0x1.522ae0738ap-2 0x1.ebe708164c759p-45   0x1.269621134ep-2 -0x1.1b61f10522625p-44
    0x1.f991c6cb3cp-3 -0x1.90d04cd7cc834p-44  0x1.a93ed3c8aep-3 -0x1.8724350562169p-45
    0x1.5bf406b544p-3 -0x1.27023eb68981cp-46  0x1.1178e8227ep-3 0x1.1ef78ce2d07f2p-45
    0x1.9335e5d594p-4 0x1.3115c3abd47dap-45   0x1.08598b59e4p-4 -0x1.7e5dd7009902cp-46
    0x1.0415d89e78p-5 -0x1.dddc7f461c516p-44  0x0p+0 0x0p+0
    -0x1.f829b0e78p-6 -0x1.980267c7e09e4p-45  -0x1.f0a30c0118p-5 0x1.d599e83368e91p-45
    -0x1.6f0d28ae58p-4 0x1.4b4641b664613p-44  -0x1.e27076e2bp-4 0x1.a342c2af0003cp-45
    -0x1.29552f82p-3 0x1.5b967f4471dfcp-44    -0x1.5ff3070a7ap-3 0x1.8586f183bebf2p-44
    -0x1.9525a9cf46p-3 0x1.297137d9f158fp-44  -0x1.c8ff7c79aap-3 0x1.7794f689f8434p-45
    -0x1.fb9186d5e4p-3 0x1.d572aab993c87p-47  -0x1.1675cababap-2 -0x1.8380e731f55c4p-44
    -0x1.2e8e2bae12p-2 0x1.67b1e99b72bd8p-45  -0x1.4618bc21c6p-2 0x1.3d82f484c84ccp-46
    -0x1.5d1bdbf581p-2 0x1.8d6bdc9c7c238p-44
""")  # log(32/i), i = 23 .. 45: to a multiple of 2^-42, and the rest

STEPS_PER_PI = float.fromhex("0x1.45f306dc9c883p+3")  # 32 / pi
STEPS_PER_PI_LOW = float.fromhex("-0x1.6b01ec5417056p-51")  # the rest of 32 / pi
PI_STEP = float.fromhex("0x1.921fb54442d18p-4"), float.fromhex("0x1.1a62633145c07p-58")  # pi / 32, and the rest

# pi / 32 again: five parts of at most 19 bits, whose products with 34 bits are exact, and the rest.
PI_STEP_PARTS = [float.fromhex(part) for part in (
    "0x1.921fcp-4", "-0x1.5777cp-25", "0x1.a308cp-45", "0x1.31318p-65", "0x1.8a2ep-85", "0x1.b839a252049c1p-108",
)]
_QUARTER = _table("""
    0x0p+0 0x0p+0                         0x1.917a6cp-4 -0x1.eb25ea0f138c7p-31   0x1.8f8b84p-3 -0x1.cb2cfaa4da337p-30
    0x1.294063p-2 -0x1.2a60fa574a369p-30  0x1.87de2a8p-2 -0x1.51569d2e59dbap-30  0x1.e2b5d38p-2 0x1.bd8ec78362475p-36
    0x1.1c73b38p-1 0x1.ae68c86c9774ap-29  0x1.44cf328p-1 -0x1.7b7114f3fc4afp-28  0x1.6a09e68p-1 -0x1.80c4336f74d05p-29
    0x1.8bc8068p-1 0x1.8a8ba05a743dap-28  0x1.a9b6628p-1 0x1.0ea1a3033ec62p-29   0x1.c38b2fp-1 0x1.80bdb0d23e9d1p-29
    0x1.d906bdp-1 -0x1.9ae573aea067cp-30  0x1.e9f4158p-1 -0x1.39d225a27d387p-29  0x1.f6297dp-1 -0x1.1469faa77a357p-34
    0x1.fd88dap-1 0x1.e89292cf04139p-28   0x1p+0 0x0p+0
""")  # sin(j pi / 32), j = 0 .. 16: rounded to 26 bits, and the rest
# fmt: on
_HALF = np.concatenate([_QUARTER, _QUARTER[:, -2:0:-1]], axis=1)
SIN_TABLE = np.concatenate([_HALF, 0.0 - _HALF], axis=1)  # the whole circle: j = 0 .. 63, [2, 64]
