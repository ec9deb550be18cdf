"""The model on a GPU: where ops compute, what memory it takes, decoding in memory that was taken before.

The ops themselves are `refmoe.cuda.cupy_ops`, the kernels and their steps `refmoe.cuda.kernels`.
"""
