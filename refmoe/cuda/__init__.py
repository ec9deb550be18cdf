# SPDX-License-Identifier: Apache-2.0
"""The model on a GPU: ops, kernels, the memory that a model needs, and decoding in preallocated memory.

`place` chooses between CPU and GPU. `cupy_ops` has the ops, `kernels` the CUDA kernels, and `refmoe.steps.cuda` the
steps of the model over them.
"""
