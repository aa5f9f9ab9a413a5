"""Epochs in which each image is drawn as often as its weight says."""

import torch

from debiaskd.data import EpochSampler


def test_an_epoch_drawn_by_weight() -> None:
    weights = torch.tensor([0.0, 1.0, 2.0, 5.0]).repeat(1000)

    def order(seed: int, epoch: int, start: int = 0, **options: int) -> list[int]:
        sampler = EpochSampler(range(4000), seed=seed, weights=weights, **options)
        sampler.start_at(epoch, start)
        return list(sampler)

    first = order(3, 1)
    assert len(first) == 4000 and len(set(first)) < 3000, "with replacement"
    shares = torch.tensor(first).remainder(4).bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.125, 0.25, 0.625]), rtol=0, atol=0.03)
    torch.manual_seed(99)
    assert first == order(3, 1) and first != order(3, 2) and first != order(4, 1)
    assert order(3, 1, 1000) == first[1000:]
    ranks = [order(3, 1, rank=rank, world_size=2) for rank in (0, 1)]
    assert [number for pair in zip(*ranks) for number in pair] == first
