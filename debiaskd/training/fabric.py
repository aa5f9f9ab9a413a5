"""Set up processes, devices and precision with Lightning Fabric."""

from __future__ import annotations

import atexit
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import metadata
from typing import Any

import torch

from debiaskd.recipe import Compute, RecipeError

_PRECISION = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def launch(compute: Compute) -> Any:
    """Launch a Fabric on the processes that torchrun started, or on the `devices` of this machine.

    Raises:
        RecipeError: the devices are not available.
    """
    with _versions_from_metadata():
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy

    local = int(os.environ.get("LOCAL_WORLD_SIZE", 0))  # torchrun's
    devices = local or compute.devices
    nodes = int(os.environ["WORLD_SIZE"]) // local if local else compute.nodes
    # Statistics of batch norm go from rank to rank when a model is judged, not in every step.
    strategy: Any = DDPStrategy(broadcast_buffers=False) if devices * nodes > 1 else "auto"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*srun.*")
            warnings.filterwarnings("ignore", ".*AMP with fp16 is not supported on CPU")  # refused below
            fabric = Fabric(
                accelerator=compute.accelerator,
                devices=devices,
                num_nodes=nodes,
                precision=_PRECISION[compute.precision],  # type: ignore[arg-type]
                strategy=strategy,
            )
    except (RuntimeError, ValueError) as error:
        raise RecipeError(f"compute: {' '.join(str(error).split())}") from None
    if compute.precision == "16" and fabric.device.type == "cpu":
        raise RecipeError("compute.precision: 16 needs a GPU, which there is none of here; bf16 runs on CPUs as well")
    if compute.sync_batchnorm and fabric.device.type == "cpu":
        raise RecipeError("compute.sync_batchnorm: PyTorch synchronises batch norm on GPUs only, this is the CPU")
    # One line per process would be repeated by the progress output.
    logging.getLogger("lightning_fabric.utilities.distributed").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", "`broadcast_buffers` is deprecated", FutureWarning
    )  # torch 2.14; older ones need it
    fabric.launch()
    if fabric.world_size > 1 and torch.distributed.get_backend() == "gloo":
        atexit.register(_leave)
    return fabric


@contextmanager
def _versions_from_metadata() -> Iterator[None]:
    """Within, Lightning Fabric compares the version of torchmetrics without importing it.

    Fabric looks that version up when it is imported, and imports torchmetrics for it, which imports torchvision, SciPy
    and transformers where they are installed: seconds before the first step (findings/fabric_imports_transformers.sh).
    """
    try:
        from lightning_utilities.core import imports
        from packaging.version import Version
    except ImportError:  # importing Fabric says what is missing
        yield
        return
    compare = imports.compare_version

    def compare_version(package: str, op: Callable[..., bool], version: str, use_base_version: bool = False) -> bool:
        if package != "torchmetrics":
            return compare(package, op, version, use_base_version)
        try:
            found = Version(metadata.version(package))
        except metadata.PackageNotFoundError:
            return False
        return op(Version(found.base_version) if use_base_version else found, Version(version))

    imports.compare_version = compare_version
    try:
        yield
    finally:
        imports.compare_version = compare


def autocast(compute: Compute, device: torch.device) -> AbstractContextManager[Any]:
    """The autocast context of a run's precision without a Fabric; float32 where the device lacks that precision."""
    if compute.precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    if compute.precision == "16" and device.type == "cuda":
        return torch.autocast(device.type, torch.float16)
    return nullcontext()


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the default generators of the CPU and of one device.

    `torch.manual_seed` seeds those of every kind of device and, where CUDA is not in use, formats a stack trace each
    time, some 3 ms.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def rank() -> int | None:
    """This process's number among those that train together; None where it is the only one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return torch.distributed.get_rank() if torch.distributed.get_world_size() > 1 else None


def lost_another(error: BaseException) -> bool:
    """Whether an error only reports that another process has died; Gloo has no exception type for that."""
    if rank() is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def _leave() -> None:
    """Gloo's threads let go of the last tensors after those who waited for them went on. Where Python has begun to shut
    down by then, they abort a process that has done all it had to (pytorch/pytorch#179291)."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    time.sleep(0.2)
