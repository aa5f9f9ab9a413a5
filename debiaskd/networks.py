"""The import path that version 0.1.0 had for `debiaskd.models.registry`, kept for scripts that use it."""

from debiaskd.models.registry import NetworkError, build, load_weights, save_weights, weights_file, weights_hash

__all__ = ["NetworkError", "build", "load_weights", "save_weights", "weights_file", "weights_hash"]
