"""Networks by name, and their weights: files of several kinds, and what is said of those that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

pytest.importorskip("safetensors")

import data_trees as trees
import numpy as np
from safetensors.torch import save_file
from torch import nn

from debiaskd.models import CifarResNet, SmallNet
from debiaskd.models.input import InputContract, inverse_added, with_inverse
from debiaskd.models.registry import (
    LastLayerWarning,
    NetworkError,
    build,
    load_weights,
    prepare,
    save_weights,
    weights_file,
)

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS, CIFAR = trees.SHARED / "weights", trees.SHARED / "cifar10"


@pytest.mark.parametrize(
    ("name", "package", "kind", "channels"),
    [
        ("small/4,8", None, "SmallNet", 3),
        ("small/4/1,8", None, "SmallNet", 3),
        ("cifar/resnet8", None, "CifarResNet", 3),
        ("resnet10t.c3_in1k", "timm", "ResNet", 3),
        ("torchvision/squeezenet1_1", "torchvision", "SqueezeNet", 3),
        ("bcos/cifar10_resnet20", "bcos", "BcosResNet", 6),
    ],
)
def test_networks_of_every_family(name: str, package: str | None, kind: str, channels: int) -> None:
    if package is not None:
        pytest.importorskip(package)
    model = build(name, 7).eval()
    assert type(model).__name__ == kind
    assert inverse_added(name) == (channels == 6)
    assert model(torch.rand(2, channels, 32, 32)).shape == (2, 7)


def test_strides_of_small_networks() -> None:
    images = torch.rand(1, 3, 32, 32)
    for name, side in (("small/4,4", 8), ("small/4/1,4", 16), ("small/4/1,4/4,4/1", 8)):
        assert build(name, 2).forward_features(images).shape == (1, 4, side, side)


def test_random_weights_come_from_the_global_generator() -> None:
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(build("small/4", 2).state_dict()["fc.weight"])
    assert torch.equal(models[0], models[1]) and not torch.equal(models[0], models[2])


@pytest.mark.parametrize(
    ("name", "package", "message"),
    [
        (
            "resnet19x",
            "timm",
            r"^resnet19x: timm has no such network \(others are named torchvision/…, bcos/…, hf/…, small",
        ),
        ("resnet1", "timm", r"^resnet1: timm has no such network; it has .*resnet1\d.* \(others are named"),
        ("nothing/resnet18", "timm", "^nothing/resnet18: timm has no such network"),
        ("torchvision/resnet19", "torchvision", "^torchvision/resnet19: torchvision has no such classifier$"),
        ("bcos/resnet19", "bcos", "^bcos/resnet19: the bcos package has no such network$"),
        ("small/", None, "^small/: must be widths of convolutions, such as small/8,16,32 or small/8/1,16,32$"),
        ("small/8,0", None, "^small/8,0: must be widths"),
        ("small/8,x", None, "^small/8,x: must be widths"),
        ("small/8/0,4", None, "^small/8/0,4: must be widths"),
        ("small/8/,4", None, "^small/8/,4: must be widths"),
        ("cifar/resnet21", None, r"^cifar/resnet21: depth must be 6n \+ 2"),
        ("cifar/resnet2", None, r"^cifar/resnet2: depth must be 6n \+ 2"),
        ("cifar/vgg", None, "^cifar/vgg: must be one of cifar/resnet20, cifar/wrn-16-2, "),
    ],
)
def test_names_that_are_none(name: str, package: str | None, message: str) -> None:
    if package is not None:
        pytest.importorskip(package)
    with pytest.raises(NetworkError, match=message):
        build(name, 2)


@pytest.mark.parametrize("name", ["small/4", "cifar/resnet8"])
def test_pretrained_weights_that_there_are_none_of(name: str) -> None:
    with pytest.raises(NetworkError, match=f"^{name}: has no pretrained weights that could be loaded"):
        build(name, 2, pretrained=True)


@pytest.mark.parametrize("name", ("resnet18", "torchvision/resnet18"))
def test_pretrained_weights_that_cannot_be_fetched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> NoReturn:
        raise OSError("no route\nto the host")

    timm, models = pytest.importorskip("timm"), pytest.importorskip("torchvision.models")
    for module, function in ((timm, "create_model"), (models, "get_model")):
        monkeypatch.setattr(module, function, unreachable)
    message = rf"^{name}: its pretrained weights could not be fetched \(no route to the host\)\. Build it once where"
    with pytest.raises(NetworkError, match=message):
        build(name, 2, pretrained=True)
    with pytest.raises(OSError, match="no route"):
        build(name, 2)


def test_pretrained_bcos_networks_keep_all_but_the_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("bcos.models.pretrained")
    from bcos.models import resnet

    torch.manual_seed(0)
    known = resnet.resnet18(num_classes=10)
    monkeypatch.setattr(models, "resnet18", lambda pretrained: known, raising=False)
    monkeypatch.setattr(models, "list_available", lambda: ["resnet18"])
    state, expected = build("bcos/resnet18", 3, pretrained=True).state_dict(), known.state_dict()
    other = [
        name
        for name in expected
        if not (state[name].shape == expected[name].shape and torch.equal(state[name], expected[name]))
    ]
    assert other == ["fc.linear.weight"]
    with pytest.raises(NetworkError, match=r"^bcos/resnet34: has no pretrained weights"):
        build("bcos/resnet34", 3, pretrained=True)


def test_a_tag_of_weights_that_is_none() -> None:
    pytest.importorskip("timm")
    with pytest.raises(NetworkError, match=r"^resnet10t\.nobody: "):
        build("resnet10t.nobody", 2, pretrained=True)


def test_pretrained_torchvision_networks_get_a_new_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    models: Any = pytest.importorskip("torchvision.models")
    resnet = models.get_model("resnet18")
    monkeypatch.setattr(models, "get_model", lambda name, weights=None: resnet)
    made = build("torchvision/resnet18", 3, pretrained=True)
    assert made.get_submodule("fc").out_features == 3
    assert made is resnet


def test_a_network_that_does_not_run_on_the_pictures() -> None:
    with pytest.raises(NetworkError, match=r"^Conv2d: does not run on 8×8 images "):
        prepare(nn.Conv2d(3, 4, 33), InputContract((8, 8)))
    with pytest.raises(
        NetworkError, match=r"^Conv2d: must give logits \[N,K\] for 8×8 images, got \[2, 4, 6, 6\] for 2$"
    ):
        prepare(nn.Conv2d(3, 4, 3), InputContract((8, 8)))
    with pytest.raises(NetworkError, match=r"^Sequential: does not run on 8×8 images .*positively homogeneous"):
        prepare(nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.GELU()), InputContract((8, 8)), x_dnn=True)

    class Choosy(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            torch._assert(images.shape[2] == 224, "Input height doesn't match model")
            return images

    with pytest.raises(NetworkError, match=r"^Choosy: does not run on 8×8 images \(Input height doesn't match"):
        prepare(Choosy(), InputContract((8, 8)))


def test_preparing_leaves_mode_and_statistics_as_they_were() -> None:
    model = SmallNet((4,), (2,), 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert prepare(model, InputContract((8, 8))) is model and model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    free = prepare(SmallNet((4,), (2,), 2), InputContract((8, 8)), x_dnn=True)
    assert not any("bias" in name for name in free.state_dict())


def test_inverses_are_added() -> None:
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(with_inverse(images)[:, :3], images)
    torch.testing.assert_close(with_inverse(images).sum(1), torch.full((2, 4, 4), 3.0))


# -- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_saved_and_loaded_as_they_were(tmp_path: Path) -> None:
    from safetensors import safe_open

    torch.manual_seed(5)
    model, other = CifarResNet(8, 3), CifarResNet(8, 3)
    model(torch.randn(4, 3, 8, 8))  # statistics and a whole number that counts
    file = tmp_path / "student" / "model.safetensors"
    file.parent.mkdir()
    save_weights(model, file, {"stage": "student", "classes": ["a", "b", "c"]})
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "wrapped.pth")
    for source in (file, tmp_path, file.parent, tmp_path / "plain.pt", str(tmp_path / "wrapped.pth")):
        other = CifarResNet(8, 3)
        load_weights(other, source)
        for name, tensor in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), (source, name)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"debiaskd": '{"classes": ["a", "b", "c"], "stage": "student"}'}
    assert weights_file(tmp_path) == weights_file(file.parent) == weights_file(file) == file


def test_shared_tensors_are_saved(tmp_path: Path) -> None:
    model = SmallNet((4,), (2,), 2)
    model.again = model.fc  # type: ignore[assignment]
    save_weights(model, tmp_path / "m.safetensors", {})
    load_weights(model, tmp_path / "m.safetensors")


def net() -> nn.Module:
    return SmallNet((4,), (2,), 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("fc.bias"), r"of another network: fc\.bias is missing there and \[2\] here$"),
        (
            lambda state: state.update({"fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(3)}),
            r"of another network: fc\.weight is \[3, 4\] there and \[2, 4\] here, and 1 more$",
        ),
        (
            lambda state: state.update(extra=torch.zeros(1)),
            r"of another network: extra is \[1\] there and missing here$",
        ),
    ],
)
def test_weights_of_another_network_name_the_tensor(tmp_path: Path, change: Any, message: str) -> None:
    state = dict(net().state_dict())
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    model = net()
    before = model.state_dict()["body.conv1.weight"].clone()
    with pytest.raises(NetworkError, match=message):
        load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model.state_dict()["body.conv1.weight"], before)


def test_a_last_layer_of_other_classes_begins_anew_in_a_network_that_is_trained(tmp_path: Path) -> None:
    source, model = SmallNet((4, 6), (2, 1), 7), SmallNet((4, 6), (2, 1), 2)
    save_weights(source, tmp_path / "w.safetensors", {})
    fresh = {name: tensor.clone() for name, tensor in model.fc.state_dict().items()}
    with pytest.raises(NetworkError, match=r"fc\.weight is \[7, 6\] there and \[2, 6\] here, and 1 more$"):
        load_weights(model, tmp_path / "w.safetensors")
    message = (
        r"w\.safetensors: its last layer, fc, is of 7 classes and not of 2; it is re-initialised, "
        r"all else as in the file$"
    )
    with pytest.warns(LastLayerWarning, match=message):
        load_weights(model, tmp_path / "w.safetensors", to_train=True)
    for name, tensor in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        assert torch.equal(tensor, fresh[kind] if layer == "fc" else source.state_dict()[name]), name


@pytest.mark.parametrize("source", ["file", "pretrained"])
def test_fine_tuning_starts_from_moderate_logits(source: str, tmp_path: Path) -> None:
    # timm draws this last layer from +-1/sqrt(number of classes).
    known = build("efficientnet_b0", 1000)
    torch.save(known.state_dict(), tmp_path / "w.pth")
    if source == "pretrained":
        options = {"pretrained_cfg_overlay": {"file": str(tmp_path / "w.pth")}}
        model = build("efficientnet_b0", 2, pretrained=True, options=options)
    else:
        model = build("efficientnet_b0", 2)
        assert float(model.classifier.weight.std()) > 0.3
        with pytest.warns(LastLayerWarning):
            load_weights(model, tmp_path / "w.pth", to_train=True)
    assert torch.equal(model.conv_stem.weight, known.conv_stem.weight)
    assert float(model.classifier.weight.abs().max()) <= 1280**-0.5


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update({"fc.weight": torch.zeros(2, 5)}),  # of another width
        lambda state: state.update({"fc.weight": torch.zeros(3, 4, 1), "fc.bias": torch.zeros(3)}),
        lambda state: state.update({"fc.weight": torch.zeros(3, 4), "body.bn1.bias": torch.zeros(3)}),  # two layers
        lambda state: state.pop("fc.bias"),
        lambda state: state.update({"fc.bias": torch.tensor(0.0)}),
    ],
)
def test_what_differs_otherwise_is_another_network_to_train_as_well(tmp_path: Path, change: Any) -> None:
    state = dict(net().state_dict())
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(NetworkError, match="of another network"):
        load_weights(net(), tmp_path / "w.safetensors", to_train=True)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 100, b"no weights at all", b"\x80\x02]q\x00.", b"PK\x03\x04" + b"x" * 60]
)
def test_files_that_are_no_weights(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NetworkError, match=rf"{name}: (neither safetensors nor a state dict|holds no state dict)") as e:
        load_weights(net(), tmp_path / name)
    assert "\n" not in str(e.value) and "()" not in str(e.value)


def test_damaged_weights(tmp_path: Path) -> None:
    save_weights(net(), tmp_path / "w.safetensors", {})
    torch.save(net().state_dict(), tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        whole = (tmp_path / name).read_bytes()
        for cut in range(0, len(whole) - 1, 97):
            (tmp_path / name).write_bytes(whole[:cut])
            with pytest.raises(NetworkError, match=f"{name}: "):
                load_weights(net(), tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {}}, {"state_dict": {"a": 1}}, {}])
def test_a_file_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(NetworkError, match=r"w\.pth: holds no state dict$"):
        load_weights(net(), tmp_path / "w.pth")


def test_missing_weights(tmp_path: Path) -> None:
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pth", tmp_path):
        with pytest.raises(NetworkError, match="there is no such file of weights"):
            load_weights(net(), path)


# -- real weights -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (WEIGHTS.is_dir() and CIFAR.is_dir()), reason=f"no real weights and images at {trees.SHARED}")
def test_the_cifar_resnet_is_the_one_whose_weights_are_public() -> None:
    (file,) = WEIGHTS.glob("*resnet20*.th")
    model = CifarResNet(20, 10).eval()
    load_weights(model, file)
    with np.load(CIFAR / "test_2000.npz") as content:
        images, labels = torch.from_numpy(content["images"]), torch.from_numpy(content["labels"]).long()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pictures = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in pictures.split(500)])
    assert (found == labels).double().mean() >= 0.91
