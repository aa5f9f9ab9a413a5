"""The losses under DistributedDataParallel: every rank ends with the average of all ranks' gradients."""

import distributed_step
import pytest
import torch

RANKS = 2
needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)


@needs_gloo
def test_gradients_are_averaged_over_ranks(tmp_path):
    torch.multiprocessing.spawn(distributed_step.run, args=(RANKS, str(tmp_path)), nprocs=RANKS)
    alone = []
    for rank in range(RANKS):
        student = distributed_step.make_student()
        distributed_step.loss(student, rank).backward()
        alone.append([p.grad for p in student.parameters()])
    expected = [torch.stack(gradients).mean(0) for gradients in zip(*alone)]
    assert all(gradient.any() for gradient in expected)
    for rank in range(RANKS):
        for found, wanted in zip(torch.load(tmp_path / f"rank{rank}.pt"), expected):
            torch.testing.assert_close(found, wanted)
