"""What a recipe can say of the machine that it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class Compute:
    """On what.

    Args:
        accelerator: "auto", "cpu", "cuda", "mps".
        devices: how many on this machine.
        nodes: machines; `torchrun` starts the processes then.
        precision: "32", "bf16", "16"; of training, validation and evaluation.
        compile: the student and the teacher by torch.compile.
        sync_batchnorm: batch norm over all processes' images.
        workers: processes that read. A prepared data set wants none.
        log_every: steps between lines of the log.
        checkpoint_every: steps between checkpoints; after every epoch if it is left out.
        checkpoints: write them. Without, an interrupted stage starts again.
        loggers: beside the CSV files, which are always written: "tensorboard", "wandb", "mlflow", through Lightning's
            loggers; ["csv"] for none of them. TensorBoard, where it is installed, if it is left out.
        stages: folder of stages that runs share, all but the student's; not shared if it is left out.
    """

    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = 1
    nodes: int = 1
    precision: Literal["32", "bf16", "16"] = "32"
    compile: bool = False
    sync_batchnorm: bool = False
    workers: int = 0
    log_every: int = 50
    checkpoint_every: int | None = None
    checkpoints: bool = True
    loggers: list[Literal["csv", "tensorboard", "wandb", "mlflow"]] | None = None
    stages: str | None = None
