"""Localization losses: what must move is the map once and its gradient once, and for energy one bit a pixel twice."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.boxes import Boxes
from debiaskd.ops.localization import eager, localization_loss

from .harness import Case
from .report import Goal

MAIN = "energy 64×224×224, 3 boxes"
MANY = "energy 64×224×224, 60 boxes"
TINY = "energy 1×4×4, 1 box"
LARGE = "energy 1024×256×256, 3 boxes"
GOALS = (
    Goal(MAIN, "cpp", "eager", 25.0),
    Goal(MAIN, "cpp", "plain", 25.0),
    Goal(MAIN, "cpp", "loop", 60.0),
    Goal(MAIN, "cpp", "clone", 1 / 4),
    *(Goal(LARGE, name, "compile", 1.3) for name in ("cuda", "triton")),
    *(Goal(MAIN, name, "loop", 100) for name in ("cuda", "triton")),
)


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    if quick:
        yield case("energy 2×8×8, 2 boxes", (2, 8, 8), 2, device)
        yield case("energy 2×2×2 to 8×8, 2 boxes", (2, 2, 2), 2, device, size=(8, 8))
        return
    full = (64, 224, 224)
    for count in (3, 0, 1, 10, 30, 60):
        yield case(f"energy 64×224×224, {count} box{'es' if count != 1 else ''}", full, count, device)
    for kind in ("l1", "ppce", "rrr"):
        yield case(f"{kind} 64×224×224, 3 boxes", full, 3, device, kind=kind)
    yield case(f"{MAIN}, bfloat16", full, 3, device, dtype=torch.bfloat16)
    for side in (7, 14):
        yield case(f"energy 64×{side}×{side} to 224×224, 3 boxes", (64, side, side), 3, device, size=(224, 224))
    if device == "cuda":
        yield case(LARGE, (1024, 256, 256), 3, device)
    yield tiny(device)


def case(
    name: str,
    shape: tuple[int, int, int],
    count: int,
    device: str,
    *,
    kind: str = "energy",
    size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Case:
    output = size or (shape[1], shape[2])
    boxes = random_boxes(shape[0], count, output).to(device)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if kind in ("l1", "ppce"):
        values = values.abs() / values.abs().amax((1, 2), keepdim=True)  # maps in [0, 1], as these kinds expect
    leaf = values.to(device, dtype).requires_grad_()
    pixels = leaf.numel() * leaf.element_size()
    bits = leaf.numel() // 8 if kind == "energy" and size is None else 0
    references = {}
    if kind == "energy":
        corners = corner_lists(boxes)  # public code holds them as lists, made once by its data loader
        references["loop"] = lambda a: loop(a, corners, size)
        mask = boxes.mask(output)
        references["mask ready"] = lambda a: masked(a, mask, size)
        if size is None and count:
            padded = boxes.coords.reshape(shape[0], count, 4)
            references["plain"] = lambda a: plain(a, padded)
    return Case(
        op="localization",
        name=name,
        leaf=leaf,
        eager=lambda a: eager(a, boxes, kind, output, "mean"),
        public=lambda a: localization_loss(a, boxes, kind=kind, size=size),
        reference=lambda a: eager(a, boxes, kind, output, "mean"),
        forward_bytes=pixels + bits,
        # What energy needs of its map is in the bits; the others, and an upsampled map, read it again.
        backward_bytes=pixels + (bits if bits else pixels),
        references=references,
    )


def tiny(device: str) -> Case:
    """Nothing but the cost of a call. The cheapest form in PyTorch has its mask already."""
    small = case(TINY, (1, 4, 4), 1, device)
    mask = random_boxes(1, 1, (4, 4)).to(device).mask((4, 4)).float()

    def cheapest(attribution: Tensor) -> Tensor:
        positive = attribution.clamp(min=0)
        return 1 - (positive * mask).sum() / positive.sum()

    small.references = {"cheapest": cheapest}
    return small


def random_boxes(images: int, count: int, size: tuple[int, int]) -> Boxes:
    """`count` boxes an image, each side between a fourteenth and a half of the image's, anywhere."""
    generator = torch.Generator().manual_seed(1)
    sides = torch.tensor([size[1], size[0]])
    extent = (sides * (1 / 14 + torch.rand(images, count, 2, generator=generator) * (1 / 2 - 1 / 14))).ceil().long()
    start = (torch.rand(images, count, 2, generator=generator) * (sides - extent + 1)).long()
    return Boxes.from_lists(list(torch.cat([start, start + extent], 2)))


def corner_lists(boxes: Boxes) -> list[list[list[int]]]:
    return [one.coords.tolist() for one in boxes]


def loop(attribution: Tensor, corners: list[list[list[int]]], size: tuple[int, int] | None) -> Tensor:
    """One image after the other, one box after the other: how research code is usually written."""
    losses = []
    for one, image_boxes in zip(attribution.float() if attribution.dtype != torch.float64 else attribution, corners):
        if size is not None:
            one = F.interpolate(one[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        positive = one.clamp(min=0)
        mask = torch.zeros_like(positive, dtype=torch.long)
        for x0, y0, x1, y1 in image_boxes:
            mask[y0:y1, x0:x1] = 1
        inside = positive[torch.where(mask == 1)].sum()
        total = positive.sum()
        losses.append(1 - inside if total < 1e-7 else 1 - inside / total)
    return torch.stack(losses).mean()


def plain(attribution: Tensor, padded: Tensor) -> Tensor:
    """The batched form as one writes it first: every pixel is compared with each of its image's boxes [N,B,4]."""
    rows = torch.arange(attribution.shape[1], device=attribution.device)[:, None]
    columns = torch.arange(attribution.shape[2], device=attribution.device)
    x0, y0, x1, y1 = padded[..., None, None].unbind(2)
    mask = ((columns >= x0) & (columns < x1) & (rows >= y0) & (rows < y1)).any(1)
    return masked(attribution, mask, None)


def masked(attribution: Tensor, mask: Tensor, size: tuple[int, int] | None) -> Tensor:
    """The batched form with its mask already there, which is what eager would cost if building masks were free."""
    maps = attribution.to(torch.promote_types(attribution.dtype, torch.float32))
    if size is not None:
        maps = F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    positive = maps.clamp(min=0)
    total, inside = positive.sum((1, 2)), (positive * mask).sum((1, 2))
    return (1 - inside / torch.where(total < 1e-7, 1, total)).mean()
