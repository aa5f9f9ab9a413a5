"""Triton kernels, one module an op: the twins of csrc/cuda, for every device that Triton knows.

Each module holds the kernels and, under the names and with the signatures of csrc/schema.cpp, the functions that launch
them; `launch`, `layout`, `precision` and `sums` are what they share. `library` registers those functions with PyTorch
as `torch.ops.debiaskd_triton.<name>`. Importing this package imports no Triton; `debiaskd.ops.backend` imports
`library` where the kernels can run.
"""
