"""Native arithmetic: NumPy at float32 or float64, with the machine's own matrix products. Bits depend on the machine.

`ops` is the arithmetic itself, `mkl_ops` the same over oneMKL; `lanes` and `slabs` spread work and place memory.
"""
