"""`python -m debiaskd.bench.data`: images a second from packed shards and from JPEG files, and what preparing takes.

Images of 500×375 are generated, saved as JPEG and prepared at 224 pixels. Then shuffled epochs are read in batches of
64: packed shards by the training process itself; JPEG files by two worker processes that decode and resize. Peak memory
is that of preparing 1,000 and 10,000 images, each in a process of its own with two workers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from debiaskd.bench import environment
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from debiaskd.data import Augment, ChunkedDataset, PackedDataset, StreamedDataset, loader, prepare

SIZE, BATCH, WORKERS, DIFFERENT = 224, 64, 2, 100


def generate(root: Path, count: int) -> Path:
    """`count` JPEG files with a box each, of which 100 differ and the others are the same files under other names."""
    folder = root / "things"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(min(DIFFERENT, count)):
        photograph(folder / f"{i:05d}.jpg", generator)
    for i in range(DIFFERENT, count):
        os.link(folder / f"{i % DIFFERENT:05d}.jpg", folder / f"{i:05d}.jpg")
    rows = "".join(f"things/{i:05d}.jpg,50,40,300,200\n" for i in range(count))
    (root / "boxes.csv").write_text("path,x0,y0,x1,y1\n" + rows)
    return root


def photograph(path: Path, generator: np.random.Generator) -> None:
    """Write a JPEG file of 500×375 pixels that is about as large as one of a photograph."""
    from PIL import Image

    coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8)).resize((500, 375), 3)
    noise = generator.normal(0, 8, (375, 500, 3))  # as fine-grained as photographs are, so as large as their files
    Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)


class Files(Dataset[Tensor]):
    """JPEG files decoded and resized one by one, as training does that prepares nothing."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.rglob("*.jpg"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image

        with Image.open(self.paths[index]) as image:
            resized = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def epoch(batches: Any, count: int) -> float:
    """Images a second, from the first batch being asked for to the last one being there."""
    started = time.perf_counter()
    seen = sum(len(batch) for batch in batches)
    elapsed = time.perf_counter() - started
    if seen != count:
        raise RuntimeError(f"read {seen} images of {count}")
    return count / elapsed


def read_packed(out: Path, epochs: int) -> dict[str, Any]:
    dataset = PackedDataset(out)
    batches = loader(dataset, BATCH, shuffle=True)
    rates = []
    for number in range(epochs + 1):
        batches.sampler.set_epoch(number)
        rates.append(epoch(batches, len(dataset)))
    return {"first_epoch": rates[0], "epochs": rates[1:], "images_per_second": statistics.median(rates[1:])}


def read_files(src: Path, epochs: int) -> dict[str, Any]:
    files = Files(src)
    pin = torch.cuda.is_available()
    batches = DataLoader(files, BATCH, shuffle=True, num_workers=WORKERS, pin_memory=pin, persistent_workers=True)
    next(iter(batches))  # the workers are there
    rates = [epoch(batches, len(files)) for _ in range(epochs)]
    return {"epochs": rates, "images_per_second": statistics.median(rates)}


def read_streamed(src: Path, out: Path, epochs: int) -> dict[str, Any]:
    """The same images through LitData: from beginning to end in the training process and with workers, and by number
    as recipes read them, in the training process."""
    count = prepare("folder", src, out, size=SIZE, workers=WORKERS, format="litdata").manifest["splits"]["train"][
        "count"
    ]
    rates = {}
    for name, workers in (("images_per_second", 0), ("with_workers", WORKERS)):
        batches = loader(StreamedDataset(out), BATCH, shuffle=True, workers=workers)
        rates[name] = statistics.median(epoch(batches, count) for _ in range(epochs))
    batches = loader(ChunkedDataset(out), BATCH, shuffle=True)
    rates["by_number"] = statistics.median([epoch(batches, count) for _ in range(epochs + 1)][1:])
    return rates


def augment(out: Path, device: str) -> dict[str, float]:
    """Images a second of the augmentation alone, where the batch lies, by memory order."""
    dataset = PackedDataset(out)
    batch = dataset.__getitems__(range(min(BATCH, len(dataset)))).to(device)
    made = Augment(SIZE, crop_scale=(0.08, 1))
    rates = {}
    for name, order in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format)):
        case = dataclasses.replace(batch, images=batch.images.contiguous(memory_format=order))
        seconds = []
        for _ in range(12):
            started = time.perf_counter()
            _ = made(case)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        rates[name] = len(batch) / statistics.median(seconds[2:])
    return rates


def measured_prepare(src: Path, out: Path) -> dict[str, Any]:
    """Prepares in a new process; its peak memory, and the largest of its workers', in MB."""
    command = [sys.executable, "-m", "debiaskd.bench.data", "--prepare", str(src), str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def prepare_here(src: Path, out: Path) -> dict[str, Any]:
    import resource

    started = time.perf_counter()
    prepared = prepare("folder", src, out, size=SIZE, workers=WORKERS)
    elapsed = time.perf_counter() - started
    count = prepared.manifest["splits"]["train"]["count"]
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {"images": count, "peak_mb": peaks[0], "worker_peak_mb": peaks[1], "images_per_second": count / elapsed}


def measure(counts: list[int], decoded: int, epochs: int) -> dict[str, Any]:
    use = environment.CpuUse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kept = environment.keep_freed_memory()
    torch.set_num_threads(WORKERS)
    with tempfile.TemporaryDirectory(prefix="debiaskd-bench-") as folder:
        root = Path(folder)
        made = []
        for count in counts:
            made.append(measured_prepare(generate(root / f"src{count}", count), root / f"out{count}"))
            print(made[-1], flush=True)
        packed = read_packed(root / f"out{counts[-1]}", epochs)
        print(packed, flush=True)
        files = read_files(generate(root / "files", decoded), epochs)
        print(files, flush=True)
        streamed = read_streamed(root / "files", root / "streamed", epochs)
        print(streamed, flush=True)
        bytes_per_file = statistics.mean(path.stat().st_size for path in (root / "files").rglob("*.jpg"))
        moved = augment(root / f"out{counts[-1]}", device)
    return {
        "environment": {**environment.describe(device, kept), "share_of_others": use.share_of_others()},
        "size": SIZE,
        "batch": BATCH,
        "workers": WORKERS,
        "jpeg_bytes": round(bytes_per_file),
        "pinned": device == "cuda",
        "packed": packed,
        "jpeg": files,
        "litdata": streamed,
        "ratio": packed["images_per_second"] / files["images_per_second"],
        "ratio_first_epoch": packed["first_epoch"] / files["images_per_second"],
        "augment": moved,
        "prepare": made,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m debiaskd.bench.data", description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000], help="of images to prepare")
    parser.add_argument("--decoded", type=int, default=2000, help="JPEG files read in an epoch (default 2000)")
    parser.add_argument("--epochs", type=int, default=3, help="of which the median is taken (default 3)")
    parser.add_argument("--out", type=Path, help="where data-DATE.json goes; nothing is written without it")
    parser.add_argument("--prepare", type=Path, nargs=2, metavar=("SRC", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.prepare:
        print(json.dumps(prepare_here(*options.prepare)))
        return 0
    results = measure(options.counts, options.decoded, options.epochs)
    print(
        f"packed {results['packed']['images_per_second']:.0f} images/s, JPEG {results['jpeg']['images_per_second']:.0f}"
    )
    print(f"{results['ratio']:.0f} times")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"data-{results['environment']['date']}.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
