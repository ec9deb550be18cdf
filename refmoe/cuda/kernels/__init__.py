# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels as text, and the descriptions by which the host launches them. The only array library used is NumPy."""
