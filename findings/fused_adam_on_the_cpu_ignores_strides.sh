#!/usr/bin/env bash
# torch 2.13.0 (also 2.14.1): on the CPU, the fused Adam, AdamW and SGD read a parameter and its gradient in the order of
# memory, whatever their strides. A channels_last weight whose gradient is contiguous is updated with the right numbers at
# the wrong places, and no error says so. On CUDA the same call is refused ("params, grads, exp_avgs, and exp_avg_sqs must
# have same dtype, device, and layout", pytorch/pytorch issue 106951); the loop and foreach forms are right.
#
# `backward()` gives gradients the strides of their parameters, so that most training is spared. Gradients that come from
# elsewhere are not: here they went through one flat buffer and came back as contiguous views, as in averaging over
# processes by hand; a channels_last model does this with every convolution wider than 1x1.
#
# Exits 0 while that is so, 1 when it has changed.
#
# Output seen (largest difference from the loop form after three steps at learning rate 0.01, and loss of a regression
# after 200 steps; targets are normal numbers):
#   SGD   loop, flat 0.000000   fused 0.000000   fused, flat 0.000601   loss: loop, flat 0.96, fused, flat 0.97
#   Adam  loop, flat 0.000000   fused 0.000000   fused, flat 0.059573   loss: loop, flat 0.00, fused, flat 30.35
#   AdamW loop, flat 0.000000   fused 0.000000   fused, flat 0.059567   loss: loop, flat 0.00, fused, flat 35.59
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy
cat > fused.py <<'PYTHON'
import sys

import torch
from torch import nn
from torch.nn import functional as F

KINDS = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}
torch.manual_seed(0)
images, targets = torch.randn(32, 3, 12, 12), torch.randn(32, 8, 1, 1)


def trained(kind, steps, fused, flat):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1))
    model.to(memory_format=torch.channels_last)
    optimizer = KINDS[kind](model.parameters(), lr=0.01, fused=fused)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(images), targets)
        loss.backward()
        if flat:  # such as an all-reduce over one buffer
            parameters = list(model.parameters())
            buffer = torch.cat([p.grad.reshape(-1) for p in parameters])
            for p, part in zip(parameters, buffer.split([p.numel() for p in parameters])):
                p.grad = part.view(p.shape)
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), loss.item()


unchanged = True
for kind in KINDS:
    expected, _ = trained(kind, 3, fused=False, flat=False)
    apart = [(trained(kind, 3, fused, flat)[0] - expected).abs().max().item() for fused, flat in
             ((False, True), (True, False), (True, True))]
    right, wrong = trained(kind, 200, False, True)[1], trained(kind, 200, True, True)[1]
    print(f"{kind:5} loop, flat {apart[0]:.6f}   fused {apart[1]:.6f}   fused, flat {apart[2]:.6f}   "
          f"loss: loop, flat {right:.2f}, fused, flat {wrong:.2f}")
    unchanged &= max(apart[:2]) < 1e-5 and apart[2] > 1e-4
sys.exit(0 if unchanged else 1)
PYTHON
venv/bin/python fused.py
