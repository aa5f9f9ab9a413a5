"""Settings that every test runs under."""

import contextlib
import importlib.util
import multiprocessing
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not (torch.cuda.is_available() or torch.xpu.is_available()):
    # Read once, when Triton is imported, which debiaskd does: without a GPU its kernels run in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    with contextlib.suppress(AttributeError):  # of a Triton that is built otherwise the tests are slower, no more
        import quick_interpreter

        quick_interpreter.quicken()

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    # Threads of several workers on the same cores wait for each other most of the time.
    SHARE = max(1, (os.cpu_count() or 1) // WORKERS)
    torch.set_num_threads(SHARE)
    os.environ.setdefault("OMP_NUM_THREADS", str(SHARE))

# The same examples in every run, so that a red gate is a fact about the change and not about the day. "few" is for slow
# sanitized libraries; "thorough" searches on:
# HYPOTHESIS_PROFILE=thorough python -m pytest tests/ops/test_localization.py
settings.register_profile("default", max_examples=25, deadline=None, derandomize=True, database=None)
settings.register_profile("few", settings.get_profile("default"), max_examples=10)
settings.register_profile(
    "thorough", max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def ordinary_surroundings(monkeypatch):
    """Automatic choice of the backend, whatever the shell says, and the same randomness for every test."""
    monkeypatch.delenv("DEBIASKD_BACKEND", raising=False)
    torch.manual_seed(0)


@pytest.fixture
def forked_workers(monkeypatch):
    """Fork the processes that `prepare` starts from a server that has imported the packages."""
    import processes

    context = processes.context()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


@pytest.fixture
def trained(monkeypatch):
    """The names of the stages that are trained from here on."""
    from debiaskd.training.fit import Trainer

    inner, names = Trainer.fit, []

    def noted(self, name, *arguments, **more):
        names.append(name)
        return inner(self, name, *arguments, **more)

    monkeypatch.setattr(Trainer, "fit", noted)
    return names


@pytest.fixture
def one_thread():
    """For tests of many small calls, where a second thread would only wait. Tests of threads ask for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
