# SPDX-License-Identifier: Apache-2.0
"""Kernels on the CPU: CUDA text compiled by g++ behind `cuda.h`, launched on NumPy arrays as CuPy launches it."""
