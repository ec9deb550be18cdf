"""The model on a GPU: where ops compute, what memory it takes, decoding in memory that was taken before.

The ops themselves are `refmoe.ops.cupy_ops`, the kernels and their steps `refmoe.ops.kernels`.
"""
