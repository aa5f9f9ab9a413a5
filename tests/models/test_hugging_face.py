"""Image classifiers of transformers by name: built from configurations and folders, refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from hugging_face_folders import TINY, saved
from safetensors.torch import load_file, save_file

import debiaskd as dk
from debiaskd.boxes import Boxes
from debiaskd.models.frozen_teacher import FrozenTeacher
from debiaskd.models.hugging_face import Logits, folder_hash
from debiaskd.models.input import InputContract
from debiaskd.models.input_sources import resolve
from debiaskd.models.registry import NetworkError, build, load_weights, pretrained_classes

pytestmark = pytest.mark.usefixtures("one_thread")


def images(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", TINY)
def test_a_type_from_a_configuration_learns_teaches_and_is_guided(kind: str) -> None:
    torch.manual_seed(0)
    model = build(f"hf/{kind}", 3, options=TINY[kind])
    assert isinstance(model, Logits) and model(images()).shape == (2, 3)
    with torch.no_grad():
        expected = model.eval()(images())
    teacher = FrozenTeacher(model, example=images())
    torch.testing.assert_close(teacher(images())[1], expected, rtol=1e-4, atol=1e-5)
    student = dk.transplant(teacher, build(f"hf/{kind}", 3, options=TINY[kind]), example=images())
    student(images()).square().sum().backward()
    assert all(
        p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in student.parameters() if p.requires_grad
    )
    guide = dk.Guide(model.train(), layer="Final", loss="energy", weight=1.0)
    boxes = Boxes.from_lists([torch.tensor([[0, 0, 16, 16]]), torch.tensor([[4, 4, 32, 32]])])
    step = guide(images(), torch.tensor([0, 1]), boxes)
    (step.loss + step.logits.sum()).backward()
    assert bool(step.attribution.any()) and bool(torch.isfinite(step.loss))


def test_random_weights_come_from_the_generator() -> None:
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(build("hf/resnet", 2, options=TINY["resnet"])(images()))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_a_folder_gives_architecture_weights_and_input(tmp_path: Path) -> None:
    model = saved(tmp_path / "vit", "vit")
    name = f"hf/{tmp_path / 'vit'}"
    with torch.no_grad():
        expected = model(images()).logits
        torch.testing.assert_close(build(name, 2, pretrained=True).eval()(images()), expected)
        fresh = build(name, 2)
        assert not torch.allclose(fresh.eval()(images()), expected)
    with pytest.raises(NetworkError, match="loaded by the name hf/FOLDER with pretrained: true"):
        load_weights(fresh, tmp_path / "vit")
    contract, source = resolve(name, (16, 16), pretrained=True)
    assert contract == InputContract((32, 32), (0.5, 0.4, 0.3), (0.25, 0.5, 0.5), "bicubic")  # it runs on 32×32 alone
    assert source == f"the pretrained weights of {name}"
    assert resolve(name, (16, 16), weights=tmp_path / "vit" / "model.safetensors")[0] == contract
    assert build(name, 2, size=(16, 16))(images(16)).shape == (2, 2)  # from scratch, its positions are for 16×16
    with pytest.raises(NetworkError, match="cannot be built for images of 16×16 pixels"):
        build(name, 2, size=(16, 16), pretrained=True)


def test_a_network_of_every_size_reads_that_of_the_data(tmp_path: Path) -> None:
    saved(tmp_path / "net", "resnet")
    assert resolve(f"hf/{tmp_path / 'net'}", (48, 48), pretrained=True)[0].size == (48, 48)


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        ({"do_normalize": False}, [0.0] * 3, [1.0] * 3),
        ({"rescale_factor": 1 / 127.5, "rescale_offset": True}, [0.75, 0.7, 0.65], [0.125, 0.25, 0.25]),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [255.0] * 3}, [0.5] * 3, [1.0] * 3),
    ],
)
def test_what_the_processor_does_with_pixels(tmp_path: Path, processor: Any, mean: Any, std: Any) -> None:
    saved(tmp_path, "resnet", processor=processor)
    contract = resolve(f"hf/{tmp_path}", (32, 32), pretrained=True)[0]
    torch.testing.assert_close(torch.tensor([contract.mean, contract.std]), torch.tensor([mean, std]))


def test_channels_in_another_order_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, "resnet", processor={"do_flip_channel_order": True})
    with pytest.raises(NetworkError, match=r"preprocessor_config\.json: do_flip_channel_order: .*blue, green, red"):
        resolve(f"hf/{tmp_path}", (32, 32), pretrained=True)


def test_a_last_layer_of_other_classes_or_none_begins_anew(tmp_path: Path) -> None:
    model, name = saved(tmp_path, "resnet"), f"hf/{tmp_path}"
    same, other = build(name, 2, pretrained=True), build(name, 5, pretrained=True)
    assert pretrained_classes(name, same) == pretrained_classes(name, other) == 2
    assert other(images()).shape == (2, 5)
    torch.testing.assert_close(dict(other.model.resnet.named_parameters()), dict(model.resnet.named_parameters()))
    body = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if not k.startswith("classifier.")}
    save_file(body, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert pretrained_classes(name, build(name, 2, pretrained=True)) == 0


def test_what_cannot_be_built_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "net", "resnet")
    saved(tmp_path / "cut", "resnet")
    state = load_file(tmp_path / "cut" / "model.safetensors")
    state.pop("resnet.embedder.embedder.convolution.weight")
    save_file(state, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    saved(tmp_path / "bare", "resnet")
    (tmp_path / "bare" / "model.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("hf/./gone", {}, f"there is no folder gone in {tmp_path}: a network is built from the configuration in it"),
        ("hf/resnets", {}, "; model types that are built from a configuration: beit, "),
        ("hf/./empty", {}, "empty has no config.json"),
        ("hf/./text", {}, "transformers has no image classifier of model type bert"),
        ("hf/./bare", {"pretrained": True}, "bare holds no weights"),
        (
            "hf/./cut",
            {"pretrained": True},
            "resnet.embedder.embedder.convolution.weight is missing or of another shape",
        ),
        ("hf/resnet", {"pretrained": True}, "is built from a configuration and has no weights; name a folder"),
        ("hf/resnet", {"options": {"widht": 3}}, "ResNetConfig has no option widht"),
        ("hf/./net", {"options": {"num_labels": 3}}, "options.num_labels: comes from the data; leave it out"),
        ("hf/vit", {"options": {"hidden_size": "wide"}}, "cannot be configured with hidden_size='wide'"),
        ("hf/./net", {"options": {"hidden_sizes": [4, 8]}, "pretrained": True}, "is missing or of another shape, and "),
    ]
    for name, options, message in cases:
        with pytest.raises(NetworkError) as caught:
            build(name, 2, **options)
        assert message in str(caught.value) and "\n" not in str(caught.value), (name, options)


def test_a_folder_of_a_types_name_is_written_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "resnet", "vit")
    assert type(build("hf/./resnet", 2).model).__name__ == "ViTForImageClassification"
    assert folder_hash("hf/resnet", weights=False) is None and folder_hash("resnet18", weights=True) is None
    before = [folder_hash("hf/./resnet", weights=weights) for weights in (False, True)]
    save_file({"x": torch.zeros(1)}, tmp_path / "resnet" / "model.safetensors")
    after = [folder_hash("hf/./resnet", weights=weights) for weights in (False, True)]
    assert before[0] == after[0] and before[1] != after[1]


def test_transformers_is_imported_for_its_names_alone() -> None:
    code = (
        "import sys; from debiaskd.models.registry import build; from debiaskd.models.input_sources import resolve; "
        "build('small/4', 2); resolve('small/4', (8, 8), pretrained=False); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_exports_and_copies() -> None:
    import copy

    model = build("hf/vit", 2, options=TINY["vit"]).eval()
    exported: nn.Module = torch.export.export(copy.deepcopy(model), (images(),)).module()
    torch.testing.assert_close(exported(images()), model(images()), rtol=1e-4, atol=1e-5)
