"""A finished run, as a script or a notebook reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from debiaskd.models.own import GIVEN, give, given_name

if TYPE_CHECKING:
    from debiaskd.evaluation.pretrained import Pretrained
    from debiaskd.recipe import Recipe


class Run:
    """A finished run.

    In a notebook it shows itself: its figures, and where its student looks.

    Args:
        folder: of the run.
        student, teacher: the modules that were given to `train`, if any were and this is another process.

    Attributes:
        folder: where everything lies.
        recipe: what was trained, with every default.

    Raises:
        RunError: no run's folder, one that is not finished, or another module than was trained.

    Example:
        >>> import debiaskd as dk
        >>> run = dk.load("runs/waterbirds_dett")  # doctest: +SKIP
        >>> run.metrics["worst_group_accuracy"], run.evaluate("test")["worst_group_accuracy"]  # doctest: +SKIP
        (0.86, 0.84)
    """

    def __init__(
        self, folder: Path | str, *, student: nn.Module | None = None, teacher: nn.Module | None = None
    ) -> None:
        from debiaskd.training.run import finished, open_run

        self.folder = Path(folder)
        self.recipe: Recipe = open_run(self.folder)
        self._stage = finished(self.folder, "student")
        self._given = {"student": student, "teacher": teacher}
        self._check_given()

    def _check_given(self) -> None:
        from debiaskd.training.run import RunError

        for key, module in self._given.items():
            network = getattr(self.recipe, key)
            if module is None:
                continue
            if network is None or not network.name.startswith(GIVEN):
                what = "has none" if network is None else f"is {network.name}, which needs no module"
                raise RunError(f"{self.folder}: its {key} {what}")
            if given_name(module) != network.name:
                raise RunError(f"{self.folder}: its {key} must be {network.name}, got {given_name(module)}")

    @contextmanager
    def _modules(self) -> Iterator[None]:
        """Modules that were given can be built while this lasts, and afterwards."""
        for module in self._given.values():
            if module is not None:
                give(module)
        yield

    @cached_property
    def student(self) -> nn.Module:
        """The student that was kept, on the CPU, in evaluation mode. It takes normalized images [N,3,H,W] as its input
        contract says (`debiaskd.models.input.read_contract`), and gives logits [N,K]."""
        from debiaskd.evaluation.evaluate import LoadedStage

        with self._modules():
            return LoadedStage(self.folder).model.cpu()

    @property
    def metrics(self) -> dict[str, float]:
        """Of the epoch that was kept, on the validation images: "accuracy", "worst_group_accuracy", …, as fractions."""
        return {name: value for name, value in self._stage.facts["figures"].items() if value is not None}

    def evaluate(
        self, split: str | None = None, *, data: Path | str | None = None, stage: str = "student"
    ) -> dict[str, float]:
        """Measure the student on a split, as `debiaskd evaluate` does.

        Args:
            split: such as "val" or "train[:10%]"; None: the recipe's test.
            data: other prepared data of the same classes, or where the run's own is now.
            stage: another of the run's models, such as "teacher" or "pretraining".

        Returns:
            Metrics by name, as fractions. They are also in `folder`/evaluation-*.json.

        Raises:
            RunError, RecipeError, DataError, NetworkError: as their names say.
        """
        from debiaskd.evaluation.evaluate import evaluate_run

        with self._modules():
            document, _ = evaluate_run(self.folder, stage, split, None if data is None else str(data))
        return {name: value for name, value in document["figures"].items() if value is not None}

    def explain(
        self,
        images: Sequence[Path | str] | Path | str,
        *,
        target: str | int | None = None,
        before: Run | Path | str | None = None,
        out: Path | str | None = None,
    ) -> Explanations:
        """Draw where the student looks, as `debiaskd explain` does.

        Args:
            images: files, or images of the run's data such as "test:12".
            target: name or number of the class; None: the label where it is known, else the predicted one.
            before: another run to compare with.
            out: folder; None: `folder`/explanations.

        Returns:
            The files that were written; in a notebook they show themselves.

        Raises:
            RunError, RecipeError, DataError, NetworkError: as their names say.
        """
        from debiaskd.evaluation.explain import explain_run

        names = [images] if isinstance(images, (str, Path)) else list(images)
        with self._modules():
            written = explain_run(
                self.folder,
                [str(name) for name in names],
                target=None if target is None else str(target),
                before=before.folder if isinstance(before, Run) else None if before is None else Path(before),
                out=None if out is None else Path(out),
            )
        return Explanations(written)

    def report(self, path: Path | str | None = None, *others: Run | Path | str, split: str | None = None) -> Path:
        """Write a page about the run, as `debiaskd report` does.

        Args:
            path: of the page; None: `folder`/report.html.
            *others: runs to compare with.
            split: that the runs are measured on; None: the recipe's test.

        Returns:
            The page's path.

        Raises:
            RunError, RecipeError, DataError, NetworkError, OSError: as their names say.
        """
        from debiaskd.reports.comparison import write_report

        page = self.folder / "report.html" if path is None else Path(path)
        folders = [one.folder if isinstance(one, Run) else Path(one) for one in others]
        with self._modules():
            write_report([self.folder, *folders], page, split=split)
        return page

    def save_pretrained(self, folder: Path | str) -> Path:
        """Write the student in the layout of the Hugging Face hub: model.safetensors, config.json, and README.md, a
        model card made from the run and its evaluations.

        `load` gives it back; `timm.create_model("local-dir:FOLDER", pretrained=True)` loads students of timm that have
        their own last layer. Nothing is uploaded.

        Args:
            folder: is made; an earlier one of these is replaced.

        Returns:
            `folder`.

        Raises:
            RunError: the folder holds something else.
            NetworkError, OSError: as their names say.
        """
        from debiaskd.reports.model_card import save_pretrained

        with self._modules():
            return save_pretrained(self.folder, Path(folder))

    def __repr__(self) -> str:
        figures = ", ".join(f"{name}={self.metrics[name]:.4f}" for name in _LEADING if name in self.metrics)
        return f"Run({str(self.folder)!r}, student={self.recipe.student.name!r}, {figures})"

    def _repr_html_(self) -> str:
        from debiaskd.reports.notebook import run_html

        with self._modules():
            return run_html(self.folder)


_LEADING = ("accuracy", "worst_group_accuracy", "f1", "epg")


class Explanations(list[Path]):
    """PNG files of `Run.explain`; in a notebook they show themselves."""

    def _repr_html_(self) -> str:
        from debiaskd.reports.notebook import images_html

        return images_html(self)


def load(folder: Path | str, *, student: nn.Module | None = None, teacher: nn.Module | None = None) -> Run | Pretrained:
    """Open a finished run, or a student of `Run.save_pretrained`.

    Args:
        folder: of the run, or of the student.
        student, teacher: modules with the same tensors as those that were given to `train`, where there were such; only
            their structure matters.

    Raises:
        RunError: no run's folder, one that is not finished, or another module than was trained.
    """
    from debiaskd.evaluation.pretrained import Pretrained, is_pretrained

    if not (Path(folder) / "recipe.yaml").exists() and is_pretrained(Path(folder)):
        return Pretrained(folder, student=student)
    return Run(folder, student=student, teacher=teacher)
