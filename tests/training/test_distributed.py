"""The losses under DistributedDataParallel: every rank ends with the average of all ranks' gradients."""

import distributed_step
import processes
import pytest
import torch

RANKS = 2
pytestmark = pytest.mark.xdist_group("processes")
needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    processes.spawn(distributed_step.run, RANKS, str(folder), ranks=RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@needs_gloo
@pytest.mark.parametrize("task", distributed_step.TASKS)
def test_gradients_are_averaged_over_ranks(averaged, task):
    make, loss = distributed_step.TASKS[task]
    alone = []
    for rank in range(RANKS):
        student = make()
        loss(student, rank).backward()
        alone.append([p.grad for p in student.parameters()])
    expected = [torch.stack(gradients).mean(0) for gradients in zip(*alone)]
    assert all(gradient.any() for gradient in expected)
    for rank in range(RANKS):
        for found, wanted in zip(averaged[rank][task], expected):
            torch.testing.assert_close(found, wanted)
