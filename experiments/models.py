"""Which networks learn, teach and can be guided: one small network of each family, tried on random images.

    python experiments/models.py            all of timm, torchvision and transformers; makes docs/models.{md,json}
    python experiments/models.py NAME ...   the named rows alone, printed
    python experiments/models.py --failed   rows of docs/models.json that failed, again
    python experiments/models.py --table    docs/models.md from docs/models.json

A network learns if a transplanted student on its body gets a finite gradient for every parameter; it teaches if its
frozen head turns what it reads into its own logits for new images; it can be guided if a step of `dk.Guide` at Final
gives a map that is not zero and gradients. Nothing is downloaded: weights are random.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from models_table import table
from torch import nn

import debiaskd as dk
from debiaskd.boxes import Boxes
from debiaskd.models import SmallNet
from debiaskd.models import registry as networks
from debiaskd.models.frozen_teacher import FrozenTeacher
from debiaskd.models.last_layers import classifiers_of
from debiaskd.models.transplant import transplant

DOCS = Path(__file__).parents[1] / "docs"
#: Families whose smallest network has more parameters than this are not tried.
LARGEST = 150_000_000
CLASSES = 3


# -- which networks ---------------------------------------------------------------------------------------------------


def timm_families() -> Iterator[tuple[str, list[str]]]:
    import timm

    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if names:
            yield f"timm {module}", [f"timm/{name}" for name in names]


def torchvision_families() -> Iterator[tuple[str, list[str]]]:
    from torchvision import models

    found: dict[str, list[str]] = {}
    for name in models.list_models(module=models):
        module = models.get_model_builder(name).__module__.rpartition(".")[2]
        found.setdefault(f"torchvision {module}", []).append(f"torchvision/{name}")
    yield from found.items()


def transformers_families() -> Iterator[tuple[str, list[str]]]:
    for name in TRANSFORMERS:
        yield f"transformers {name}", [f"hf/{name}"]


_TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"},
    "vit": {**_TINY, "intermediate_size": 96, "patch_size": 16},
    "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "swin": {"image_size": 64, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    "dinov2": {**_TINY, "patch_size": 16},
}


def build(name: str) -> nn.Module:
    """A network with random weights, from the global generator."""
    source, _, rest = name.partition("/")
    if source == "timm":
        import timm

        return timm.create_model(rest, num_classes=CLASSES)
    return networks.build(name, CLASSES, options=TRANSFORMERS[rest] if source == "hf" else None)


def smallest(names: list[str]) -> tuple[str, int]:
    """(the name of the network with the fewest parameters, how many); counted without making any."""
    found = []
    for name in names:
        try:
            with torch.device("meta"):
                model = build(name)
        except Exception:  # some compute with values when they are built
            model = build(name)
        found.append((sum(parameter.numel() for parameter in model.parameters()), name))
    count, name = min(found)
    return name, count


# -- what they can ----------------------------------------------------------------------------------------------------


def look(name: str) -> dict[str, Any]:
    """A row: what a network can, and where it is cut."""
    torch.manual_seed(0)
    model = build(name)
    with torch.no_grad():
        last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1:]
        for layer in (*classifiers_of(model), *last):  # a new last layer of zeros gives maps of zeros
            for parameter in layer.parameters():
                if not bool(parameter.any()):
                    parameter.normal_(std=0.02)
    row: dict[str, Any] = {"name": name, "parameters": sum(p.numel() for p in model.parameters())}
    for what, look_at in (("learns", _learns), ("teaches", _teaches), ("guided", _guided)):
        try:
            torch.manual_seed(1)
            row |= {what: True, **look_at(model, row)}
        except Exception as error:  # the table is of these
            row |= {what: False, f"{what}_reason": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        model.zero_grad(set_to_none=True)
    return row


def _learns(model: nn.Module, row: dict[str, Any]) -> dict[str, Any]:
    student = transplant(SmallNet((4,), (2,), CLASSES), model)
    size = _size(student, model)
    student.train()
    with torch.no_grad():
        feature = student.body(torch.randn(2, *size))
    student(torch.randn(2, *size)).square().sum().backward()
    none = [n for n, p in student.named_parameters() if p.grad is None or not bool(torch.isfinite(p.grad).all())]
    if none:
        raise ValueError(f"no finite gradient of {none[:3]}")
    return {"input": list(size), "map": list(feature.shape[1:]), "layer": student.body.layer or "forward_features"}


def _size(student: nn.Module, model: Any) -> tuple[int, ...]:
    """The smallest square on which the map has more than one position."""
    config = getattr(model, "pretrained_cfg", None) or {"input_size": (3, 224, 224)}
    usual = tuple(config["input_size"])
    for side in (64, 96, 128, *usual[1:2], 224):
        size = (usual[0], side, side)
        try:
            with torch.no_grad():
                feature = student.eval().body(torch.randn(2, *size))
        except Exception:  # a size that the network does not run on
            continue
        if feature.shape[2] * feature.shape[3] > 1:
            return size
    return usual


def _teaches(model: nn.Module, row: dict[str, Any]) -> dict[str, Any]:
    teacher = FrozenTeacher(model)
    images = torch.randn(2, *row.get("input", (3, 224, 224)))
    mode = model.training
    with torch.no_grad():
        expected = model.eval()(images)
    model.train(mode)
    feature, logits = teacher(images)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()) + 1e-7)
    last = teacher.get_classifier()
    kinds = [type(part).__name__ for part in last] if isinstance(last, nn.ModuleList) else [type(last).__name__]
    return {
        "level": teacher.level,
        "matched": list(feature.shape[1:]),
        "head": type(teacher.head).__name__,
        "last": " + ".join(kinds),
    }


def _guided(model: nn.Module, row: dict[str, Any]) -> dict[str, Any]:
    images = torch.randn(2, *row.get("input", (3, 224, 224)))
    side = images.shape[-1]
    boxes = Boxes.from_lists([torch.tensor([[0, 0, side // 2, side // 2]]), torch.tensor([[4, 4, side, side]])])
    guide = dk.Guide(model.train(), layer="Final", loss="l1", weight=1.0)
    step = guide(images, torch.tensor([0, 1]), boxes)
    (step.loss + step.logits.square().mean()).backward()
    if not bool(step.attribution.any()):
        raise ValueError("the map is zero")
    depth = guide._depth
    assert depth is not None
    return {
        "guided_at": depth.module,
        "guided_map": list(step.attribution.shape[1:]),
        "closed_form": bool(guide.closed_form),
    }


# -- the sweep --------------------------------------------------------------------------------------------------------


def sweep(families: list[tuple[str, list[str]]], sizes: dict[str, list[Any]], say: Callable[[str], None]) -> list[Any]:
    rows = []
    for family, names in families:
        name, count = sizes[family] if family in sizes else smallest(names)
        if count > LARGEST:
            rows.append({"family": family, "name": name, "parameters": count, "skipped": True})
            continue
        start = time.perf_counter()
        try:
            rows.append({"family": family, **look(name)})
        except Exception as error:  # it cannot be built here
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            rows.append({"family": family, "name": name, "parameters": count, "skipped": True, "reason": reason})
        say(f"{time.perf_counter() - start:6.1f} s  {json.dumps(rows[-1])}")
        gc.collect()
    return rows


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", help="such as timm/vit_tiny_patch16_224 or torchvision/resnet18")
    parser.add_argument("--table", action="store_true", help="docs/models.md from docs/models.json alone")
    parser.add_argument(
        "--reuse", action="store_true", help="each family's smallest network as docs/models.json has it"
    )
    parser.add_argument("--failed", action="store_true", help="look again at the rows of docs/models.json that failed")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    path = DOCS / "models.json"
    if options.names:
        for name in options.names:
            print(json.dumps(look(name), indent=1))
        return
    if options.failed:
        document = json.loads(path.read_text())
        for i, row in enumerate(document["rows"]):
            if not row.get("skipped") and not all(row[what] for what in ("learns", "teaches", "guided")):
                document["rows"][i] = {"family": row["family"], **look(row["name"])}
                print(json.dumps(document["rows"][i]), flush=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
    elif not options.table:
        known = json.loads(path.read_text())["rows"] if options.reuse else []
        sizes = {row["family"]: [row["name"], row["parameters"]] for row in known}
        families = [*timm_families(), *torchvision_families(), *transformers_families()]
        rows = sweep(families, sizes, lambda line: print(line, flush=True))
        path.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1) + "\n")
    (DOCS / "models.md").write_text(table(json.loads(path.read_text())))


def versions() -> dict[str, str]:
    import timm
    import torchvision
    import transformers

    found = {"torch": torch, "timm": timm, "torchvision": torchvision, "transformers": transformers}
    return {name: str(module.__version__).partition("+")[0] for name, module in found.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
