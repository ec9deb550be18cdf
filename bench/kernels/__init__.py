# SPDX-License-Identifier: Apache-2.0
"""Three small kernels as people write them, with a switch for a mistake in each: PyTorch, C++ on a CPU, Triton."""
