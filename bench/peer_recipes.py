"""The recipes that `bench.peers` compares, and all providers by name."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch

from debiaskd.pipeline.stages import Pipeline
from debiaskd.recipe import read
from debiaskd.training.fabric import launch
from debiaskd.utils.files import write_json

from .peer_loops import cid_loop, plain, simkd_loop, timm_kd, torchdistill_kd
from .peer_session import LEARNING_RATE, TEMPERATURE, WEIGHT_DECAY, Provider, Session

#: What differs between the recipes; all but the first have a cached teacher.
RECIPES: dict[str, dict[str, Any]] = {
    "debiaskd": {"terms": {"supervised": {}}},
    "debiaskd kd": {"terms": {"supervised": {}, "kd": {"temperature": TEMPERATURE}}},
    "debiaskd simkd": {"terms": {"match": {}}, "transplant": {"projector": "dense"}},
    "debiaskd cid": {
        "terms": {
            "kd": {"temperature": TEMPERATURE},
            "sample": {},
            "relation": {},
            "backdoor": {"start": 1, "temperature": TEMPERATURE},
        }
    },
}


def recipe(name: str) -> Provider:
    """`debiaskd train`: the first epoch holds the start of training and, with a teacher, writing its cache."""

    def run(session: Session) -> list[float]:
        document = {
            **RECIPES[name],
            "data": {"path": str(session.prepared), "size": session.size},
            "student": {"name": session.student},
            "schedule": {
                "epochs": session.epochs,
                "batch": session.batch,
                "optimizer": "sgd",
                "learning_rate": LEARNING_RATE,
                "weight_decay": WEIGHT_DECAY,
            },
            "selection": {"rule": "last", "every": session.epochs, "attributions": False},
            "compute": {"accelerator": session.device, "checkpoints": False, "loggers": ["csv"]},
        }
        if name != "debiaskd":
            document["teacher"] = {"name": session.teacher, "weights": str(session.weights), "cache": "fp32"}
        path = session.out / "recipe.yaml"  # JSON is YAML
        write_json(path, document)
        found, times = read(path), [0.0]
        steps = session.images // session.batch

        def progress(task: str, done: float, news: str) -> None:
            if task == "student" and not news and done * session.epochs >= len(times) - 1e-9:
                if session.device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter())

        pipeline = Pipeline(found, session.out / "run", launch(found.compute), progress)
        if len(pipeline.trainer.train) // session.batch != steps:
            raise RuntimeError(f"{session.prepared}: has {len(pipeline.trainer.train)} images, not {session.images}")
        times[0] = time.perf_counter()
        pipeline.student()
        if len(times) != session.epochs + 1:
            raise RuntimeError(f"{name}: saw {len(times) - 1} epochs, not {session.epochs}")
        return [after - before for before, after in itertools.pairwise(times)]

    return run


PROVIDERS: dict[str, Provider] = {
    "plain": plain,
    "debiaskd": recipe("debiaskd"),
    "timm kd": timm_kd,
    "torchdistill kd": torchdistill_kd,
    "debiaskd kd": recipe("debiaskd kd"),
    "simkd loop": simkd_loop,
    "debiaskd simkd": recipe("debiaskd simkd"),
    "cid loop": cid_loop,
    "debiaskd cid": recipe("debiaskd cid"),
}
