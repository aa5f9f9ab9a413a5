"""DeTT in a plain PyTorch loop: a small network takes over a debiased teacher's last layer and learns its features.

python examples/plain_pytorch.py [--pictures 3000] [--epochs 6]    seconds on a CPU, nothing to download
"""

import argparse
from collections.abc import Sequence

import torch
import toy
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import debiaskd as dk


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=3000, help="to train on")
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    known, unseen = toy.pictures(options.pictures)
    teacher = toy.debiased(toy.large(), known)

    # Weights belong to images, so that batches have to say which images they hold.
    samples = TensorDataset(toy.to_float(known.images), known.labels, torch.arange(len(known)))
    batches = DataLoader(samples, batch_size=64, shuffle=True, drop_last=True)

    # Trained plainly and briefly, a network learns the shortcut: what it gets wrong afterwards contradicts that.
    hasty = toy.small()
    optimizer = torch.optim.AdamW(hasty.parameters(), lr=2e-3)
    for images, labels, _ in batches:
        optimizer.zero_grad()
        F.cross_entropy(hasty(images), labels).backward()
        optimizer.step()
    correct = dk.predict_correct(hasty, DataLoader(samples, batch_size=500))
    weight = dk.error_weights(correct, up=50.0)

    frozen = dk.FrozenTeacher(teacher)
    student = dk.transplant(frozen, toy.small())
    before = toy.worst_group(student, unseen)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, options.epochs * len(batches))
    for epoch in range(options.epochs):
        student.train()
        for images, _, index in batches:
            feature, goal = dk.match_spatial(student.forward_features(images), frozen.forward_features(images))
            loss = dk.feature_match_loss(feature, goal, weight[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, worst group {toy.worst_group(student, unseen):.1f} %")

    found = {"before": before, "after": toy.worst_group(student, unseen), "teacher": toy.worst_group(teacher, unseen)}
    print("worst group, %:", ", ".join(f"{name} {value:.1f}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    main()
