"""CID's distillation between two networks of timm, with timm's loaders, optimisers and schedules.

python examples/timm_script.py [--pictures 1500] [--epochs 6]    seconds on a CPU, nothing to download
python examples/timm_script.py --data birds teacher.pt --teacher resnet50 --student resnet18 --size 224 --epochs 100
"""

import argparse
from collections.abc import Sequence

import timm
import torch
import toy
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import debiaskd as dk


def seen_by(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features [N,D] and logits [N,K]."""
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    return pooled, model.get_classifier()(pooled)


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help = "images as timm reads them, train/CLASS/… and validation/CLASS/…, and the teacher's weights"
    parser.add_argument("--data", nargs=2, metavar=("FOLDER", "WEIGHTS"), help=help)
    usual = {"teacher": "test_resnet", "student": "test_nfnet", "pictures": 1500, "size": 32, "epochs": 6, "lr": 2e-3}
    for name, default in usual.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.data:
        known, unseen = (create_dataset("", options.data[0], split) for split in ("train", "validation"))
        batches = create_loader(known, options.size, 64, is_training=True, use_prefetcher=False)
        validation = create_loader(unseen, options.size, 64, use_prefetcher=False)
        classes = len(known.reader.class_to_idx)
        teacher = timm.create_model(options.teacher, checkpoint_path=options.data[1], num_classes=classes)
    else:
        drawn = toy.pictures(options.pictures)
        known, unseen = (TensorDataset(toy.to_float(part.images), part.labels) for part in drawn)
        evenly = WeightedRandomSampler(dk.group_weights(drawn[0].groups).tolist(), len(known))
        batches, validation = DataLoader(known, 64, sampler=evenly, drop_last=True), DataLoader(unseen, 64)
        teacher = toy.debiased(timm.create_model(options.teacher, num_classes=toy.CLASSES), drawn[0])
    teacher = dk.FrozenTeacher(teacher).to(device)
    student = timm.create_model(options.student, num_classes=teacher.num_classes).to(device)

    # The regressor of the sample loss is trained with the student, and left alone by weight decay.
    regressor = nn.Linear(student.get_classifier().in_features, teacher.get_classifier().in_features).to(device)
    groups = param_groups_weight_decay(student, 5e-4) + [{"params": [*regressor.parameters()], "weight_decay": 0.0}]
    optimizer = create_optimizer_v2(groups, "adamw", lr=options.lr)
    scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=options.epochs, updates_per_epoch=len(batches))

    before = dk.predict_correct(student, validation, device).float().mean().item()
    for epoch in range(epochs):
        student.train()
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            (goal, answer), (pooled, logits) = seen_by(teacher, images), seen_by(student, images)
            sample = dk.feature_match_loss(regressor(pooled), goal, normalize=True)
            loss = dk.kd_loss(logits, answer) + 10 * sample + dk.class_relation_loss(pooled, goal, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step(epoch + 1)
    after = dk.predict_correct(student, validation, device).float().mean().item()
    print(f"accuracy: {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    main()
