"""DeTT in Hugging Face's Trainer: a small ResNet takes over a large one's last layer and learns its features.

python examples/hf_trainer.py [--pictures 3000] [--epochs 4]    seconds on a CPU, nothing to download
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import toy
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

import debiaskd as dk


class DistillingTrainer(Trainer):
    loss_is_scaled_for_ga = False  # a mean over the batch, to be divided where gradients are accumulated

    def __init__(self, teacher: nn.Module, **options: Any) -> None:
        super().__init__(**options)
        self.teacher = teacher.eval().to(self.args.device)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **rest: Any) -> Any:
        outputs = model(inputs["pixel_values"], output_hidden_states=True)
        with torch.no_grad():
            goal = self.teacher(inputs["pixel_values"], output_hidden_states=True).hidden_states[-1]
        feature, goal = dk.match_spatial(outputs.hidden_states[-1], goal)
        loss = dk.feature_match_loss(feature, goal, inputs["weight"])
        return (loss, outputs) if return_outputs else loss


def network(*hidden_sizes: int) -> ResNetForImageClassification:
    depths = [1] * len(hidden_sizes)
    config = ResNetConfig(embedding_size=16, hidden_sizes=hidden_sizes, depths=depths, layer_type="basic", num_labels=2)
    return ResNetForImageClassification(config)


def samples(pictures: Any) -> list[dict[str, Tensor]]:
    """Here groups are known; where they are not, `dk.error_weights` makes the weights."""
    columns = (toy.to_float(pictures.images), pictures.labels, dk.group_weights(pictures.groups))
    return [dict(zip(("pixel_values", "labels", "weight"), row)) for row in zip(*columns)]


def main(arguments: Sequence[str] | None = None) -> tuple[dict[str, float], dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=3000, help="to train on")
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args(arguments)
    set_seed(0)
    known, unseen = toy.pictures(options.pictures)
    teacher, student = toy.debiased(network(32, 64, 96), known), network(16, 96)
    # Features as wide as the teacher's need no projector: its last layer fits.
    student.classifier.load_state_dict(teacher.classifier.state_dict())
    student.classifier.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        lengths = {"num_train_epochs": options.epochs, "per_device_train_batch_size": 64, "learning_rate": 4e-3}
        quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        settings = TrainingArguments(folder, remove_unused_columns=False, **lengths, **quiet)
        trainer = DistillingTrainer(teacher, model=student, args=settings, train_dataset=samples(known))
        trainer.eval_dataset = samples(unseen)
        trainer.compute_metrics = lambda found: {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean()}
        before = trainer.evaluate(ignore_keys=["hidden_states"])
        trainer.train()
        after = trainer.evaluate(ignore_keys=["hidden_states"])
    print(", ".join(f"{name[5:]} {before[name]:.3f} → {after[name]:.3f}" for name in ("eval_loss", "eval_accuracy")))
    return before, after


if __name__ == "__main__":
    main()
