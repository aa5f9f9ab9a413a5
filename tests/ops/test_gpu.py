"""What only a GPU can show: no op waits for it, all can be captured in a graph, streams and devices are kept to."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from cases import ways
from op_calls import CALLS, loss_and_gradient

import debiaskd as dk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


every_call = pytest.mark.parametrize(
    ("call", "way"),
    [
        pytest.param(call, way, id=f"{call.name}-{way.name}")
        for call in CALLS
        for way in ways(call.op)
        if way.device == "cuda" and (way.name != "eager-cuda" or call.op == "backdoor")
    ],
)


@contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_call
def test_no_op_waits_for_the_device(call, way):
    inputs = call.make()
    with way.active():
        loss_and_gradient(call, inputs)  # what the first call alone does, such as compiling, may wait
        with no_synchronisation():
            loss_and_gradient(call, inputs)


def test_waiting_would_be_noticed():
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()


@every_call
def test_a_captured_graph_computes_anew_from_new_inputs(call, way):
    inputs = call.make()
    other = call.make()
    with torch.no_grad():
        other[0].mul_(0.7)
    with way.active():
        expected = loss_and_gradient(call, other)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                loss_and_gradient(call, inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = loss_and_gradient(call, inputs)
        with torch.no_grad():
            inputs[0].copy_(other[0])
        for _ in range(2):  # a counter that a replay leaves behind would spoil the next
            graph.replay()
    for found, wanted in zip(captured, expected):
        torch.testing.assert_close(found, wanted)


@every_call
def test_the_current_stream_is_the_one_that_is_used(call, way):
    inputs = call.make()
    with way.active():
        expected = loss_and_gradient(call, inputs)
        stream = torch.cuda.Stream()
        late = inputs[0].detach().clone().fill_(float("nan")).requires_grad_()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # long enough that work on another stream would read NaN
            with torch.no_grad():
                late.copy_(inputs[0])
            found = loss_and_gradient(call, (late, *inputs[1:]))
        stream.synchronize()
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e)


@every_call
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one(call, way):
    with way.active():
        expected = loss_and_gradient(call, call.make("cuda:0"))
        found = loss_and_gradient(call, call.make("cuda:1"))
    for f, e in zip(found, expected):
        assert f.device.index == 1
        torch.testing.assert_close(f.to("cuda:0"), e)


def kernels_of(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    on_device = (e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return [event.name for event in on_device if "debiaskd" in event.name]


@pytest.mark.parametrize("normalize", (False, True))
def test_a_small_batch_is_matched_in_two_launches_and_one_backward(normalize):
    call = CALLS[int(normalize)]
    inputs = call.make()
    with dk.backend("cuda"):
        loss = call.run(*inputs)
        forward = kernels_of(lambda: call.run(*inputs))
        backward = kernels_of(lambda: torch.autograd.grad(loss, inputs[0]))
    assert len(forward) <= 2, forward
    assert len(backward) <= 1, backward
