"""CUDA kernels as text, and what the host must know to launch them. No array library is imported here but NumPy."""
