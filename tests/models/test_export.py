"""Students leave for deployment as programs of PyTorch's own ops and as ONNX, for batches of any size."""

from __future__ import annotations

import importlib
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import debiaskd as dk
from debiaskd.models import SmallNet
from debiaskd.models.input import InputContract, Preprocess, resize
from debiaskd.models.registry import save_weights
from debiaskd.ops import backdoor, backend
from debiaskd.terms.backdoor import Intervened, Intervention

pytestmark = [pytest.mark.compiles, pytest.mark.usefixtures("one_thread")]
CLASSES = 4
BATCH = ({0: torch.export.Dim("batch", max=64)},)


class Functional(nn.Module):
    """No protocol: its layers have to be named."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU())
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(F.adaptive_avg_pool2d(self.stage(images), 1).flatten(1))
        return logits


def small(*widths: int) -> SmallNet:
    return SmallNet(widths, [2] * len(widths), CLASSES)


def transformer(tokens: int) -> nn.Module:
    """Its logits read one class token, or two."""
    deit = importlib.import_module("timm.models.deit")
    kind = deit.VisionTransformerDistilled if tokens == 2 else deit.VisionTransformer
    made: nn.Module = kind(img_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=2, num_classes=CLASSES)
    return made


def intervened(student: Any, mode: str, scale: float = 1.0) -> nn.Module:
    head = Intervention(student.num_features, CLASSES, mode, temperature=4.0)
    head.context.copy_(scale * torch.randn_like(head.context))
    return Intervened(student, head)


STUDENTS = {
    "transplanted": lambda: dk.transplant(small(12, 24), small(8, 16)),
    "transplanted, by names": lambda: dk.transplant(Functional(24), Functional(8), layer="stage", head="classifier"),
    "of a class token": lambda: dk.transplant(transformer(1), small(8, 16)),
    "of two tokens": lambda: dk.transplant(transformer(2), small(8, 16)),
    "nwgm": lambda: intervened(small(8, 16), "nwgm"),
    "exact": lambda: intervened(small(8, 16), "exact"),
    "exact, far apart": lambda: intervened(small(8, 16), "exact", scale=1000.0),
    "exact on a transplanted student": lambda: intervened(dk.transplant(small(12, 24), small(8, 16)), "exact"),
}


def built(name: str) -> nn.Module:
    """As after some training: batch norm has seen images."""
    if "token" in name:
        pytest.importorskip("timm", reason="class tokens are those of timm's models")
    model = STUDENTS[name]().train()
    with torch.no_grad():
        for _ in range(3):
            model(images(8) * 2 + 1)
    return model.eval()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32)


def close(actual: Tensor, expected: Tensor) -> None:
    assert expected.std() > 1e-3  # one that answers the same to everything would be exported too easily
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-4, atol=1e-5)


def operators(program: torch.export.ExportedProgram) -> set[str]:
    found = set()
    for module in program.graph_module.modules():
        found |= {str(node.target) for node in module.graph.nodes if node.op == "call_function"}  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize(("name", "strict"), [(name, i % 2 == 1) for i, name in enumerate(STUDENTS)])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_exported_program(name: str, strict: bool) -> None:
    model = built(name)
    program = torch.export.export(model, (images(2),), dynamic_shapes=BATCH, strict=strict)
    assert not any("debiaskd" in operator for operator in operators(program))
    assert set(program.state_dict) == set(model.state_dict())
    for count in (1, 2, 5, 64):
        batch = images(count)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(batch), model(batch), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        close(program.module()(batch), model(batch))


def require_onnx() -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'debiaskd[onnx]'")


@pytest.mark.parametrize("name", ["transplanted", "of two tokens", "nwgm", "exact, far apart"])  # all operators
def test_onnx(name: str) -> None:
    require_onnx()
    model = built(name)
    program: Any = torch.onnx.export(model, (images(2),), dynamo=True, dynamic_shapes=BATCH, verbose=False)
    assert {node.domain for node in program.model.graph} == {""}  # ONNX's own operators
    file = io.BytesIO()
    program.save(file)
    session = importlib.import_module("onnxruntime").InferenceSession(file.getvalue())
    for count in (1, 5, 64):
        batch = images(count)
        (logits,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(batch).detach(), rtol=1e-4, atol=1e-5)
    close(torch.from_numpy(logits), model(batch))


def test_the_page_on_deployment_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_onnx()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"student": built("exact on a transplanted student"), "images": images(2)}
    names["pixels"] = torch.randint(0, 256, (2, 3, 48, 40), dtype=torch.uint8)
    contract = InputContract((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")
    folder = tmp_path / "runs" / "birds" / "student"
    folder.mkdir(parents=True)
    save_weights(names["student"], folder / "model.safetensors", {"input": contract.to_dict()})
    page = Path(__file__).resolve().parents[2] / "docs" / "deploy.md"
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        if "save_pretrained" not in block:  # of a whole run: tests/evaluation/test_pretrained.py
            exec(block, names)
    close(names["logits"], names["student"](names["images"]))
    assert (tmp_path / "student.pt2").exists() and (tmp_path / "student.onnx").exists()
    read = resize(names["pixels"] / 255, (32, 32), "bicubic") * 2 - 1
    close(torch.export.load(tmp_path / "whole.pt2").module()(names["pixels"]), names["student"](read))


@pytest.mark.parametrize(
    "contract",
    [
        InputContract((32, 32), interpolation="bicubic"),  # not resized
        InputContract((24, 20), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        InputContract((24, 20), interpolation="nearest"),
    ],
    ids=str,
)
def test_onnx_reads_pixels(contract: InputContract) -> None:
    require_onnx()
    model = nn.Sequential(Preprocess(contract), small(8)).eval()
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    program: Any = torch.onnx.export(model, (pixels[:2],), dynamo=True, dynamic_shapes=BATCH, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = importlib.import_module("onnxruntime").InferenceSession(file.getvalue())
    (logits,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    close(torch.from_numpy(logits), model(pixels))


LOADED = """
import sys, torch
batch, expected = torch.load(sys.argv[1])
torch.testing.assert_close(torch.export.load(sys.argv[2]).module()(batch), expected, rtol=1e-4, atol=1e-5)
assert not any(name.startswith("debiaskd") for name in sys.modules)
"""


def test_an_exported_program_runs_without_this_package(tmp_path: Path) -> None:
    model, batch = built("exact"), images(3)
    torch.save((batch, model(batch).detach()), tmp_path / "expected.pt")
    torch.export.save(torch.export.export(model, (images(2),), dynamic_shapes=BATCH), tmp_path / "student.pt2")
    command = [sys.executable, "-c", LOADED, tmp_path / "expected.pt", tmp_path / "student.pt2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_many_classes_go_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backdoor, "TILE", 16 * CLASSES * 3)  # of three classes, then of the one that is left
    model = built("exact")
    program = torch.export.export(model, (images(2),), dynamic_shapes=BATCH)
    assert sum("logsumexp" in str(node.target) for node in program.graph.nodes) == 4
    batch = images(5)
    close(program.module()(batch).detach(), model(batch))


@pytest.mark.skipif("cpp" in backend.unavailable, reason="the native CPU ops are not built")
def test_a_backend_that_is_asked_for_is_exported() -> None:
    model = built("exact")
    with dk.backend("cpp"):
        program = torch.export.export(model, (images(2),), dynamic_shapes=BATCH)
    assert "debiaskd.backdoor.default" in operators(program)
    batch = images(5)
    close(program.module()(batch).detach(), model(batch))


def test_maps_of_the_final_layer_are_exported_with_the_logits() -> None:
    class Explained(nn.Module):
        def __init__(self, student: dk.Transplanted) -> None:
            super().__init__()
            self.student = student

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            feature = self.student.forward_features(images)
            logits = self.student.forward_head(feature)
            weight = self.student.get_classifier().weight[logits.argmax(1)]
            return logits, dk.channel_dot(weight, feature)

    model, batch = Explained(dk.transplant(small(12, 24), small(8, 16))).eval(), images(5)
    program = torch.export.export(model, (images(2),), dynamic_shapes=BATCH)
    assert not any("debiaskd" in operator for operator in operators(program))
    for actual, expected in zip(program.module()(batch), model(batch)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
