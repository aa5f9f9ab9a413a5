"""Commands of the documentation as a new user types them, with what they print.

    python docs/transcript.py voc2012 SRC   SRC: a VOCdevkit/VOC2012 with its split trainval; the commands of
                                            docs/guidance.md: docs/results/voc2012_sample.json and voc2012_*.png
    python docs/transcript.py distill       an image folder with bias.csv, of generated digits; the command of
                                            docs/guides/own_data.md: docs/results/distill.json

Each runs in a folder of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
#: What is typed; SRC and RECIPES stand for where these lie.
COMMANDS = (
    "debiaskd prepare voc SRC voc-112 --size 112",
    "debiaskd train RECIPES/voc2012_sample.yaml --out runs/voc",
    "debiaskd evaluate runs/voc --stage pretraining",
    "debiaskd evaluate runs/voc",
    'debiaskd evaluate runs/voc --split "trainval[:60%]" --stage pretraining',
    'debiaskd evaluate runs/voc --split "trainval[:60%]"',
    "debiaskd explain runs/voc SRC/JPEGImages/2007_000033.jpg SRC/JPEGImages/2007_000042.jpg",
)


#: Options of the generated digits: 19 of 20 training images have the background of their class.
DIGITS = {"train": 2000, "val": 400, "test": 800, "agreement": 0.95, "seed": 0}
DISTILL = "debiaskd distill images/ --teacher resnet10t --student test_resnet --minutes 4 --out runs/digits"


def typed(commands: Iterable[str], folder: Path, replaced: Mapping[str, str]) -> list[dict[str, str]]:
    """Run commands in a folder and return what they print; `replaced` words stand for paths."""
    said = []
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in commands:
        real = command
        for word, path in replaced.items():
            real = real.replace(word, path)
        done = subprocess.run(real, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        output = done.stdout
        for word, path in replaced.items():
            output = output.replace(path, word)
        said.append({"command": command, "output": output})
        print(f"$ {command}\n{output}", flush=True)
    return said


def write(name: str, said: list[dict[str, str]], **more: Any) -> None:
    sys.path.insert(0, str(ROOT))
    from debiaskd.cli import doctor

    document = {"said": said, **more, "environment": doctor.environment()}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def voc2012(source: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        replaced = {"SRC": str(source.resolve()), "RECIPES": str(ROOT / "recipes")}
        said = typed(COMMANDS, Path(folder), replaced)
        for old in RESULTS.glob("voc2012_*.png"):
            old.unlink()
        images = sorted(Path(folder, "runs", "voc", "explanations").glob("*.png"))
        for path in images:
            shutil.copy(path, RESULTS / f"voc2012_{path.name}")
        shutil.copy(Path(folder, "runs", "voc", "student", "pareto.png"), RESULTS / "voc2012_pareto.png")
    write("voc2012_sample", said, pictures=[path.name for path in images])


def distill() -> None:
    with tempfile.TemporaryDirectory() as folder:
        image_folder(Path(folder, "images"))
        write("distill", typed([DISTILL], Path(folder), {}), digits=DIGITS)


def image_folder(out: Path) -> None:
    """Write generated digits as images in class folders, and bias.csv with the background of each."""
    from PIL import Image

    from debiaskd.data import PackedDataset, prepare

    rows = ["path,bias"]
    with tempfile.TemporaryDirectory() as folder:
        prepare("digits", None, folder, **DIGITS)
        for split in ("train", "val", "test"):
            data = PackedDataset(folder, split)
            for number in range(len(data)):
                image, target, *_ = data[number]
                group = data.groups[int(data.group_ids[number])]
                path = Path(split, data.classes[int(target)], f"{number:04d}.png")
                (out / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(out / path)
                rows.append(f"{path},{group.rpartition(' ')[2]}")
    (out / "bias.csv").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["voc2012"] and len(sys.argv) == 3:
        voc2012(Path(sys.argv[2]))
    elif sys.argv[1:] == ["distill"]:
        distill()
    else:
        sys.exit(__doc__)
