# SPDX-License-Identifier: Apache-2.0
"""Native arithmetic: NumPy at float32 or float64, with the machine's own matrix products. Bits depend on the machine.

`ops` is the arithmetic itself, `mkl_ops` its variant over oneMKL. `lanes` spreads work over threads, `slabs` places
matrices in memory.
"""
