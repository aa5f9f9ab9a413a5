"""What a script or a notebook calls: `train`, `load`, `pack`, and the `Run` that they give."""

from debiaskd.api.finished import Explanations, Run, load
from debiaskd.api.train import pack, train

__all__ = ["Explanations", "Run", "load", "pack", "train"]
