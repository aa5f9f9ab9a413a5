"""Write the logs of a stage, on the first rank only.

log.csv      every so many steps: losses, learning rate. The same for the same recipe, interrupted or not
epochs.csv   validation metrics. Likewise
speed.csv    images per second, which differs between runs
tensorboard/ the same for TensorBoard, if it is installed; see `debiaskd.training.loggers`
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from debiaskd.training.loggers import Loggers
from debiaskd.utils import files


class Table:
    """A CSV file whose first column increases. Resuming removes the rows after the checkpoint.

    A row is on the disk once `append` returns; an incomplete last line is ignored.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] | None = None

    def resume(self, last: int) -> int:
        """Keep the rows up to the one numbered `last`; -1: none. Return the number of the last row that there was, -1
        for none."""
        if not self.path.exists():
            return -1
        whole = self.path.read_text(encoding="utf-8").rpartition("\n")[0]
        lines = whole.split("\n") if whole else []
        kept = lines[:1] + [line for line in lines[1:] if int(line.partition(",")[0]) <= last]
        self.columns = next(csv.reader(kept[:1]), None) if len(kept) > 1 else None
        if self.columns is None:
            self.path.unlink()
        else:
            files.write_text(self.path, "\n".join(kept) + "\n")
        return max((int(line.partition(",")[0]) for line in lines[1:]), default=-1)

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row; columns of terms that start later are empty in earlier rows."""
        if self.columns is None or any(name not in self.columns for name in row):
            self._widen([*(self.columns or []), *(name for name in row if name not in (self.columns or []))])
        assert self.columns is not None
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow([_text(row.get(name)) for name in self.columns])

    def _widen(self, columns: list[str]) -> None:
        rows = self.path.read_text(encoding="utf-8").splitlines()[1:] if self.columns else []
        more = "," * (len(columns) - len(self.columns or []))
        self.columns = columns
        files.write_text(self.path, "".join(line + "\n" for line in [",".join(columns), *(row + more for row in rows)]))


def read_table(path: Path) -> list[dict[str, float | None]]:
    """The rows that `Table` wrote, by column; None where a column began later. No rows if there is no such file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except FileNotFoundError:
        return []
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    if any(len(row) != len(rows[0]) for row in rows):
        raise ValueError(f"{path}: damaged, a line of it is not whole")
    try:
        return [{name: float(text) if text else None for name, text in zip(rows[0], row)} for row in rows[1:]]
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error})") from None


def _text(value: Any) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


class Logs:
    """The log files in a stage's folder, and the loggers that get the same.

    Args:
        folder: of the stage.
        on: False for all ranks but the first.
        loggers: names of `debiaskd.training.loggers`.
        config: the recipe, for the loggers.
    """

    def __init__(
        self, folder: Path, on: bool, loggers: Sequence[str] = (), config: Mapping[str, Any] | None = None
    ) -> None:
        self.folder, self.on = folder, on
        self.steps, self.epochs = Table(folder / "log.csv"), Table(folder / "epochs.csv")
        self.speed = Table(folder / "speed.csv")
        self.names, self.config = tuple(loggers), config or {}
        self.loggers: Loggers | None = None

    def resume(self, step: int, epoch: int, steps: int = 1) -> None:
        """Continue after the given step and epoch; 0 and -1: from the start. An epoch has `steps` steps."""
        if not self.on:
            return
        sent = {"train": self.steps.resume(step), "validation": (self.epochs.resume(epoch) + 1) * steps}
        self.speed.resume(step)
        self.loggers = Loggers(self.names, self.folder, self.config, step, sent)

    def step(self, step: int, row: Mapping[str, float], images_per_second: float) -> None:
        if self.on:
            self.steps.append({"step": step, **row})
            self.speed.append({"step": step, "images_per_second": round(images_per_second, 2)})
            self._send("train", step, {**row, "images_per_second": images_per_second})

    def epoch(self, epoch: int, step: int, row: Mapping[str, float]) -> None:
        if self.on:
            self.epochs.append({"epoch": epoch, **row})
            self._send("validation", step, row)

    def _send(self, section: str, step: int, row: Mapping[str, Any]) -> None:
        if self.loggers is not None:
            self.loggers.log(section, step, {name: value for name, value in row.items() if name != "epoch"})

    def close(self) -> None:
        if self.loggers is not None:
            self.loggers.close()
