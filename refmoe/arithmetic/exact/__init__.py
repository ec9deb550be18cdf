# SPDX-License-Identifier: Apache-2.0
"""Exact arithmetic: correctly rounded sums and products, and elementary functions with fixed bits.

`ops` is the arithmetic itself. `dot` computes sums and products (with `slices`, `prepared_weight`, `double_double`;
`few` where values are few). `elementary` computes exp, log, cos and sin.
"""
