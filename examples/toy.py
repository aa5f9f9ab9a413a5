"""What the examples learn from: digits on photographs that mostly give the label away, and a teacher that reads digits.

They stand where your data and your debiased teacher go.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import debiaskd as dk
from debiaskd.cli.quickstart_loop import Schedule, fit, in_batches, to_float
from debiaskd.data.sources import digits
from debiaskd.metrics import group_accuracy
from debiaskd.models import SmallNet

CLASSES = len(digits.LABELS)


def pictures(count: int) -> tuple[digits.Pictures, digits.Pictures]:
    """`count` pictures of 32×32 pixels to train on, and others to judge by."""
    drawn = digits.load(0, train=count, test=1000, size=32)
    return drawn.train, drawn.test


def large() -> SmallNet:
    return SmallNet((24, 48, 96), (2, 2, 2), CLASSES)


def small() -> SmallNet:
    return SmallNet((8, 16, 32), (2, 2, 2), CLASSES)


def debiased(model: nn.Module, known: digits.Pictures, epochs: int = 6) -> nn.Module:
    """`model`, trained on the four groups of pictures equally often."""

    def loss(model: nn.Module, images: Tensor, index: Tensor) -> Tensor:
        output = model(images)
        return F.cross_entropy(getattr(output, "logits", output), known.labels[index])

    schedule, order = Schedule(epochs, batch=64), torch.Generator().manual_seed(0)
    fit(model, to_float(known.images), loss, schedule, generator=order, sampling=dk.group_weights(known.groups))
    return model.eval()


def worst_group(model: nn.Module, unseen: digits.Pictures) -> float:
    """Accuracy in percent, in the group that the model does worst on."""
    training = model.training
    correct = in_batches(model.eval(), to_float(unseen.images)).argmax(1) == unseen.labels
    model.train(training)
    return group_accuracy(correct, unseen.groups, unseen.groups).worst_group
