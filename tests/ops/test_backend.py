"""Which backend runs, who may choose it, and what happens where it is missing."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import debiaskd as dk
from debiaskd.ops import backend

ROOT = Path(__file__).parents[2]
OPS = tuple(backend.IMPLEMENTATIONS)
cpu = torch.zeros(1)
needs_native = pytest.mark.skipif("cpp" in backend.unavailable, reason="the native CPU library is not built")

probing = pytest.mark.xdist_group("probes")

#: What a fresh process does with every op: prints the warnings, the choice, and whether the numbers are right.
PROBE = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import debiaskd as dk
import torch
from debiaskd.ops import backend
student = torch.randn(4, 5, requires_grad=True)
dk.feature_match_loss(student, torch.zeros(4, 5)).backward()
right = torch.allclose(student.grad, student.detach() / 10)
maps = torch.rand(1, 4, 4, requires_grad=True)
loss = dk.energy_loss(maps, dk.Boxes.from_lists([[[0, 0, 2, 4]]]))
loss.backward()
right &= torch.allclose(loss, maps[:, :, 2:].sum() / maps.sum()) and maps.grad.isfinite().all().item()
try:
    with dk.backend("cpp"):
        dk.feature_match_loss(student, torch.zeros(4, 5))
    error = None
except dk.BackendError as raised:
    error = str(raised)
print(json.dumps({
    "warnings": [str(w.message) for w in caught if "debiaskd" in str(w.message)],
    "chosen": {op: backend.choose(op, maps) for op in ("feature_match", "localization")},
    "right": bool(right),
    "error": error,
}))
"""


#: Runs PROBE in a forked process for each line of variables: one import of PyTorch serves all.
PROBES = f"""
import json, os, sys
import torch
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.environ.update(json.loads(line))
        exec({PROBE!r})
        sys.stdout.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit("the probe failed")
"""


@pytest.fixture(scope="module")
def probe():
    """What PROBE prints where the variables are these."""
    command, environment = [sys.executable, "-c", PROBES], {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(**variables):
        server.stdin.write(json.dumps(variables) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield ask
    server.communicate()
    assert server.returncode == 0


@needs_native
@pytest.mark.parametrize("op", OPS)
def test_the_cpu_chooses_cpp_by_itself(op):
    assert backend.choose(op, cpu) == "cpp"


@pytest.mark.parametrize("op", OPS)
def test_a_device_that_no_implementation_knows_runs_on_eager(op):
    assert backend.choose(op, torch.zeros(1, device="meta")) == "eager"


def test_context_chooses_nests_and_restores():
    before = backend.requested()
    with dk.backend("eager"):
        assert backend.choose("feature_match", cpu) == "eager"
        with dk.backend(None):
            assert backend.requested() is None
            with dk.backend("cpp"):
                assert backend.requested() == "cpp"
            assert backend.requested() is None
        assert backend.requested() == "eager"
    assert backend.requested() is before is None


def test_context_restores_when_its_body_raises():
    with pytest.raises(KeyError), dk.backend("eager"):
        raise KeyError
    assert backend.requested() is None


def test_context_can_be_entered_again_within_itself():
    eager = dk.backend("eager")
    with eager, dk.backend("cpp"), eager:
        assert backend.requested() == "eager"
    assert backend.requested() is None


def test_choice_is_of_this_thread_alone():
    seen = []
    with dk.backend("eager"):
        worker = threading.Thread(target=lambda: seen.append(backend.requested()))
        worker.start()
        worker.join()
        assert backend.requested() == "eager"
    assert seen == [None]


@needs_native
def test_environment_variable_chooses_and_context_overrules_it(monkeypatch):
    monkeypatch.setenv("DEBIASKD_BACKEND", "eager")
    assert backend.choose("localization", cpu) == "eager"
    with dk.backend("cpp"):
        assert backend.choose("localization", cpu) == "cpp"
    with dk.backend(None):
        assert backend.choose("localization", cpu) == "eager"
    monkeypatch.setenv("DEBIASKD_BACKEND", "")
    assert backend.choose("localization", cpu) == "cpp"


@needs_native
@pytest.mark.parametrize("name", ("eager", "cpp"))
def test_choice_decides_which_code_runs(name, monkeypatch):
    called = []
    from debiaskd.ops import feature_match

    plain = feature_match.eager
    monkeypatch.setattr(feature_match, "eager", lambda *arguments: called.append(True) or plain(*arguments))
    with dk.backend(name):
        dk.feature_match_loss(torch.zeros(1, 2), torch.ones(1, 2))
    assert bool(called) == (name == "eager")


@pytest.mark.parametrize("name", ("cudnn", "", 3, "CPP"))
def test_unknown_names_are_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=f"backend must be one of 'eager', 'cpp', 'cuda', 'triton', got {name!r}"):
        dk.backend(name)


def test_unknown_name_in_the_environment_is_refused_with_the_variable(monkeypatch):
    monkeypatch.setenv("DEBIASKD_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"DEBIASKD_BACKEND must be one of 'eager', .*, got 'fast'"):
        dk.feature_match_loss(torch.zeros(1, 2), torch.zeros(1, 2))


@pytest.mark.parametrize("name", ("cuda", "triton"))
@pytest.mark.parametrize("op", OPS)
def test_backend_that_cannot_run_raises_and_says_why(op, name):
    if name not in backend.IMPLEMENTATIONS[op]:
        pytest.skip(f"{op} has no kernels for {name}: it is a composition there")
    with dk.backend(name), pytest.raises(dk.BackendError) as caught:
        backend.choose(op, torch.zeros(1, device="meta"))
    message = str(caught.value)
    assert message.startswith(f"backend {name!r} was asked for but cannot run {op} on meta: ")
    assert message.endswith((f"{op} has no {name} implementation", "tensors"))


def test_cpp_refuses_tensors_of_another_device():
    with dk.backend("cpp"), pytest.raises(dk.BackendError, match=r"cannot run localization on meta: it runs on cpu"):
        dk.energy_loss(torch.zeros(1, 2, 2, device="meta"), dk.Boxes.from_lists([[]]).to("meta"))


# ---- where libraries are missing ----


def assert_everything_runs_on_eager(seen, reason):
    assert len(seen["warnings"]) == 1
    assert "every op runs on eager" in seen["warnings"][0]
    assert reason in seen["warnings"][0]
    assert set(seen["chosen"].values()) == {"eager"}
    assert seen["right"]
    assert seen["error"].startswith("backend 'cpp' was asked for but cannot run feature_match on cpu: ")
    assert reason in seen["error"]


@probing
def test_without_libraries_everything_runs_on_eager_after_one_warning(probe, tmp_path):
    seen = probe(DEBIASKD_LIBRARY_DIR=str(tmp_path))
    assert_everything_runs_on_eager(seen, "libdebiaskd_schema.so was not built; reinstall with a compiler")


@probing
def test_the_reason_that_the_build_recorded_is_the_one_given(probe, tmp_path):
    record = {"schema": {"skipped": "no C++ compiler was found at install"}}
    (tmp_path / "build_record.json").write_text(json.dumps(record))
    seen = probe(DEBIASKD_LIBRARY_DIR=str(tmp_path))
    assert_everything_runs_on_eager(seen, "no C++ compiler was found at install")


@needs_native
@pytest.mark.parametrize("broken", ("schema", "cpu"))
@probing
def test_a_broken_library_is_left_alone(probe, tmp_path, broken):
    for name in ("schema", "cpu"):
        shutil.copy(backend.library_directory() / f"libdebiaskd_{name}.so", tmp_path)
    (tmp_path / f"libdebiaskd_{broken}.so").write_bytes(b"not a library")
    (tmp_path / "build_record.json").write_text("{ not json")
    seen = probe(DEBIASKD_LIBRARY_DIR=str(tmp_path))
    assert_everything_runs_on_eager(seen, f"libdebiaskd_{broken}.so did not load")


@needs_native
@needs_native
def test_libraries_of_another_schema_are_refused(monkeypatch):
    monkeypatch.setattr(backend, "unavailable", {})
    monkeypatch.setattr(backend, "FAKES", {})
    monkeypatch.setattr(backend, "NAMESPACES", {"cpp": "debiaskd"})
    with pytest.warns(UserWarning, match="older than this code and know another localization"):
        backend.register_fake("localization")(lambda attribution: attribution)
    assert backend.choose("localization", cpu) == "eager"


@probing
def test_a_missing_cpu_library_beside_a_good_schema_is_no_obstacle(probe, tmp_path):
    shutil.copy(backend.library_directory() / "libdebiaskd_schema.so", tmp_path)
    assert_everything_runs_on_eager(probe(DEBIASKD_LIBRARY_DIR=str(tmp_path)), "libdebiaskd_cpu.so was not built")


@needs_native
@probing
def test_with_libraries_a_fresh_process_runs_on_cpp_without_a_word(probe):
    seen = probe()
    assert seen["warnings"] == []
    assert set(seen["chosen"].values()) == {"cpp"}
    assert seen["right"]
    assert seen["error"] is None


def test_importing_needs_torch_and_numpy_alone():
    extras = ("timm", "lightning", "lightning_fabric", "jsonargparse", "torchmetrics", "sklearn", "scipy", "PIL")
    extras += ("matplotlib", "jinja2", "rich", "triton", "torchvision", "pandas", "hypothesis", "pytest")
    script = f"""
import sys
import torch  # brings what it needs by itself
blocked = {extras!r}
for name in blocked:
    sys.modules.setdefault(name, None)  # importing it raises ImportError
before = set(sys.modules)
import debiaskd
debiaskd.feature_match_loss(torch.zeros(1, 2), torch.zeros(1, 2))
third = {{m.split(".")[0] for m in set(sys.modules) - before}} - set(sys.stdlib_module_names)
assert third <= {{"debiaskd", "torch", "numpy"}}, third
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
