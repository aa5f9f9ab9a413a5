"""RandAugment's operations are torchvision's, each image has its own, and boxes and masks go with the pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from debiaskd.boxes import Boxes
from debiaskd.data import Augment, Batch, rand_augment
from debiaskd.data.rand_augment import OPERATIONS, Warp
from debiaskd.masks import Masks

pytestmark = pytest.mark.usefixtures("one_thread")

transforms = pytest.importorskip("torchvision.transforms.v2", reason="torchvision is not installed")

HEIGHT, WIDTH = 40, 52


def images(count: int = 3) -> Tensor:
    """uint8: of all levels; of few, smooth; one with a channel of a single level."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (count, 3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)
    pixels[1] = torch.linspace(30, 190, HEIGHT * WIDTH).view(HEIGHT, WIDTH).to(torch.uint8)
    pixels[2, 1] = 77
    return pixels


def torchvision_name(name: str) -> str:
    return {"auto_contrast": "AutoContrast"}.get(name, "".join(part.title() for part in name.split("_")))


def by_torchvision(image: Tensor, name: str, magnitude: int, sign: int) -> Tensor:
    """What its RandAugment makes of an image where it has but one operation to draw."""
    strengths, signed = transforms.RandAugment._AUGMENTATION_SPACE[torchvision_name(name)]

    class One(transforms.RandAugment):  # type: ignore[misc, name-defined]
        _AUGMENTATION_SPACE = {  # noqa: RUF012
            torchvision_name(name): (
                lambda *size: None if (found := strengths(*size)) is None else found * (sign if signed else 1),
                False,
            )
        }

    return One(num_ops=1, magnitude=magnitude)(image)


def draws(name: str, sign: int, count: int) -> Tensor:
    return torch.tensor([(OPERATIONS.index(name) + 0.5) / len(OPERATIONS), 0.25 if sign < 0 else 0.75]).expand(count, 2)


def source_is_sure(name: str, magnitude: int, sign: int) -> Tensor:
    """bool [H,W]: no edge between two pixels of the image is where a pixel of the result has its centre, so that
    rounding does not decide which of them it shows."""
    chosen = torch.tensor([OPERATIONS.index(name)])
    warp = Warp(chosen, torch.tensor([float(sign)]), magnitude, (HEIGHT, WIDTH))
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    place = torch.einsum("ij,jhw->ihw", warp.columns[0], torch.stack([x, y])) + warp.offsets[0][:, None, None]
    return ((place - place.round()).abs() > 1e-3).all(0)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("magnitude", [0, 9, 17, 30])
def test_each_operation_is_torchvisions_of_the_same_magnitude(name: str, magnitude: int) -> None:
    for sign in (-1, 1):
        pixels = images()
        found, _ = rand_augment.rand_augment(
            pixels.float(), [], draws(name, sign, len(pixels)), magnitude, (HEIGHT, WIDTH)
        )
        expected = torch.stack([by_torchvision(one, name, magnitude, sign) for one in pixels]).float()
        assert torch.equal(found, found.floor())
        if OPERATIONS.index(name) in rand_augment._GEOMETRIC:
            sure = source_is_sure(name, magnitude, sign)
            assert sure.float().mean() > 0.95
            assert torch.equal(found[:, :, sure], expected[:, :, sure])
        elif name in ("brightness", "color", "contrast", "sharpness", "auto_contrast"):  # cut off in float32
            assert (found - expected).abs().max() <= 1
        else:
            assert torch.equal(found, expected)


def test_each_image_has_its_own_operations_one_after_the_other() -> None:
    names = [("solarize", "translate_x"), ("identity", "equalize"), ("posterize", "brightness")]
    drawn = torch.stack([torch.cat([draws(name, 1, 1)[0] for name in pair]) for pair in names])
    found, _ = rand_augment.rand_augment(images().float(), [], drawn, 12, (HEIGHT, WIDTH))
    for image, one, pair in zip(images(), found, names):
        for name in pair:
            image = by_torchvision(image, name, 12, 1)
        assert (one - image.float()).abs().max() <= 1


def test_images_are_changed_alike_where_they_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(32, 3, 12, 10, generator=generator) * 255
    drawn = torch.rand(32, 4, generator=generator)
    boxes = [Boxes.from_lists([[[2, 3, 9, 8]]] * 32)]
    expected, _ = rand_augment.rand_augment(pixels, boxes, drawn, 9, (12, 10))

    def without_counting(pixels: Tensor, chosen: Tensor, change: Any, *amounts: Tensor) -> Tensor:
        return torch.where(chosen[:, None, None, None], change(pixels, *amounts), pixels)

    monkeypatch.setattr(rand_augment, "_where", without_counting)
    found, _ = rand_augment.rand_augment(pixels, boxes, drawn, 9, (12, 10))
    assert torch.equal(found, expected)


GEOMETRIC = [OPERATIONS[place] for place in rand_augment._GEOMETRIC]


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("name", [*GEOMETRIC, "solarize"])
def test_boxes_and_masks_go_with_the_pixels(name: str, scale: int) -> None:
    """The image shows its own mask, and masks and boxes are in pixels of a result `scale` times as large."""
    rows = [[4, 6, 21, 19], [30, 25, 52, 40]]
    boxes = Boxes.from_lists([rows], [[0, 1]])
    shown = boxes.mask((HEIGHT, WIDTH)).float()[:, None].expand(1, 3, -1, -1) * 100
    large = Boxes.from_lists([[[scale * side for side in row] for row in rows]], [[0, 1]])
    each = torch.stack([large.for_class(torch.tensor([k])).mask((scale * HEIGHT, scale * WIDTH))[0] for k in (0, 1)])
    large = large.with_masks(Masks.from_lists([each], [[0, 1]]))
    for sign in (-1, 1):
        size = (scale * HEIGHT, scale * WIDTH)
        pixels, (moved,) = rand_augment.rand_augment(shown, [large], draws(name, sign, 1), 20, size)
        seen = pixels[0, 0] > 0 if name != "solarize" else shown[0, 0] > 0
        assert moved.masks is not None
        mask = moved.masks.union()
        dense = moved.masks.dense().any(0)
        assert mask.shape[0] == 1
        if scale == 1:
            assert torch.equal(dense, seen)
        else:  # the centres of its pixels lie elsewhere
            enlarged = seen.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
            assert (dense != enlarged).float().mean() < 0.03
        # A box is as small as its mask allows, but for what a rotated or sheared one takes in besides.
        for box, one in zip(moved.coords.tolist(), moved.masks.dense()):
            ys, xs = one.nonzero().unbind(1)
            around = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
            if name.startswith(("shear", "rotate")):
                assert all(inner - outer in range(2 * scale) for inner, outer in zip(around[:2], box[:2]))
                assert all(outer - inner in range(2 * scale) for inner, outer in zip(around[2:], box[2:]))
            else:
                assert around == box


def test_a_box_that_leaves_the_image_is_removed() -> None:
    boxes = Boxes.from_lists([[[0, 0, 5, 40]], [[0, 0, 5, 40]]])
    drawn = torch.cat([draws("translate_x", -1, 1), draws("translate_x", 1, 1)])
    _, (moved,) = rand_augment.rand_augment(torch.zeros(2, 3, HEIGHT, WIDTH), [boxes], drawn, 30, (HEIGHT, WIDTH))
    assert moved.offsets.tolist() == [0, 0, 1]
    assert moved.coords.tolist() == [[23, 0, 28, 40]]
    assert moved.annotated.all()


def test_augment_draws_two_numbers_an_operation_and_none_more_without() -> None:
    drawn = []

    def draw(shape: tuple[int, ...], device: torch.device) -> Tensor:
        drawn.append(shape)
        return torch.rand(shape, generator=torch.Generator().manual_seed(1))

    batch = Batch(images(), torch.zeros(3), Boxes.from_lists([[[1, 1, 5, 5]]] * 3))
    options: dict[str, Any] = {"flip": False, "mean": None, "std": None}
    made = Augment(None, rand_augment=(2, 9), **options)(batch, draw)
    assert drawn == [(3, 4)]
    rand = torch.rand((3, 4), generator=torch.Generator().manual_seed(1))
    pixels, (boxes,) = rand_augment.rand_augment(batch.images.float(), [batch.boxes], rand, 9, (HEIGHT, WIDTH))
    assert torch.equal(made.images, pixels / 255)
    assert torch.equal(made.boxes.coords, boxes.coords)
    assert Augment(None, **options)(batch, draw).images.equal(batch.images / 255)
    assert len(drawn) == 1


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        ((2,), ValueError, r"rand_augment must be \(operations, magnitude\), got \(2,\)"),
        ((2, 31), ValueError, r"magnitude in 0..30\), got \(2, 31\)"),
        ((0, 9), ValueError, r"operations >= 1, .* got \(0, 9\)"),
        ((2, 9.5), TypeError, "rand_augment must be an integer, got 9.5"),
    ],
)
def test_values_out_of_range_are_refused(value: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Augment(None, rand_augment=value)
