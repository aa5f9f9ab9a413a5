"""mixup and CutMix: shares are Beta distributed, and say how much of an image is its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from debiaskd.boxes import Boxes
from debiaskd.data import Augment, Batch
from debiaskd.data.mixing import Beta, Mixing

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 4.0, 30.0])
def test_shares_are_beta_distributed(alpha: float) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    uniform = torch.linspace(0.001, 0.999, 999)
    expected = torch.from_numpy(stats.beta(alpha, alpha).ppf(uniform.double().numpy()))
    torch.testing.assert_close(Beta(alpha)(uniform).double(), expected, rtol=0, atol=1e-4)
    assert torch.equal(Beta(alpha)(torch.tensor([0.5])), torch.tensor([0.5]))


def test_shares_of_the_arcsine_law_are_its_quantiles() -> None:
    uniform = torch.linspace(0, 0.999, 1000)
    torch.testing.assert_close(Beta(0.5)(uniform), (torch.pi / 2 * uniform).sin() ** 2, rtol=0, atol=1e-6)


def images(count: int = 200) -> torch.Tensor:
    """Each of one level, which is its number."""
    return torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 3, 14, 20)


def test_mixup_takes_the_same_share_everywhere() -> None:
    mixed = Mixing(0.4, None)(images(), torch.rand(200, 4, generator=torch.Generator().manual_seed(0)))
    assert mixed.partner.tolist() == [199, *range(199)]
    own, other = torch.arange(200.0), mixed.partner.float()
    expected = mixed.share * own + (1 - mixed.share) * other
    torch.testing.assert_close(mixed.images, expected[:, None, None, None].expand_as(mixed.images))
    assert mixed.share.unique().numel() > 190


def test_cutmix_shows_a_window_of_the_partner_of_which_the_share_is_counted() -> None:
    mixed = Mixing(None, 1.0)(images(), torch.rand(200, 4, generator=torch.Generator().manual_seed(0)))
    own = mixed.images == images()
    assert torch.equal(~own, mixed.images == images()[mixed.partner])
    torch.testing.assert_close(mixed.share, own[:, 0].float().mean((1, 2)))
    for inside, share in zip(~own[:, 0], mixed.share.tolist()):  # a rectangle
        rows, columns = inside.any(1), inside.any(0)
        assert int(inside.sum()) == int(rows.sum()) * int(columns.sum())
        assert share <= 1


def test_windows_are_as_large_as_drawn_and_cut_off_at_the_edge() -> None:
    draws = torch.tensor([[0.0, 0.36, 0.5, 0.5], [0.0, 0.36, 0.0, 0.0]])  # alpha 1: the share is the number itself
    mixed = Mixing(None, 1.0)(images(2).expand(2, 3, 14, 20)[:, :1].expand(2, 1, 14, 20), draws)
    inside = mixed.images[:, 0] != torch.arange(2.0)[:, None, None]
    assert inside[0, 2:13, 2:18].all()
    assert int(inside[0].sum()) == 11 * 16  # 0.8 of 14 and of 20
    assert inside[1, :6, :8].all()
    assert int(inside[1].sum()) == 6 * 8


def test_with_both_each_image_is_mixed_in_one_way() -> None:
    draws = torch.rand(200, 4, generator=torch.Generator().manual_seed(0))
    both = Mixing(0.4, 1.0)(images(), draws)
    for alone, chosen in ((Mixing(None, 1.0), draws[:, 0] < 0.5), (Mixing(0.4, None), draws[:, 0] >= 0.5)):
        expected = alone(images(), draws)
        assert torch.equal(both.images[chosen], expected.images[chosen])
        assert torch.equal(both.share[chosen], expected.share[chosen])


def test_augment_mixes_last_and_says_how() -> None:
    pixels = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = Batch(pixels, torch.arange(4), Boxes.from_lists([[[1, 1, 5, 5]]] * 4))
    drawn = torch.rand((4, 4), generator=torch.Generator().manual_seed(1))
    made = Augment(None, flip=False, mixup=0.3, cutmix=1.0)(batch, lambda shape, device: drawn.view(shape))
    plain = Augment(None, flip=False)(batch)
    mixed = Mixing(0.3, 1.0)(plain.images, drawn)
    torch.testing.assert_close(made.images, mixed.images)
    assert made.partner is not None and made.share is not None
    assert torch.equal(made.partner, mixed.partner)
    assert torch.equal(made.share, mixed.share)
    assert torch.equal(made.target, batch.target)
    assert plain.partner is plain.share is None
    moved = made.to("cpu")
    assert moved.share is not None


@pytest.mark.parametrize(
    ("options", "text"),
    [({"mixup": 0}, "mixup must be"), ({"cutmix": float("nan")}, "cutmix must be"), ({"cutmix": "1"}, "cutmix must")],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        Augment(None, **options)
