"""Where in the picture a class score comes from.

Behind global average pooling and a linear head, `∂logit_k/∂A = W_k / (H·W)` at every position of the last feature map
`A`. Input × gradient there is therefore `Σ_c W_kc A_c / (H·W)`, without a backward pass; Grad-CAM is its positive part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from debiaskd import checks
from debiaskd.ops.channel_dot import channel_dot


def final_layer_map(feature: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The attribution of one class a sample at the last feature map, in closed form.

    Holds where the logits are `W · mean_hw(A) + b`. Summed over positions it gives the target's logit without bias.

    Args:
        feature: [N,C,H,W] map before global average pooling.
        weight: [K,C] of the linear head.
        target: int64 [N], the class to explain, in [0,K).

    Returns:
        [N,H,W], positive where evidence for the class lies, negative where evidence against it lies.

    Raises:
        TypeError: not floating tensors, or a target that is not int64.
        ValueError: shapes that do not fit.

    Example:
        >>> import torch
        >>> from debiaskd.attribution import final_layer_map
        >>> feature, weight = torch.ones(1, 2, 2, 2), torch.tensor([[1.0, 3.0], [0.0, -4.0]])
        >>> final_layer_map(feature, weight, torch.tensor([0]))
        tensor([[[1., 1.],
                 [1., 1.]]])
    """
    checks.rank("feature", checks.floating("feature", feature), "[N,C,H,W]")
    checks.rank("weight", checks.floating("weight", weight), "[K,C]")
    checks.shape("weight", weight, "[K,C]", [weight.shape[0], feature.shape[1]])
    if checks.tensor("target", target).dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    checks.shape("target", target, "[N]", [feature.shape[0]])
    area = feature.shape[2] * feature.shape[3]
    return channel_dot(weight[target] / area, feature)
