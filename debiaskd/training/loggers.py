"""Send metrics to TensorBoard, Weights & Biases and MLflow (`compute.loggers`), through Lightning's loggers.

One experiment for each stage that trains a network, named RUN/STAGE. `train/…` are losses, learning rate and speed
every `compute.log_every` steps, `validation/…` the metrics of an epoch. Where a training resumes, steps that were sent
before are not sent again. Only the first rank sends.

Weights & Biases and MLflow are configured by their environment variables: WANDB_PROJECT, WANDB_MODE,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, …; without MLFLOW_TRACKING_URI, MLflow writes RUN/STAGE/mlflow.db.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from debiaskd.recipe import Compute, RecipeError
from debiaskd.utils import files

#: Names of experiments in a stage's folder, for resuming.
IDS = "loggers.json"
#: Where nothing else says so.
PROJECT = "debiaskd"
#: Modules that each logger imports, and what installs them.
_NEEDED = {
    "csv": (),
    "tensorboard": (("tensorboard", "tensorboard"),),
    "wandb": (("pytorch_lightning", "lightning"), ("wandb", "wandb")),
    "mlflow": (("pytorch_lightning", "lightning"), ("mlflow", "mlflow")),
}


def wanted(compute: Compute) -> list[str]:
    """The loggers of a recipe beside the CSV files, which are always written.

    Raises:
        RecipeError: one is not installed; says what installs it.
    """
    if compute.loggers is None:
        return ["tensorboard"] if find_spec("tensorboard") is not None else []
    for name in compute.loggers:
        missing = [package for module, package in _NEEDED[name] if find_spec(module) is None]
        if missing:
            what = " and ".join(missing)
            raise RecipeError(f"compute.loggers: {name} needs {what}: pip install {' '.join(missing)}")
    return [name for name in compute.loggers if name != "csv"]


class Loggers:
    """The loggers of one stage's training.

    Args:
        names: any of "tensorboard", "wandb", "mlflow".
        folder: of the stage.
        config: the recipe, which is shown beside the metrics.
        step: training resumes behind it.
        sent: the last step that was sent before, by section; later ones are sent. To TensorBoard all are written
            again, in place of the old ones.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, config: Mapping[str, Any], step: int, sent: Mapping[str, int]
    ) -> None:
        self.sent = sent
        self._ids: dict[str, str] = {}
        if not names:
            return
        self._ids = files.read_json(folder / IDS) or {}
        before = dict(self._ids)
        makers = {"tensorboard": self._tensorboard, "wandb": self._wandb, "mlflow": self._mlflow}
        self.made = {name: makers[name](folder, step) for name in names}
        if self._ids != before:
            files.write_json(folder / IDS, self._ids)
        for name, logger in self.made.items():
            if name != "tensorboard" and name not in before and config:
                logger.log_hyperparams({"stage": folder.name, **config})

    made: Mapping[str, Any] = {}

    def log(self, section: str, step: int, row: Mapping[str, Any]) -> None:
        """Send the numbers of a row, as "SECTION/NAME"."""
        numbers = {f"{section}/{name}": value for name, value in row.items() if isinstance(value, (int, float))}
        for name, logger in self.made.items():
            if name == "tensorboard" or step > self.sent.get(section, -1):
                logger.log_metrics(numbers, step=step)

    def close(self) -> None:
        """Send what is left, and end the experiments."""
        for name, logger in self.made.items():
            logger.finalize("success")
            if name == "wandb":
                logger.experiment.finish()

    def _tensorboard(self, folder: Path, step: int) -> Any:
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger

        made = TensorBoardLogger(folder, name="tensorboard", version="", purge_step=step + 1)
        _ = made.experiment  # the old rows are purged even if there are no new ones
        return made

    def _wandb(self, folder: Path, step: int) -> Any:
        from pytorch_lightning.loggers import WandbLogger

        self._ids.setdefault("wandb", uuid.uuid4().hex[:12])
        return WandbLogger(
            name=_name(folder),
            id=self._ids["wandb"],
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            save_dir=os.environ.get("WANDB_DIR", str(folder)),
        )

    def _mlflow(self, folder: Path, step: int) -> Any:
        from pytorch_lightning.loggers import MLFlowLogger

        made = MLFlowLogger(
            os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
            run_name=_name(folder),
            tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder.resolve() / 'mlflow.db'}"),
            run_id=self._ids.get("mlflow"),
        )
        self._ids["mlflow"] = str(made.run_id)
        return made


def _name(folder: Path) -> str:
    """Of an experiment: RUN/STAGE."""
    return f"{folder.resolve().parent.name}/{folder.name}"
