"""Loops that `bench.peers` compares recipes with: plain PyTorch, other libraries, and papers' loops written out.

Every loop takes a `Session` and returns the seconds of each of its epochs. Loops of papers follow the description of
the papers and of their public code; none of it is copied.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from debiaskd.models.projector import make_projector

from .peer_session import (
    CLASSES,
    LEARNING_RATE,
    MOMENTUM,
    TEMPERATURE,
    WEIGHT_DECAY,
    WORKERS,
    Session,
    epochs_of,
    images_of,
    sgd,
    student_of,
    teacher_of,
    transform,
)


def trained(
    session: Session, modules: list[nn.Module], loss_of: Callable[[Tensor, Tensor, int], Tensor]
) -> list[float]:
    """The loop of papers' public code: the loss is read in every step, for the running mean that it prints."""
    batches = images_of(session)
    optimizer = sgd(p for module in modules for p in module.parameters() if p.requires_grad)

    def epoch(number: int) -> None:
        total = 0.0
        for images, labels in batches:
            images, labels = images.to(session.device), labels.to(session.device)
            loss = loss_of(images, labels, number)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()

    return epochs_of(session, epoch)


def plain(session: Session) -> list[float]:
    """PyTorch without a teacher."""
    student = student_of(session)
    return trained(session, [student], lambda images, labels, epoch: F.cross_entropy(student(images), labels))


def timm_kd(session: Session) -> list[float]:
    """timm's `LogitDistillationTask` with timm's loader and optimiser, step by step as timm's training script."""
    from timm.data import create_dataset, create_loader
    from timm.optim import create_optimizer_v2
    from timm.task import LogitDistillationTask
    from timm.utils import AverageMeter

    student, device = student_of(session), torch.device(session.device)
    task = LogitDistillationTask(
        student, teacher_of(session), nn.CrossEntropyLoss(), temperature=TEMPERATURE, device=device, verbose=False
    )
    size = (3, session.size, session.size)
    dataset = create_dataset("", root=str(session.jpegs), split="train", is_training=True)
    batches = create_loader(
        dataset, size, session.batch, is_training=True, num_workers=WORKERS, use_prefetcher=False, no_aug=True,
        device=device,
    )  # fmt: skip
    dataset.transform = transform(session.size)
    optimizer = create_optimizer_v2(
        student, "sgd", lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, filter_bias_and_bn=False
    )

    def epoch(number: int) -> None:
        task.train()
        losses, last = AverageMeter(), len(batches) - 1
        for step, (images, labels) in enumerate(batches):
            images, labels = images.to(device), labels.to(device)
            loss = task(images, labels)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 0 or step == last:
                losses.update(loss.item(), len(images))

    return epochs_of(session, epoch)


def torchdistill_kd(session: Session) -> list[float]:
    """torchdistill's `DistillationBox` with the sections of its own example of knowledge distillation on ImageNet."""
    import logging

    logging.disable(logging.INFO)
    from torch.utils.data import RandomSampler, SequentialSampler
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.misc.log import MetricLogger, SmoothedValue
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(str(session.jpegs / "train"), transform(session.size))
    reading = {"batch_size": session.batch, "num_workers": WORKERS, "pin_memory": session.device == "cuda"}
    logits = {"student_module_path": ".", "student_module_io": "output"}
    logits |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    soft = {"temperature": TEMPERATURE, "alpha": 0.5, "reduction": "batchmean"}
    network = {"forward_proc": "forward_batch_only", "sequential": []}
    momentum = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "nesterov": True}
    config = {
        "log_freq": 1000,
        "num_epochs": session.epochs,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler, "kwargs": None},
            "kwargs": {**reading, "drop_last": True},
            "cache_output": None,
        },
        "val_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": SequentialSampler, "kwargs": None},
            "kwargs": {**reading, "drop_last": False},
        },
        "teacher": {**network, "wrapper": "DataParallel", "requires_grad": False},
        "student": {
            **network,
            "adaptations": None,
            "wrapper": "DistributedDataParallel",
            "requires_grad": True,
            "frozen_modules": [],
        },
        "optimizer": {"key": "SGD", "kwargs": {"lr": LEARNING_RATE, **momentum}},
        "scheduler": {"key": "MultiStepLR", "kwargs": {"milestones": [5, 15], "gamma": 0.1}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": {**logits, **soft}}, "weight": 1.0}}
            },
        },
    }
    device = torch.device(session.device)
    box = get_distillation_box(
        teacher_of(session), student_of(session), {"train": folder}, config, device, None, False, 1
    )

    def epoch(number: int) -> None:
        box.pre_epoch_process(epoch=number)
        meters = MetricLogger(delimiter="  ")
        meters.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
        for images, labels, more in box.train_data_loader:
            images, labels = images.to(device), labels.to(device)
            loss = box.forward_process(images, labels, more)
            box.post_forward_process(loss=loss)
            meters.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
        box.post_epoch_process()

    try:
        return epochs_of(session, epoch)
    finally:
        box.clean_modules()
        logging.disable(logging.NOTSET)


def simkd_loop(session: Session) -> list[float]:
    """SimKD: the student's projected feature map against the teacher's, whose last layer it gets."""
    teacher, student = teacher_of(session), student_of(session)
    projector = make_projector("dense", student.num_features, teacher.num_features).to(session.device).train()

    def loss(images: Tensor, labels: Tensor, epoch: int) -> Tensor:
        with torch.no_grad():
            aim = teacher.forward_features(images)
        found = projector(student.forward_features(images))
        with torch.no_grad():
            teacher.forward_head(found)  # the student's logits, of which the loop prints the accuracy
        return F.mse_loss(found, aim)

    return trained(session, [student, projector], loss)


def cid_loop(session: Session) -> list[float]:
    """CID: the class loss in a loop over the classes, the contexts in a loop over the samples, as its code has them."""
    teacher, student, device = teacher_of(session), student_of(session), session.device
    width = student.num_features
    regressor = nn.Linear(width, teacher.num_features).to(device)
    head = nn.Linear(2 * width, CLASSES).to(device)
    contexts = torch.zeros(CLASSES, width, device=device)
    sums, masses = torch.zeros_like(contexts), torch.zeros(CLASSES, device=device)

    def relation(own: Tensor, aim: Tensor, labels: Tensor) -> Tensor:
        found = []
        for k in labels.unique():
            chosen = labels == k
            if int(chosen.sum()) > 1:
                mine, theirs = F.normalize(own[chosen]), F.normalize(aim[chosen])
                found.append((mine @ mine.T - theirs @ theirs.T).square().mean())
        return torch.stack(found).mean() if found else own.new_zeros(())

    def loss(images: Tensor, labels: Tensor, epoch: int) -> Tensor:
        with torch.no_grad():
            aim = teacher.forward_head(teacher.forward_features(images), pre_logits=True)
            soft = (teacher.get_classifier()(aim) / TEMPERATURE).softmax(1)
        own = student.forward_head(student.forward_features(images), pre_logits=True)
        logits = student.get_classifier()(own)
        kd = TEMPERATURE**2 * F.kl_div((logits / TEMPERATURE).log_softmax(1), soft, reduction="batchmean")
        sample = ((regressor(own) - aim).square().sum(1) / aim.square().sum(1)).mean()
        total = kd + sample + relation(own, aim, labels)
        if epoch:
            share = (logits.detach() / TEMPERATURE).softmax(1)
            total = total + F.cross_entropy(head(torch.cat([own, share @ contexts], 1)), labels)
        for i, k in enumerate(labels.tolist()):
            sums[k] += soft[i, k] * own[i].detach()
            masses[k] += soft[i, k]
        return total

    batches = session.images // session.batch
    seen = 0

    def counted(images: Tensor, labels: Tensor, epoch: int) -> Tensor:
        nonlocal seen
        found = loss(images, labels, epoch)
        seen += 1
        if seen % batches == 0:
            contexts.copy_(sums / masses.clamp(min=1e-12)[:, None])
            sums.zero_(), masses.zero_()
        return found

    return trained(session, [student, regressor, head], counted)
