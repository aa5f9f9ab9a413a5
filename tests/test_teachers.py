"""Teachers that are trained here: what each method is, and DFR's last layer against its own figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import training_runs as runs

from debiaskd.reweight import group_weights
from debiaskd.terms import GroupDroOptions, SupervisedOptions
from debiaskd.training import teachers
from debiaskd.training.fitting import Fitting
from debiaskd.training.loaded import Loaded
from debiaskd.training.stages import Chain

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("stages")]
FAST = {"epochs": 1, "batch": 12, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("teachers"))


def chain(data: Path, folder: Path, seed: int = 0, **teacher: Any) -> Chain:
    document = {
        "teacher": {"name": "plain/6", "schedule": FAST, **teacher},
        "student": {"name": "plain/4"},
        "schedule": FAST,
        "terms": {"kd": {}},
        "compute": {"accelerator": "cpu"},
        "seed": seed,
    }
    recipe = runs.read(runs.write(folder / "r.yaml", data, document))
    return Chain(recipe, folder / "run", runs.launch(recipe.compute), lambda *news: None)


@pytest.mark.parametrize(
    ("options", "term", "grouped"),
    [
        ({"method": "erm"}, SupervisedOptions(), False),
        ({"method": "balanced"}, SupervisedOptions(), True),
        ({"method": "group_dro"}, GroupDroOptions(step_size=0.01), True),
        ({"method": "group_dro", "step_size": 0.3}, GroupDroOptions(step_size=0.3), True),
        ({"method": "jtt", "up": 6.0, "identification_epochs": 2}, SupervisedOptions(weighted=True), False),
    ],
)
@pytest.mark.filterwarnings("ignore::debiaskd.reweight.ErrorSetWarning")
def test_what_each_method_is_of(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], term: Any, grouped: bool
) -> None:
    made, inner, asked = chain(data, tmp_path, **options), Fitting.fit, {}

    def noted(self: Fitting, name: str, *arguments: Any, **more: Any) -> dict[str, Any]:
        asked[name] = (arguments[3:], more)
        return inner(self, name, *arguments, **more)

    monkeypatch.setattr(Fitting, "fit", noted)
    assert made.recipe.teacher is not None and made.fitting.train.groups is not None
    made.teacher(made.recipe.teacher)
    (terms, schedule), more = asked.pop("teacher")
    assert list(terms.values()) == [term] and schedule.epochs == 1
    assert more["network"].name == "plain/6" and more.get("rule") is None
    drawn = group_weights(made.fitting.train.groups) if grouped else None
    assert (more["sampling"] is None) == (drawn is None) and (drawn is None or torch.equal(more["sampling"], drawn))
    if options["method"] != "jtt":
        assert more["weight"] is None and asked == {}
        return
    (_, brief), _ = asked.pop("teacher-identification")
    assert brief.epochs == 2 and asked == {}
    correct, _ = made.identified("teacher-identification", made.recipe.teacher, brief)  # which is finished
    assert torch.equal(more["weight"], torch.where(correct(), 1.0, 6.0)) and not correct().all()


@pytest.mark.parametrize("seed", [0, 3])
def test_dfr_leaves_the_layer_behind_that_it_fitted_and_measured(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    pytest.importorskip("sklearn")
    fits: list[tuple[int, int, Any]] = []
    inner = teachers._fit

    def noted(feature: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        fits.append((len(feature), more["fits"], inner(feature, *arguments, **more)))
        return fits[-1][2]

    monkeypatch.setattr(teachers, "_fit", noted)
    monkeypatch.setattr(teachers, "STRENGTHS", (100.0,))  # fits what it is fitted to all too well
    made = chain(data, tmp_path, seed, method="dfr", name="small/4,6")  # of batch norm
    assert made.recipe.teacher is not None
    made.teacher(made.recipe.teacher)
    assert [(count, of) for count, of, _ in fits] == [(8, 1), (8, teachers.FITS)]
    loaded, split = Loaded(tmp_path / "run", "teacher"), made.fitting.validation
    model: Any = loaded.model
    batch = loaded.pictures(split).placed(split.dataset.__getitems__(range(16)))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        feature = model.forward_head(model.forward_features(batch.images), pre_logits=True).double()
        logits = model(batch.images).double()
    mean, deviation = feature[order[:8]].mean(0), feature[order[:8]].std(0).clamp(min=1e-6)
    weight, bias = fits[-1][2]
    expected = ((feature - mean) / deviation) @ weight.T + bias
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)

    def worst(half: torch.Tensor) -> float:
        assert split.groups is not None
        right, groups = (logits.argmax(1) == split.target)[half].double(), split.groups[half]
        return min(float(right[groups == g].mean()) for g in groups.unique())

    facts = json.loads((tmp_path / "run" / "teacher" / "stage.json").read_text())["facts"]
    found = facts["worst_group_accuracy_of_the_other_half"]
    assert found == pytest.approx(worst(order[8:])) and found != pytest.approx(worst(order[:8]))


def test_dfr_averages_fits_to_as_many_of_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    seen: list[torch.Tensor] = []

    class Noting(linear.LogisticRegression):  # type: ignore[misc, name-defined]
        def fit(self, feature: Any, target: Any) -> Any:
            seen.append(torch.from_numpy(feature[:, 0]).long())
            return super().fit(feature, target)

    monkeypatch.setattr(linear, "LogisticRegression", Noting)
    groups = torch.tensor([0] * 20 + [1] * 3 + [2] * 7 + [3] * 5)
    target = (groups >= 2).long()
    feature = torch.stack([torch.arange(35.0), torch.randn(35) + 3 * target], 1).double()
    weight, bias = teachers._fit(feature, target, groups, 1.0, fits=4)
    assert [groups[rows].bincount().tolist() for rows in seen] == [[3, 3, 3, 3]] * 4
    assert len({tuple(rows.tolist()) for rows in seen}) == 4, "of other pictures each time"
    assert weight.shape == (2, 2) and bias.shape == (2,) and weight[1, 1] > 0 > weight[0, 1]
    found = teachers._worst((weight, bias), feature, target, groups)
    right = ((feature @ weight.T + bias).argmax(1) == target).double()
    assert found == min(float(right[groups == g].mean()) for g in range(4)) < 1
