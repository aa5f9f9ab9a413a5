"""A LightningModule: a teacher's last layer on a small network, which learns its features and to look into boxes.

python examples/lightning_module.py [--pictures 3000] [--epochs 6]    seconds on a CPU, nothing to download
python examples/lightning_module.py --data birds-224 teacher.pt --teacher resnet50 --student resnet18
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import toy
from lightning import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

import debiaskd as dk
from debiaskd.data import Batch, PackedDataset, collate
from debiaskd.models import registry as networks


class Distilled(LightningModule):
    def __init__(self, teacher: nn.Module, student: nn.Module, guidance: float) -> None:
        super().__init__()
        self.teacher, self.student = dk.FrozenTeacher(teacher), dk.transplant(teacher, student)
        self.guide, self.guidance = dk.Guide(self.student), guidance
        self.strict_loading = False  # checkpoints are of the student alone

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        whole = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in whole.items() if not name.startswith("teacher.")}

    def training_step(self, batch: Batch, number: int) -> Tensor:
        images = toy.to_float(batch.images)
        seen = self.guide.watch(images)  # runs the student once, for both losses
        feature, goal = dk.match_spatial(seen.raw, self.teacher.forward_features(images))
        guided = self.guide.guide(seen, batch.target, batch.boxes)
        return dk.feature_match_loss(feature, goal) + self.guidance * guided.loss

    def validation_step(self, batch: Batch, number: int) -> None:
        guided = self.guide(toy.to_float(batch.images), batch.target, batch.boxes)
        accuracy = (guided.logits.argmax(1) == batch.target).float().mean()
        self.log_dict({"accuracy": accuracy, "energy in box": 1 - guided.loss}, batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=2e-3)


def main(arguments: Sequence[str] | None = None) -> tuple[dict[str, float], dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help = "what `debiaskd prepare` wrote, with boxes of at least some images, and the teacher's weights"
    parser.add_argument("--data", nargs=2, metavar=("FOLDER", "WEIGHTS"), help=help)
    usual = {"teacher": "small/24,48,96", "student": "small/8,16,32", "pictures": 3000, "epochs": 6, "guidance": 0.2}
    for name, default in usual.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args(arguments)
    seed_everything(0, verbose=False)
    if options.data:
        known, unseen = (PackedDataset(options.data[0], split) for split in ("train", "test"))
        teacher = networks.build(options.teacher, len(known.classes))
        networks.load_weights(teacher, options.data[1])
    else:
        drawn = toy.pictures(options.pictures)
        known, unseen = (list(zip(part.images, part.labels, part.boxes)) for part in drawn)
        teacher = toy.debiased(networks.build(options.teacher, toy.CLASSES), drawn[0])
    student = networks.build(options.student, teacher.num_classes)
    module, validation = Distilled(teacher, student, options.guidance), DataLoader(unseen, 100, collate_fn=collate)
    # Maps are made of gradients wherever the closed form does not hold, and inference mode would forbid them.
    trainer = Trainer(max_epochs=options.epochs, inference_mode=False, logger=False, enable_checkpointing=False)
    (before,) = trainer.validate(module, validation, verbose=False)
    trainer.fit(module, DataLoader(known, 64, shuffle=True, drop_last=True, collate_fn=collate))
    (after,) = trainer.validate(module, validation, verbose=False)
    print("; ".join(f"{name}: {before[name]:.3f} before, {after[name]:.3f} after" for name in before))
    return before, after


if __name__ == "__main__":
    main()
