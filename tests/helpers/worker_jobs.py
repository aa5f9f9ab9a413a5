"""Jobs for the tests of `debiaskd.utils.workers`; worker processes import them from here."""

import os
import signal
import time
import warnings
from pathlib import Path

import torch

from debiaskd.utils import files


def add(first, second, tell):
    tell(f"adding {first} and {second}")
    if torch.get_num_threads() != 1:
        raise AssertionError(f"{torch.get_num_threads()} threads")
    warnings.warn(f"{first} is odd", UserWarning, stacklevel=1)
    return torch.tensor([first + second])


def process(tell):
    return os.getpid()


def fail(text, tell):
    raise KeyError(text)


def kill(tell):
    os.kill(os.getpid(), signal.SIGKILL)


def write_for_ever(path: Path, tell):
    """Write a file and never finish it."""

    def fill(unfinished: Path) -> None:
        unfinished.write_text("begun")
        tell("writing")
        while True:
            time.sleep(0.05)

    files.write(path, fill)


def wait_for(folder: Path, tell):
    """Wait until there is a file in a folder."""
    while not list(folder.iterdir()):
        time.sleep(0.05)
