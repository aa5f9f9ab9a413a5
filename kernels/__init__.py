"""Triton kernels, one module an op. None has arrived yet."""
