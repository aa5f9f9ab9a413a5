"""`SmallNet` speaks timm's protocol."""

import pytest
import torch
from torch import nn

from debiaskd.models import SmallNet


def test_small_net_speaks_the_protocol():
    net = SmallNet((4, 6), (2, 1), 3).eval()
    images = torch.randn(2, 3, 16, 16)
    feature = net.forward_features(images)
    assert feature.shape == (2, 6, 8, 8)
    torch.testing.assert_close(net.forward_head(feature), net(images))
    pooled = net.forward_head(feature, pre_logits=True)
    torch.testing.assert_close(net.get_classifier()(pooled), net(images))
    assert isinstance(net.get_classifier(), nn.Linear)
    with pytest.raises(ValueError, match="widths and strides must be as many"):
        SmallNet((4, 6), (2,), 3)
