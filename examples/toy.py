"""What the examples learn from: digits on photographs that mostly give the label away, and a teacher that reads digits.

They stand where your data and your debiased teacher go.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import debiaskd as dk
from debiaskd.data.sources import digits
from debiaskd.metrics import group_accuracy
from debiaskd.models import SmallNet

CLASSES = len(digits.LABELS)


def pictures(count: int) -> tuple[digits.Pictures, digits.Pictures]:
    """`count` images of 32×32 pixels to train on, and others to judge by."""
    drawn = digits.load(0, train=count, test=1000, size=32)
    return drawn.train, drawn.test


def to_float(images: Tensor) -> Tensor:
    """uint8 [N,3,S,S] to float32 about zero, channels last, the faster layout on CPUs."""
    return ((images.float() - 128) / 64).contiguous(memory_format=torch.channels_last)


def large() -> SmallNet:
    return SmallNet((24, 48, 96), (2, 2, 2), CLASSES)


def small() -> SmallNet:
    return SmallNet((8, 16, 32), (2, 2, 2), CLASSES)


def debiased(model: nn.Module, known: digits.Pictures, epochs: int = 6) -> nn.Module:
    """`model`, trained on the four groups of images equally often."""
    order = torch.Generator().manual_seed(0)
    sampler = WeightedRandomSampler(dk.group_weights(known.groups).tolist(), len(known), generator=order)
    samples = TensorDataset(to_float(known.images), known.labels)
    batches = DataLoader(samples, 64, sampler=sampler, drop_last=True, generator=order)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, epochs * len(batches) + 1)
    model.train()
    for _ in range(epochs):
        for images, labels in batches:
            output = model(images)
            optimizer.zero_grad()
            F.cross_entropy(getattr(output, "logits", output), labels).backward()
            optimizer.step()
            cycle.step()
    return model.eval()


@torch.no_grad()
def worst_group(model: nn.Module, unseen: digits.Pictures) -> float:
    """Accuracy in percent, in the group that the model does worst on."""
    training = model.training
    model.eval()
    logits = torch.cat([model(part) for part in to_float(unseen.images).split(500)])
    model.train(training)
    return group_accuracy(logits.argmax(1) == unseen.labels, unseen.groups, unseen.groups).worst_group
