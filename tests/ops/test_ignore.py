"""Areas to be ignored in the localization losses: neither inside nor outside, in values and in gradients."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import term_cases as cases
import torch
from torch import nn

import debiaskd as dk
from debiaskd.models import SmallNet
from debiaskd.ops.ignore import judged
from debiaskd.terms import GuideOptions, make_guide
from debiaskd.terms.guidance import GuideTerm

SIZE = (12, 10)
BOXES = [[[1, 1, 5, 6]], [[0, 0, 4, 12], [3, 3, 8, 8]], [], None]
#: Beside the box, across it, alone, and of an image of which nothing is known.
IGNORE = [[[6, 2, 10, 9]], [[2, 6, 9, 12]], [[0, 0, 3, 3]], [[0, 0, 9, 9]]]


def covered(rows: Any) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    for x0, y0, x1, y1 in rows or []:
        mask[y0:y1, x0:x1] = True
    return mask


def oracle(kind: str, maps: torch.Tensor, normalize: bool) -> list[float]:
    """The formulas over the pixels that are judged, each image by itself, in float64."""
    found = []
    for one, rows, areas in zip(maps.double().numpy(), BOXES, IGNORE):
        inside = covered(rows)
        kept = inside | ~covered(areas)
        a, inside = one[kept], inside[kept]
        if normalize and kind in ("l1", "ppce"):
            a = np.maximum(a, 0)
        if normalize and kind != "energy":
            a = a / (np.abs(a).max() or 1)
        if rows is None:
            found.append(0.0)
        elif kind == "energy":
            found.append(1 - np.maximum(a, 0)[inside].sum() / (np.maximum(a, 0).sum() or 1))
        elif kind == "l1":
            found.append(np.abs(a - inside).mean())
        elif kind == "ppce":
            logs = np.log(a[inside], where=a[inside] > 0, out=np.full(inside.sum(), -100.0)).clip(-100)
            found.append(-logs.mean() if inside.any() else 0.0)
        else:
            found.append(np.square(a[~inside]).sum())
    return found


@pytest.mark.parametrize("kind", ["energy", "l1", "ppce", "rrr"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("backend", ["eager", None])
def test_the_formulas_over_what_is_judged(kind: str, normalize: bool, backend: str | None) -> None:
    torch.manual_seed(0)
    maps = torch.rand(4, *SIZE, dtype=torch.float64)
    maps[0, 4, 8] = 7  # the largest value lies in an ignored area
    if normalize:
        maps -= 0.3
    boxes, ignore = dk.Boxes.from_lists(BOXES), dk.Boxes.from_lists(IGNORE)
    with dk.backend(backend) if backend else nullcontext():
        found = dk.localization_loss(maps, boxes, kind=kind, normalize=normalize, reduction="none", ignore=ignore)
        mean = dk.localization_loss(maps, boxes, kind=kind, normalize=normalize, ignore=ignore)
    torch.testing.assert_close(found, torch.tensor(oracle(kind, maps, normalize), dtype=torch.float64))
    torch.testing.assert_close(mean, found.sum() / 3)


@pytest.mark.parametrize("kind", ["energy", "l1", "ppce", "rrr"])
@pytest.mark.parametrize("normalize", [False, True])
def test_what_is_ignored_has_no_say_and_gets_no_gradient(kind: str, normalize: bool) -> None:
    torch.manual_seed(0)
    boxes, ignore = dk.Boxes.from_lists(BOXES[:2]), dk.Boxes.from_lists(IGNORE[:2])
    dropped = torch.from_numpy(np.stack([covered(a) & ~covered(b) for a, b in zip(IGNORE, BOXES)][:2]))
    losses = []
    for value in (0.0, 50.0):
        maps = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(1)).masked_fill(dropped, value)
        loss = dk.localization_loss(maps.requires_grad_(), boxes, kind=kind, normalize=normalize, ignore=ignore)
        (gradient,) = torch.autograd.grad(loss, maps)
        assert not gradient[dropped].any() and gradient[~dropped].any()
        losses.append(loss)
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("kind", ["energy", "l1", "ppce", "rrr"])
def test_gradients_of_small_maps(kind: str) -> None:
    torch.manual_seed(0)
    maps = (torch.rand(2, 3, 4, dtype=torch.float64) + 0.1).requires_grad_()
    boxes, ignore = dk.Boxes.from_lists(BOXES[:2]), dk.Boxes.from_lists(IGNORE[:2])

    def loss(maps: torch.Tensor) -> torch.Tensor:
        return dk.localization_loss(maps, boxes, kind=kind, size=SIZE, normalize=True, ignore=ignore)

    assert torch.autograd.gradcheck(loss, maps)


@pytest.mark.parametrize("kind", ["energy", "l1", "ppce", "rrr"])
def test_without_any_such_area_nothing_changes(kind: str) -> None:
    maps, boxes = torch.rand(4, 3, 4), dk.Boxes.from_lists(BOXES)
    plain = dk.localization_loss(maps, boxes, kind=kind, size=SIZE, normalize=True, reduction="none")
    inside = [[[2, 2, 4, 4]], [[0, 0, 3, 9]], [], []]  # of a box
    for areas in ([[]] * 4, [None] * 4, inside):
        ignore = dk.Boxes.from_lists(areas)
        found = dk.localization_loss(maps, boxes, kind=kind, size=SIZE, normalize=True, reduction="none", ignore=ignore)
        torch.testing.assert_close(found, plain)
    module = dk.LocalizationLoss(kind=kind, size=SIZE, normalize=True, reduction="none")
    some = dk.Boxes.from_lists(IGNORE)
    expected = dk.localization_loss(maps, boxes, kind=kind, size=SIZE, normalize=True, reduction="none", ignore=some)
    assert torch.equal(module(maps, boxes, some), expected) and not torch.equal(expected, plain)


def test_areas_that_do_not_fit() -> None:
    maps, boxes = torch.rand(4, 3, 4), dk.Boxes.from_lists(BOXES)
    with pytest.raises(TypeError, match=r"^ignore must be a dk.Boxes, got list$"):
        dk.energy_loss(maps, boxes, ignore=[])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^ignore must be of N=4 images, as boxes are, got 1$"):
        dk.energy_loss(maps, boxes, ignore=dk.Boxes.from_lists([[]]))
    guide = dk.Guide(SmallNet((4,), (2,), 2))
    with pytest.raises(ValueError, match=r"^ignore must be of N=4 images, got 1$"):
        guide(torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), boxes, dk.Boxes.from_lists([[]]))


def test_an_image_of_nothing_but_ignored_areas_of_its_class_is_not_judged() -> None:
    boxes = dk.Boxes.from_lists([[[0, 0, 4, 4]], [[0, 0, 4, 4]], [], [[0, 0, 4, 4]]], [[1], [0], [], [0]])
    ignore = dk.Boxes.from_lists([[[4, 4, 8, 8]]] * 4, [[1], [1], [0], [1]])
    ignore = ignore.annotated_where(torch.tensor([True, True, True, False]))  # of the last nothing is known
    found, areas = judged(boxes, torch.tensor([1, 1, -1, 1]), ignore)
    assert found.annotated.tolist() == [True, False, False, True]
    assert areas is not None and areas.mask((8, 8)).sum((1, 2))[:3].tolist() == [16, 16, 0]


def test_guidance_leaves_them_out() -> None:
    torch.manual_seed(0)
    model: nn.Module = SmallNet((4, 6), (2, 1), 3).eval()
    images, target = torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 2])
    boxes = dk.Boxes.from_lists([[[0, 0, 8, 8]], [], [[2, 2, 9, 9]]], [[0], [], [2]])
    ignore = dk.Boxes.from_lists([[[8, 0, 16, 16]], [[0, 0, 9, 9]], []], [[0], [1], []])
    for layer in ("Final", "Input"):
        guide = dk.Guide(model, layer, reduction="sum")
        _, loss, maps = guide(images, target, boxes, ignore)
        rows = [
            dk.energy_loss(maps[i : i + 1], boxes[[i]], size=(16, 16), ignore=ignore[[i]], reduction="sum")
            for i in (0, 2)
        ]
        torch.testing.assert_close(loss, rows[0] + rows[1])
        assert not torch.allclose(loss, guide(images, target, boxes).loss)


def test_the_term_divides_by_those_that_are_judged() -> None:
    torch.manual_seed(0)
    model = SmallNet((4, 6), (2, 1), 3).eval()
    guide = make_guide(GuideOptions(), model)
    images, target = torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 2])
    boxes = dk.Boxes.from_lists([[[0, 0, 8, 8]], [], [[2, 2, 9, 9]]], [[0], [], [2]])
    ignore = dk.Boxes.from_lists([[[8, 0, 16, 16]], [[0, 0, 9, 9]], []], [[0], [1], []])
    state = cases.state(
        images=images, target=target, boxes=boxes, ignore=ignore, seen=guide.watch(images), ranks=cases.ranks()
    )
    loss = GuideTerm(GuideOptions(), guide)(state)
    torch.testing.assert_close(loss, dk.Guide(model)(images, target, boxes, ignore).loss)
