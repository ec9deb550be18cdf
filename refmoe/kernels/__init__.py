# SPDX-License-Identifier: Apache-2.0
"""The contracts of kernels: laws by which anybody's mixture of experts, dispatch plan or attention can be tested.

`docs/kernel-contract.md` is the manual, and `refmoe.testing` makes pytest classes of the laws.

    moe         x [T, D], w_gate, w_up [E, F, D], w_down [E, D, F], ids [T, k], weights [T, k] -> y [T, D]
    plan        ids [T, k] -> the order in which slots are given to the experts
    attention   q [S, H, C] over pages of keys and values -> out [S, H, C]
"""
