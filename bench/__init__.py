"""Microbenchmarks: one module an op, one harness for all of them. `python -m bench --help`."""
