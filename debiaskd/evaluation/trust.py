"""How far the metrics of an evaluation can be trusted: intervals, calibration, and whether maps are faithful."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from debiaskd.metrics import calibration_error, deletion, group_calibration_error, worst_group_interval
from debiaskd.terms import GuideOptions, make_guide
from debiaskd.training.batches import Split, SplitLoader
from debiaskd.training.validation import Judged
from debiaskd.utils import files


def trusted(judged: Judged, *, found: bool) -> dict[str, float]:
    """Figures that say how sure others are.

    Args:
        judged: of an evaluation.
        found: the groups were found, not annotated: then they are called environments.

    Returns:
        worst_group_low, worst_group_high: 95 % interval of the worst-group accuracy, by bootstrap within groups.
        ece: expected calibration error, 15 bins of equal mass. group_0_ece, …: of each group that has images.
        worst_group_ece: the largest of these.
    """
    figures = {"ece": calibration_error(judged.confidence, judged.correct)}
    if judged.groups is None:
        return figures
    kind = "environment" if found else "group"
    interval = worst_group_interval(judged.correct, judged.groups)
    by_group = group_calibration_error(judged.confidence, judged.correct, judged.groups)
    figures |= {f"worst_{kind}_low": interval.low, f"worst_{kind}_high": interval.high}
    figures[f"worst_{kind}_ece"] = max(by_group.values())
    return figures | {f"{kind}_{group}_ece": value for group, value in by_group.items()}


def write_judged(path: Path, judged: Judged) -> None:
    """Write what `read_judged` reads: correct uint8, confidence, index and, where there are any, groups, all [N]."""
    from safetensors.torch import save_file

    tensors = {"correct": judged.correct.to(torch.uint8), "confidence": judged.confidence, "index": judged.index}
    if judged.groups is not None:
        tensors["groups"] = judged.groups
    files.write(path, lambda unfinished: save_file(tensors, unfinished))


def read_judged(path: Path) -> Judged | None:
    """What an evaluation wrote of each image; None if there is no such file, or none that can be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
        correct, confidence, index = found["correct"].bool(), found["confidence"], found["index"]
    except (OSError, SafetensorError, KeyError):
        return None
    return Judged(correct, confidence, found.get("groups"), index)


def to_hex(correct: Tensor) -> str:
    """bool [N] as hexadecimal digits, two for eight images: for files of results.

    Example:
        >>> import torch
        >>> from debiaskd.evaluation.trust import from_hex, to_hex
        >>> to_hex(torch.tensor([True, False, True]))
        'a0'
        >>> from_hex("a0", 3)
        tensor([ True, False,  True])
    """
    return np.packbits(correct.numpy()).tobytes().hex()


def from_hex(text: str, count: int) -> Tensor:
    """What `to_hex` wrote of `count` images."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count)
    return torch.from_numpy(bits.astype(np.bool_))


def faithfulness(model: nn.Module, pictures: SplitLoader, options: GuideOptions) -> dict[str, float]:
    """Deletion curves of a model's maps of the true classes.

    Args:
        model: in evaluation mode, on the images' device.
        images: in order, of one class an image. `first_of_each` chooses a few.
        options: of the maps.

    Returns:
        deletion: mean area under the curve of the true class's probability, the pixels that its map ranks first blanked
            first; deletion_random: in a random order. Maps are faithful where the first is clearly smaller.
    """
    guide = make_guide(options, model)
    by_map, at_random = [], []
    for batch in pictures.dataloader:
        placed = pictures.transform(batch)
        maps = guide.attribute(placed.images, placed.target).detach()
        found = deletion(model, placed.images, maps, placed.target)
        by_map.append(found.by_map)
        at_random.append(found.at_random)
    return {"deletion": float(torch.cat(by_map).mean()), "deletion_random": float(torch.cat(at_random).mean())}


def first_of_each(split: Split, count: int) -> Split:
    """At most `count` images of a split, the first of each group (or class), the second of each, and so on."""
    return split.part(in_turns(split.target if split.groups is None else split.groups, count).sort().values)


def in_turns(groups: Tensor, count: int) -> Tensor:
    """FeatureLayers of at most `count` images, the first of each group, then the second of each, and so on."""
    rank = torch.empty_like(groups)
    for group in groups.unique():
        members = (groups == group).nonzero()[:, 0]
        rank[members] = torch.arange(len(members))
    return rank.argsort(stable=True)[:count]
