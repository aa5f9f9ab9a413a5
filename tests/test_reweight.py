"""Sample weights, and the error set's traps: empty, most of the data, recorded too early, out of order."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils import data
from torch.utils.data import DataLoader, TensorDataset

from debiaskd.data import EpochSampler
from debiaskd.reweight import ErrorSetWarning, error_weights, group_weights, predict_correct

CORRECT = torch.tensor([True, True, False, True, True])


def test_mistakes_weigh_up() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = error_weights(CORRECT)
    assert weights.dtype == torch.float32
    assert weights.tolist() == [1, 1, 50, 1, 1]
    assert error_weights(CORRECT, 0.5).tolist() == [1, 1, 0.5, 1, 1]


def test_copies_are_jtts_data_set() -> None:
    copies = torch.cat([torch.arange(5), torch.tensor([2] * 4)])  # the data, and 4 more of the one mistake
    assert error_weights(CORRECT, 4, convention="copies").tolist() == torch.bincount(copies).tolist()


@pytest.mark.parametrize(
    "mistakes, message",
    [
        (0, "empty.*all 10 samples.*fewer epochs"),
        (6, r"6 of 10 samples \(60.0 %\).*train.*for longer"),
        (10, "10 of 10"),
    ],
)
def test_an_error_set_that_says_nothing_is_reported(mistakes: int, message: str) -> None:
    correct = torch.arange(10) >= mistakes
    with pytest.warns(ErrorSetWarning, match=message) as caught:
        error_weights(correct)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("mistakes", [1, 5])
def test_up_to_half_is_quiet(mistakes: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert error_weights(torch.arange(10) >= mistakes, 3.0).sum() == 10 + 2 * mistakes


@given(st.lists(st.sampled_from([0, 1, 2, 5, 10**12]), min_size=1, max_size=40))
def test_group_weights_follow_the_formula(ids: list[int]) -> None:
    weights = group_weights(torch.tensor(ids))
    expected = [len(ids) / (len(set(ids)) * ids.count(i)) for i in ids]
    torch.testing.assert_close(weights, torch.tensor(expected))
    assert weights.mean().item() == pytest.approx(1, abs=1e-5)


def test_weights_stay_on_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert error_weights(CORRECT.cuda()).is_cuda
    assert group_weights(torch.tensor([0, 1], device="cuda")).is_cuda


class Biased(nn.Module):
    """Right by its eval mode alone: dropout and batch norm would spoil what a training mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout(0.9)
        self.fc = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.fc.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()  # or a data set's worth of maps would be held on to
        return self.fc(self.drop(self.norm(x)))


INPUTS = torch.tensor([[2.0, 1.0], [1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [3.0, 0.0]])
LABELS = torch.tensor([0, 1, 1, 1, 0])


def test_predictions_are_made_after_training_with_the_weights_fixed() -> None:
    model = Biased().train()
    model.norm.eval()  # a user's own choice, to be put back as it was
    state = {key: value.clone() for key, value in model.state_dict().items()}
    loader = DataLoader(TensorDataset(INPUTS, LABELS), batch_size=2)
    correct = predict_correct(model, loader)
    assert correct.tolist() == [True, True, False, True, True]
    assert correct.device.type == "cpu" and correct.dtype == torch.bool
    assert (model.training, model.norm.training, model.drop.training) == (True, False, True)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert model.fc.weight.grad is None


def test_modes_come_back_after_an_error() -> None:
    model = Biased().train()
    with pytest.raises(RuntimeError):
        predict_correct(model, [(torch.randn(4, 3), LABELS[:4])])
    assert model.training and model.norm.training


def test_error_weights_refuse() -> None:
    with pytest.raises(TypeError, match=r"correct must be bool .*, got torch.int64"):
        error_weights(CORRECT.long())
    with pytest.raises(TypeError, match=r"correct must be a torch.Tensor, got list"):
        error_weights([True])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"correct must have shape \[N\], got \[1, 5\]"):
        error_weights(CORRECT[None])
    with pytest.raises(ValueError, match=r"correct must have at least one sample, got shape \[0\]"):
        error_weights(CORRECT[:0])
    for up in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="up must be a finite number > 0"):
            error_weights(CORRECT, up)
    with pytest.raises(TypeError, match="up must be a number, got str"):
        error_weights(CORRECT, "50")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"up must be a whole number of copies.*got 1.5"):
        error_weights(CORRECT, 1.5, convention="copies")
    with pytest.raises(ValueError, match="convention must be one of 'weight', 'copies', got 'jtt'"):
        error_weights(CORRECT, convention="jtt")


def test_group_weights_refuse() -> None:
    with pytest.raises(TypeError, match=r"groups must be int64, got torch.int32"):
        group_weights(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"groups must have shape \[N\], got \[1, 3\]"):
        group_weights(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="groups must have at least one sample"):
        group_weights(torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="groups must be >= 0, got -1"):
        group_weights(torch.tensor([0, -1]))


def loader(**options: object) -> DataLoader:
    return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=2, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "batches, error, message",
    [
        (loader(shuffle=True), ValueError, "batches must keep the order .* shuffle=True"),
        (loader(drop_last=True), ValueError, "batches must cover every sample, got .* drop_last=True"),
        ([], ValueError, "batches must give at least one batch"),
        ([INPUTS], TypeError, r"batches must give sequences \(images, labels, ...\), got Tensor"),
        ([(INPUTS, LABELS.float())], TypeError, "labels must be int64, got torch.float32"),
        ([(INPUTS, LABELS + 1)], ValueError, r"labels must lie in \[0, 2\).* got values in \[1, 2\]"),
        ([(INPUTS, LABELS[:3])], ValueError, r"model must give logits \[n,K\] = \[3, K >= 2\], got \[5, 2\]"),
        ([(INPUTS * float("nan"), LABELS)], ValueError, "got NaN: its training has diverged"),
    ],
)
def test_predict_correct_refuses(batches: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        predict_correct(Biased(), batches)  # type: ignore[arg-type]


def test_predict_correct_refuses_single_logits_and_functions() -> None:
    with pytest.raises(ValueError, match=r"K >= 2\], got \[5, 1\]"):
        predict_correct(nn.Linear(2, 1), [(INPUTS, LABELS)])
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        predict_correct(lambda x: x, [(INPUTS, LABELS)])  # type: ignore[arg-type]


KNOWN = TensorDataset(INPUTS, LABELS, torch.arange(5))


class Stream(data.IterableDataset):
    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        return iter(KNOWN)


class Mine(data.SequentialSampler):
    """May do anything, since it is not torch's own."""


def shuffling() -> dict[str, tuple[object, str]]:
    """Loaders that do not keep the order, or of which that is not known, and what the error has to name."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    whole = data.SequentialSampler(KNOWN)
    ones = torch.ones(5)
    return {
        "weighted": (DataLoader(KNOWN, 2, sampler=data.WeightedRandomSampler(ones, 5)), "WeightedRandomSampler"),
        "subset": (DataLoader(KNOWN, 2, sampler=data.SubsetRandomSampler(range(5))), "SubsetRandomSampler"),
        "distributed": (DataLoader(KNOWN, 2, sampler=data.DistributedSampler(KNOWN, 1, 0)), "DistributedSampler"),
        "a rank's share": (
            DataLoader(KNOWN, 2, sampler=data.DistributedSampler(KNOWN, 2, 0, shuffle=False)),
            "DistributedSampler",
        ),
        "one's own": (DataLoader(KNOWN, 2, sampler=Mine(KNOWN)), "Mine"),
        "numbers": (DataLoader(KNOWN, 2, sampler=[4, 3, 2, 1, 0]), "list"),
        "of another data set": (DataLoader(KNOWN, 2, sampler=data.SequentialSampler(range(3))), "SequentialSampler"),
        "shuffled batches": (
            DataLoader(KNOWN, batch_sampler=data.BatchSampler(data.RandomSampler(KNOWN), 2, False)),
            r"RandomSampler, shuffle=True",
        ),
        "dropped batches": (DataLoader(KNOWN, batch_sampler=data.BatchSampler(whole, 2, True)), "drop_last=True"),
        "batches of one's own": (DataLoader(KNOWN, batch_sampler=[[4, 0], [1, 2, 3]]), "list"),
        "no batches": (DataLoader(KNOWN, batch_size=None, shuffle=True), "RandomSampler"),
        "torchdata's": (stateful(KNOWN, 2, shuffle=True), r"StatefulDataLoader with a RandomSampler, shuffle=True"),
        "torchdata's, dropping": (stateful(KNOWN, 2, drop_last=True), "drop_last=True"),
        "a stream": (DataLoader(Stream(), 2), "IterableDataset"),
        "whoever is first": (DataLoader(KNOWN, 2, num_workers=2, in_order=False), "in_order=False"),
    }


def test_loaders_that_may_not_keep_the_order_are_refused() -> None:
    for name, (batches, named) in shuffling().items():
        with pytest.raises(ValueError, match=named):
            pytest.fail(f"{name}: {predict_correct(Biased(), batches)}")  # type: ignore[arg-type]


def test_what_wraps_such_a_loader_is_refused_too() -> None:
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=1)
    with pytest.raises(ValueError, match="RandomSampler"):
        predict_correct(Biased(), fabric.setup_dataloaders(loader(shuffle=True)))
    assert predict_correct(Biased(), fabric.setup_dataloaders(loader())).tolist() == [True, True, False, True, True]


def test_loaders_in_order_are_read() -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    for batches in (
        DataLoader(KNOWN, 2, sampler=data.SequentialSampler(KNOWN)),
        DataLoader(KNOWN, 2, sampler=data.DistributedSampler(KNOWN, 1, 0, shuffle=False)),
        DataLoader(KNOWN, 2, sampler=EpochSampler(KNOWN, shuffle=False)),
        DataLoader(KNOWN, batch_sampler=data.BatchSampler(data.SequentialSampler(KNOWN), 2, False)),
        torchdata.StatefulDataLoader(KNOWN, 2),
    ):
        assert predict_correct(Biased(), batches).tolist() == [True, True, False, True, True]
    begun = EpochSampler(KNOWN, shuffle=False)
    begun.start_at(0, 2)
    with pytest.raises(ValueError, match="EpochSampler"):
        predict_correct(Biased(), DataLoader(KNOWN, 2, sampler=begun))


def test_a_loader_that_goes_on_in_the_middle_is_refused() -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    first, second = (torchdata.StatefulDataLoader(KNOWN, 2) for _ in range(2))
    next(iter(first))
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="batches must cover every sample, got 3 of the data set's 5"):
        predict_correct(Biased(), second)


def test_with_their_numbers_samples_may_come_in_any_order() -> None:
    expected = [True, True, False, True, True]
    for batches, _ in (shuffling()[name] for name in ("subset", "shuffled batches", "torchdata's", "a stream")):
        assert predict_correct(Biased(), batches, indices=2).tolist() == expected  # type: ignore[arg-type]
    reverse = DataLoader(KNOWN, 2, sampler=[4, 3, 2, 1, 0])
    assert predict_correct(Biased(), reverse, indices=2).tolist() == expected


@pytest.mark.parametrize(
    ("batches", "indices", "error", "message"),
    [
        (DataLoader(KNOWN, 2, sampler=[0, 1, 1, 3, 4]), 2, ValueError, r"number once, 0 to 4, got 4 different ones in"),
        (
            DataLoader(KNOWN, 2, sampler=[0, 1, 3]),
            2,
            ValueError,
            r"got 3 different ones in \[0, 3\]",
        ),
        ([(INPUTS, LABELS)], 2, TypeError, "must hold the samples' numbers at 2"),
        ([(INPUTS, LABELS, torch.zeros(5))], 2, TypeError, "must be int64, the samples' numbers"),
        ([(INPUTS, LABELS, LABELS[:3])], 2, ValueError, r"batch\[2\] must have shape \[n\]"),
        ([(INPUTS, LABELS, LABELS)], 1, ValueError, "indices must be >= 2"),
    ],
)
def test_numbers_that_do_not_fit(batches: object, indices: int, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        predict_correct(Biased(), batches, indices=indices)  # type: ignore[arg-type]
