"""Exact arithmetic: correctly rounded sums and products, and elementary functions with fixed bits.

`ops` is the arithmetic itself. `dot` and `slices` hold sums and products, `elementary` exp, log, cos and sin.
"""
