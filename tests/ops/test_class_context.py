"""`class_context`: the weighted sums and masses of each class, by every way to add them up."""

import numpy as np
import pytest
import torch
from cases import DTYPES, GOLDEN, assert_accurate, lay_out, normal, threads
from hypothesis import given
from hypothesis import strategies as st

import debiaskd as dk
from debiaskd.ops.class_context import added, multiplied


def oracle(feature, logits, labels, num_classes, temperature=4.0):
    """Sample by sample, in NumPy."""
    s, u = (x.double().numpy() for x in (feature, logits))
    sums, masses = np.zeros((num_classes, s.shape[1])), np.zeros(num_classes)
    for row, scores, label in zip(s, u, labels.tolist()):
        shares = np.exp((scores - scores.max()) / temperature)
        weight = shares[label] / shares.sum()
        sums[label] += weight * row
        masses[label] += weight
    return torch.as_tensor(sums), torch.as_tensor(masses)


def labels_of(samples, classes, seed=0):
    return torch.randint(0, classes, (samples,), generator=torch.Generator().manual_seed(seed))


@given(
    samples=st.sampled_from((0, 1, 5, 40)),
    width=st.sampled_from((0, 1, 7, 33)),
    classes=st.sampled_from((1, 3, 50)),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    layout=st.sampled_from(("contiguous", "reversed", "stepped", "expanded_batch")),
    temperature=st.sampled_from((1.0, 4.0, 0.1)),
)
def test_any_shape_layout_and_dtype_agrees_with_the_oracle(samples, width, classes, dtypes, layout, temperature):
    feature = lay_out(normal(samples, width, dtype=dtypes[0]), layout)
    logits, labels = lay_out(normal(samples, classes, seed=1, dtype=dtypes[1]) * 5, layout), labels_of(samples, classes)
    actual = dk.class_context(feature, logits, labels, classes, temperature=temperature)
    wide = torch.promote_types(dtypes[0], torch.float32)
    weight = (logits.to(wide) / temperature).softmax(1)[torch.arange(samples), labels]
    one_hot = torch.eye(classes, dtype=wide)[labels]
    eager = ((one_hot * weight[:, None]).T @ feature.to(wide), (one_hot * weight[:, None]).sum(0))
    for a, x, e in zip(actual, oracle(feature, logits, labels, classes, temperature), eager):
        assert_accurate(a, x, e)


@pytest.mark.parametrize("add", (added, multiplied))
def test_both_ways_to_add_up_agree(add):
    feature, weight, labels = normal(30, 8, dtype=torch.float64), normal(30, 1, dtype=torch.float64), labels_of(30, 7)
    for actual, expected in zip(add(feature, weight, labels, 7), added(feature, weight, labels, 7)):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ("cid0", "cid1"))
def test_reference_context_is_reproduced(name):
    with np.load(GOLDEN / "cid.npz") as file:
        reference = {k.removeprefix(f"{name}_"): torch.as_tensor(file[k]) for k in file.files if k.startswith(name)}
    classes = reference["context_after"].shape[0]
    inputs = [reference[k] for k in ("student", "teacher_logits", "labels")]
    sums, masses = dk.class_context(*inputs, classes, temperature=reference["temperature"].item())
    assert masses.min() >= 0
    present = masses > 0
    torch.testing.assert_close((sums / masses[:, None])[present], reference["context_after"][present])


def test_batches_add_up_to_the_whole():
    feature, logits, labels = normal(40, 6, dtype=torch.float64), normal(40, 5, dtype=torch.float64), labels_of(40, 5)
    whole = dk.class_context(feature, logits, labels, 5)
    parts = [dk.class_context(feature[part], logits[part], labels[part], 5) for part in (slice(0, 13), slice(13, 40))]
    for total, first, second in zip(whole, *parts):
        torch.testing.assert_close(first + second, total)


def test_features_that_require_a_gradient_are_constants():
    sums, masses = dk.class_context(normal(4, 3).requires_grad_(), normal(4, 2), labels_of(4, 2), 2)
    assert not sums.requires_grad
    assert not masses.requires_grad


def test_a_class_that_did_not_occur_is_zero():
    sums, masses = dk.class_context(normal(3, 4), normal(3, 3), torch.tensor([0, 2, 0]), 3)
    assert masses[1] == 0
    assert not sums[1].any()
    assert masses[[0, 2]].min() > 0


@pytest.mark.parametrize("name", ("eager", "cpp"))
def test_every_backend_that_exists_may_be_asked_for(name):
    inputs = (normal(3, 4), normal(3, 3), torch.tensor([0, 2, 0]), 3)
    with dk.backend(name):
        actual = dk.class_context(*inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, dk.class_context(*inputs)))


def test_same_inputs_give_the_same_bits_with_one_thread_and_with_two():
    inputs = (normal(900, 300), normal(900, 4, seed=1), labels_of(900, 4), 4)
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(dk.class_context(*inputs))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_autocast_changes_nothing():
    inputs = (normal(9, 5, dtype=torch.bfloat16), normal(9, 3, dtype=torch.bfloat16), labels_of(9, 3), 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = dk.class_context(*inputs)
        feature, weight = inputs[0].float(), normal(9, 1)
        product = multiplied(feature, weight, inputs[2], 3)
    for result, expected in ((actual, dk.class_context(*inputs)), (product, multiplied(feature, weight, inputs[2], 3))):
        assert all(r.dtype == torch.float32 for r in result)
        assert all(torch.equal(r, e) for r, e in zip(result, expected))


@pytest.mark.compiles
def test_one_compiled_graph_equals_the_plain_call():
    torch.compiler.reset()
    inputs = (normal(6, 4).requires_grad_(), normal(6, 3), labels_of(6, 3))
    compiled = torch.compile(lambda *x: dk.class_context(*x, 3), backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(*inputs), dk.class_context(*inputs, 3)):
        torch.testing.assert_close(actual, expected)


BAD = [
    ({"feature": [1.0]}, TypeError, r"feature must be a torch\.Tensor, got list"),
    ({"feature": torch.zeros(2, 3).long()}, TypeError, r"feature must be float32.*got torch\.int64"),
    ({"feature": torch.zeros(2, 3, 1)}, ValueError, r"feature must have shape \[N,D\], got \[2, 3, 1\]"),
    ({"logits": torch.zeros(2, 5)}, ValueError, r"logits must have shape \[N,K\]=\[2, 4\], got \[2, 5\]"),
    ({"logits": torch.zeros(2, 4, device="meta")}, ValueError, r"logits must be on the device of feature, cpu"),
    ({"logits": torch.zeros(2, 4, requires_grad=True)}, ValueError, r"logits must not require grad"),
    ({"labels": torch.zeros(2)}, TypeError, r"labels must be int64, got torch\.float32"),
    ({"labels": torch.zeros(3).long()}, ValueError, r"labels must have shape \[N\]=\[2\], got \[3\]"),
    ({"labels": torch.tensor([0, 4])}, ValueError, r"labels must be in \[0, 4\) everywhere, got values in \[0, 4\]"),
    ({"labels": torch.tensor([-1, 3])}, ValueError, r"labels must be in \[0, 4\) everywhere, got values in \[-1, 3\]"),
    ({"num_classes": 4.0}, TypeError, r"num_classes must be an integer, got 4\.0"),
    ({"num_classes": 0}, ValueError, r"num_classes must be >= 1, got 0"),
    ({"temperature": 0}, ValueError, r"temperature must be a finite number > 0, got 0"),
    ({"temperature": "4"}, TypeError, r"temperature must be a number, got str"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_inputs_are_named(change, error, message):
    arguments = {"feature": torch.zeros(2, 3), "logits": torch.zeros(2, 4), "labels": torch.zeros(2).long()}
    with pytest.raises(error, match=message):
        dk.class_context(**{**arguments, "num_classes": 4, **change})


def test_module_is_the_function():
    inputs = (normal(6, 4), normal(6, 3), labels_of(6, 3))
    module = dk.ClassContext(3, temperature=2.0)
    for actual, expected in zip(module(*inputs), dk.class_context(*inputs, 3, temperature=2.0)):
        assert torch.equal(actual, expected)
    assert repr(module) == "ClassContext(3, temperature=2.0)"
    with pytest.raises(ValueError, match="num_classes must be >= 1"):
        dk.ClassContext(0)
