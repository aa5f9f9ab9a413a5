"""Networks: registry, weights, input contracts, and the split into body and head."""

from debiaskd.models.zoo.small import CifarResNet, SmallNet

__all__ = ["CifarResNet", "SmallNet"]
