"""Networks of the user's own: found by name, built with options, refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import debiaskd as dk
from debiaskd.models import own
from debiaskd.models.input import InputContract
from debiaskd.models.registry import NetworkError, build, prepare

pytestmark = pytest.mark.usefixtures("one_thread")

NETS = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, width=4):
        super().__init__(nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(width, num_classes))

class Keyword(Net):
    def __init__(self, width=4, *, num_classes):
        super().__init__(num_classes, width)

class Positional(Net):
    def __init__(self, classes, width=4):
        super().__init__(classes, width)

built = Net(2)
number = 3

def words(num_classes):
    return "no module"

def failing(num_classes):
    raise ValueError("no such thing,\\nsaid twice")
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETS)
    (tmp_path / f"{name}_lacking.py").write_text("import a_package_that_nobody_has\n")
    (tmp_path / f"{name}_broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in __import__("sys").path if path])
    return name


@pytest.mark.parametrize("called", ["Net", "Keyword", "Positional"])
def test_callables_by_import_path_get_classes_and_options(nets: str, called: str) -> None:
    model = build(f"{nets}:{called}", 5, options={"width": 6}, size=(20, 20))
    assert type(model).__name__ == called and model[-1].weight.shape == (5, 6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NETS:Missing", "NETS.py has no Missing"),
        ("NETS:number", "must be a function or a class, got int"),
        ("NETS:built", "must be a function or class that builds a network, got one that is built already"),
        ("NETS:words", "must return an nn.Module, got str"),
        ("NETS:failing", "ValueError: no such thing, said twice"),
        ("NETS_lacking:Net", "it imports a_package_that_nobody_has, which is missing"),
        ("NETS_broken:Net", "importing NETS_broken failed: ZeroDivisionError: division by zero"),
        ("NETS_absent:Net", "there is no module NETS_absent; searched the Python path and "),
        ("NETS.inner:Net", "there is no module NETS.inner"),
        ("NETS:", "must be package.module:name"),
        ("1a:Net", "must be package.module:name"),
    ],
)
def test_what_is_no_network_is_said_in_one_line(nets: str, name: str, message: str) -> None:
    with pytest.raises(NetworkError) as caught:
        build(name.replace("NETS", nets), 2)
    said = str(caught.value)
    assert message.replace("NETS", nets) in said and "\n" not in said and said.startswith(name.replace("NETS", nets))


def test_unknown_options_are_named(nets: str) -> None:
    with pytest.raises(NetworkError, match=r"could not be built from \(num_classes, wide\): TypeError"):
        build(f"{nets}:Net", 2, options={"wide": 3})
    with pytest.raises(NetworkError, match="small/4: takes no options, got width"):
        build("small/4", 2, options={"width": 3})


def test_options_of_timm_and_torchvision() -> None:
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    vit = build("vit_tiny_patch16_224", 3, options={"img_size": 32, "depth": 1, "global_pool": "avg"}, size=(64, 64))
    assert vit(torch.zeros(1, 3, 32, 32)).shape == (1, 3) and len(vit.blocks) == 1
    with pytest.raises(NetworkError, match=r"cannot be built with depht=1 \("):
        build("vit_tiny_patch16_224", 3, options={"depht": 1})
    squeeze = build("torchvision/squeezenet1_1", 3, options={"dropout": 0.25})
    assert squeeze.classifier[0].p == 0.25
    with pytest.raises(NetworkError, match=r"torchvision/resnet18: cannot be built with widht=1 \("):
        build("torchvision/resnet18", 3, options={"widht": 1})


def test_registered_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "_registered", {})

    @dk.register_model("mine")
    def mine(num_classes: int, width: int = 2) -> nn.Module:
        return nn.Linear(width, num_classes)

    assert build("mine", 3, options={"width": 5}).weight.shape == (3, 5)
    with pytest.raises(NetworkError, match="mine: has no pretrained weights"):
        build("mine", 3, pretrained=True)
    for bad in ("", "a/b", "a:b", None):
        with pytest.raises(ValueError, match="name must be made of letters"):
            dk.register_model(bad)
    with pytest.raises(TypeError, match="must decorate a function or class, got int"):
        dk.register_model("number")(3)
    pytest.importorskip("timm")
    dk.register_model("resnet18")(mine)
    with pytest.raises(NetworkError, match="timm has a network of this name; rename it"):
        build("resnet18", 3)


def test_a_given_module_is_copied_and_told_by_its_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "_given", {})
    module = nn.Linear(2, 3)
    name = own.give(module)
    made = build(name, 3)
    assert made is not module and torch.equal(made.weight, module.weight)
    assert own.given_name(nn.Linear(2, 4)) != name
    with pytest.raises(NetworkError, match="takes no options, got width"):
        build(name, 3, options={"width": 1})
    monkeypatch.setattr(own, "_given", {})
    with pytest.raises(
        NetworkError, match=r"is an nn\.Module that was given to debiaskd\.train; give one of the same tensors again"
    ):
        build(name, 3)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), r"must give logits \[N,3\] for 8×8 images, got \[2, 4\]"),
        (nn.Flatten(), r"must give logits \[N,3\] for 8×8 images, got \[2, 192\]"),
        (nn.Conv2d(3, 3, 3), r"must give logits \[N,3\] for 8×8 images, got \[2, 3, 6, 6\]"),
        (nn.Linear(5, 3), "does not run on 8×8 images"),
        (nn.MaxPool2d(2, return_indices=True), r"must give logits \[N,3\] for 8×8 images, got tuple"),
    ],
)
def test_other_outputs_are_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        prepare(module, InputContract((8, 8)), classes=3)
