"""The losses under DistributedDataParallel: every rank ends with the average of all ranks' gradients."""

import distributed_step
import pytest
import torch

RANKS = 2
needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)


@needs_gloo
@pytest.mark.parametrize("task", distributed_step.TASKS)
def test_gradients_are_averaged_over_ranks(tmp_path, task):
    torch.multiprocessing.spawn(distributed_step.run, args=(RANKS, str(tmp_path), task), nprocs=RANKS)
    make, loss = distributed_step.TASKS[task]
    alone = []
    for rank in range(RANKS):
        student = make()
        loss(student, rank).backward()
        alone.append([p.grad for p in student.parameters()])
    expected = [torch.stack(gradients).mean(0) for gradients in zip(*alone)]
    assert all(gradient.any() for gradient in expected)
    for rank in range(RANKS):
        for found, wanted in zip(torch.load(tmp_path / f"rank{rank}.pt"), expected):
            torch.testing.assert_close(found, wanted)
