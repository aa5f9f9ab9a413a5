"""Seeding the generators of one device."""

import torch

from debiaskd.training.fabric import seed_device


def test_seed_device_seeds_as_manual_seed_and_leaves_other_devices_alone(monkeypatch):
    torch.manual_seed(5)
    expected = torch.rand(3)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: 1 / 0)  # slow where CUDA is not in use
    seed_device(5, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)
