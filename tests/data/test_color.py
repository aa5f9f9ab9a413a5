"""Colours are changed as torchvision's functions of the same names do, each image by its own amount."""

from __future__ import annotations

import pytest
import torch

from debiaskd.boxes import Boxes
from debiaskd.data import Augment, Batch, color

functional = pytest.importorskip("torchvision.transforms.v2.functional", reason="torchvision is not installed")


def images(count: int = 4) -> torch.Tensor:
    """Random ones, with pixels of equal channels and of none among them."""
    pixels = torch.rand(count, 3, 9, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pixels[0, :, :3] = pixels[0, :1, :3]
    pixels[1, :, 4] = 0
    pixels[2, 1] = pixels[2, 0]
    return pixels


@pytest.mark.parametrize(
    ("name", "amounts"),
    [
        ("adjust_brightness", (0.0, 0.4, 1.0, 2.5)),
        ("adjust_contrast", (0.0, 0.4, 1.0, 2.5)),
        ("adjust_saturation", (0.0, 0.4, 1.0, 2.5)),
        ("adjust_hue", (-0.5, -0.13, 0.2, 0.5)),
    ],
)
def test_each_image_is_changed_as_torchvision_changes_it(name: str, amounts: tuple[float, ...]) -> None:
    pixels = images()
    found = getattr(color, name)(pixels, torch.tensor(amounts, dtype=torch.float64))
    expected = torch.stack([getattr(functional, name)(one, amount) for one, amount in zip(pixels, amounts)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def batch(count: int = 4) -> Batch:
    pixels = (images(count) * 255).round().to(torch.uint8)
    return Batch(pixels, torch.zeros(count, dtype=torch.int64), Boxes.from_lists([[[1, 1, 5, 5]]] * count))


def test_augment_draws_each_images_colours_and_none_more_without() -> None:
    drawn = []

    def draw(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        drawn.append(shape)
        return torch.rand(shape, generator=torch.Generator().manual_seed(len(drawn)))

    strength = (0.4, 0.3, 0.2, 0.1)
    made = Augment(None, flip=False, color_jitter=strength, mean=None, std=None)(batch(), draw)
    assert drawn == [(4, 4)]
    rand = torch.rand((4, 4), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(made.images, color.jitter_colors(batch().images / 255, rand, strength))
    assert torch.equal(made.boxes.coords, batch().boxes.coords)
    drawn.clear()
    plain = Augment(None, color_jitter=None, mean=None, std=None)(batch(), draw)
    assert drawn == [(4,)]
    assert not torch.equal(plain.images, made.images)


@pytest.mark.parametrize(
    ("strength", "text"),
    [
        ((0.1, 0.1, 0.1), r"color_jitter must be \(brightness, contrast, saturation, hue\), got \(0.1, 0.1, 0.1\)"),
        ((-0.1, 0, 0, 0), "brightness must be"),
        ((0, 0, 0, 0.6), r"hue must lie in \[0, 0.5\], got 0.6"),
    ],
)
def test_strengths_out_of_range_are_refused(strength: tuple[float, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Augment(None, color_jitter=strength)  # type: ignore[arg-type]
