"""Networks: by name, with their weights, what they read, and cut into body and head."""

from debiaskd.models.zoo.small import CifarResNet, SmallNet

__all__ = ["CifarResNet", "SmallNet"]
