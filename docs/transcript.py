"""The commands of docs/guidance.md as a new user types them, with what they print, and their images.

    python docs/transcript.py SRC      SRC: a VOCdevkit/VOC2012 with its split trainval

Runs in a folder of its own; writes docs/results/voc2012_sample.json and docs/results/voc2012_*.png.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

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


def main(source: Path) -> None:
    said = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        for command in COMMANDS:
            real = command.replace("SRC", str(source.resolve())).replace("RECIPES", str(ROOT / "recipes"))
            done = subprocess.run(
                real, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=True
            )
            said.append({"command": command, "output": done.stdout.replace(str(source.resolve()), "SRC")})
            print(f"$ {command}\n{done.stdout}", flush=True)
        for old in RESULTS.glob("voc2012_*.png"):
            old.unlink()
        pictures = sorted(Path(folder, "runs", "voc", "explanations").glob("*.png"))
        for path in pictures:
            shutil.copy(path, RESULTS / f"voc2012_{path.name}")
        shutil.copy(Path(folder, "runs", "voc", "student", "pareto.png"), RESULTS / "voc2012_pareto.png")
    sys.path.insert(0, str(ROOT))
    from debiaskd.cli import doctor

    document = {"said": said, "pictures": [path.name for path in pictures], "environment": doctor.environment()}
    (RESULTS / "voc2012_sample.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
