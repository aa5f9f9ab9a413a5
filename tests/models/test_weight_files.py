"""Weight files as the usual training scripts leave them: which tensors are taken, what is said, what is refused."""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors")

import numpy as np
from safetensors.torch import save_file
from torch import nn

from debiaskd.models import SmallNet
from debiaskd.models.registry import LastLayerWarning, NetworkError, load_weights, weights_file, weights_hash
from debiaskd.models.weight_reading import one_line

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = argparse.Namespace(model="small", lr=0.1, output=pathlib.PurePosixPath("out"))


def net(classes: int = 2) -> SmallNet:
    return SmallNet((4,), (2,), classes)


STATE = {name: torch.randn(tensor.shape) for name, tensor in net().state_dict().items() if tensor.is_floating_point()}
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}


def named(prefix: str, state: dict[str, torch.Tensor] = STATE) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def momentum() -> dict[str, Any]:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


EMA = "took {!r} (the moving average of the weights)"
WRITTEN: dict[str, tuple[dict[str, Any], str]] = {
    "alone": (STATE, ""),
    "timm": ({"epoch": 3, "state_dict": STATE, "optimizer": momentum(), "args": OPTIONS}, "took 'state_dict'"),
    "timm, average": ({"state_dict": OTHER, "state_dict_ema": STATE, "args": OPTIONS}, EMA.format("state_dict_ema")),
    "torchvision": ({"model": STATE, "optimizer": momentum(), "epoch": 3, "args": OPTIONS}, "took 'model'"),
    "torchvision, average": (
        {"model": OTHER, "model_ema": {"n_averaged": torch.tensor(5), **named("module.")}},
        f"{EMA.format('model_ema')}, took off the prefix 'module.'",
    ),
    "ema": ({"model": OTHER, "ema": STATE}, EMA.format("ema")),
    "an average of another network": ({"model": STATE, "ema": {"a": torch.ones(1)}}, "took 'model'"),
    "model_state_dict": ({"model_state_dict": STATE, "loss": 0.3}, "took 'model_state_dict'"),
    "a tensor beside": ({"model": STATE, "best_acc": torch.tensor(71.2)}, "took 'model'"),
    "net": ({"net": STATE, "acc": np.float64(71.2), "seen": np.arange(3)}, "took 'net'"),
    "a key in a key": ({"model": {"state_dict": STATE}}, "took 'model.state_dict'"),
    "an epoch among the tensors": ({**STATE, "epoch": 3}, ""),
    "parallel": (named("module."), "took off the prefix 'module.'"),
    "compiled": (named("_orig_mod."), "took off the prefix '_orig_mod.'"),
    "compiled, parallel": (named("module._orig_mod."), "took off the prefix 'module._orig_mod.'"),
    "a part compiled": (
        {re.sub("^body", "body._orig_mod", name): tensor for name, tensor in STATE.items()},
        "took off the prefix '…_orig_mod.'",
    ),
    "Lightning": (
        {"state_dict": {**named("model."), "criterion.weight": torch.ones(2)}, "pytorch-lightning_version": "2.6.6"},
        "took 'state_dict', took off the prefix 'model.', left out 1 tensor beside them",
    ),
    "a distiller": (
        {"state_dict": {**named("student."), **named("teacher.", OTHER)}},
        f"took 'state_dict', took off the prefix 'student.', left out {len(STATE)} tensors beside them",
    ),
    "averaged": ({"n_averaged": torch.tensor(5), **named("module.")}, "took off the prefix 'module.'"),
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_scripts_write(tmp_path: Path, name: str, zipped: bool) -> None:
    content, said = WRITTEN[name]
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    model = net()
    assert load_weights(model, tmp_path / "w.pt") == said
    for key, tensor in STATE.items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_a_file_of_numpy_1_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "new.pt", "w") as new:
        torch.save({"model": STATE, "acc": np.float64(1), "seen": np.zeros(2, "f4")}, tmp_path / "w.pt")
        with zipfile.ZipFile(tmp_path / "w.pt") as old:
            for item in old.namelist():
                text = old.read(item)
                new.writestr(item, text.replace(b"numpy._core", b"numpy.core") if item.endswith("data.pkl") else text)
    assert load_weights(net(), tmp_path / "new.pt") == "took 'model'"


def test_prefixes_of_the_network_itself_stay(tmp_path: Path) -> None:
    model = nn.Module()
    model.model = nn.Linear(2, 2)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert load_weights(model, tmp_path / "w.pt") == ""
    torch.save({"model": {f"model.{name}": tensor for name, tensor in model.state_dict().items()}}, tmp_path / "w.pt")
    assert load_weights(model, tmp_path / "w.pt") == "took 'model', took off the prefix 'model.'"


def test_a_last_layer_of_other_classes_below_a_key_begins_anew(tmp_path: Path) -> None:
    torch.save({"state_dict": named("module."), "best": torch.ones(1)}, tmp_path / "w.pt")
    model = net(5)
    with pytest.warns(LastLayerWarning, match=r"w\.pt: its last layer, fc, is of 2 classes and not of 5"):
        assert load_weights(model, tmp_path / "w.pt", to_train=True).endswith("'module.'")
    assert torch.equal(model.state_dict()["body.conv1.weight"], STATE["body.conv1.weight"])
    with pytest.raises(NetworkError, match=r"of another network: fc\.weight is \[2, 4\] there and \[5, 4\] here, and"):
        load_weights(model, tmp_path / "w.pt")


def test_weights_of_another_network_are_told_by_the_names_that_it_has(tmp_path: Path) -> None:
    state = {**named("module."), **{f"module.more{i}": torch.ones(1) for i in range(30)}}
    torch.save({"model": state, "best": torch.ones(1), "epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(NetworkError, match=r"of another network: more0 is \[1\] there and missing here, and 29 more$"):
        load_weights(net(), tmp_path / "w.pt")


# -- shards -----------------------------------------------------------------------------------------------------------


def sharded(folder: Path) -> Path:
    names = sorted(STATE)
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(places.values()):
        save_file({name: STATE[name] for name in names if places[name] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def test_sharded_safetensors(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    assert weights_file(tmp_path) == index
    for path in (index, tmp_path):
        model = net()
        assert load_weights(model, path) == ""
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in STATE.items())
    before = weights_hash(tmp_path)
    assert before == weights_hash(index)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    with pytest.raises(NetworkError, match=r"missing here|missing there .*; it is one of several shards: give their i"):
        load_weights(net(), shard)
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert weights_hash(tmp_path) != before, "of every shard"
    shard.unlink()
    for call in (lambda: load_weights(net(), index), lambda: weights_hash(index)):
        with pytest.raises(NetworkError, match="there is no such file of weights"):
            call()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": {"a": "../w.safetensors"}}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(NetworkError, match="must be an index of shards beside it"):
        load_weights(net(), index)


def test_a_tensor_that_its_shard_lacks(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    document = json.loads(index.read_text())
    document["weight_map"]["extra"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(document))
    with pytest.raises(NetworkError, match=r"extra is missing in model-00001-of-00002\.safetensors$"):
        load_weights(net(), index)


# -- what needs code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", [None, "model"])
def test_a_whole_module_is_refused_with_the_lines_that_convert_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None, zipped: bool
) -> None:
    model = net()
    model.load_state_dict(STATE, strict=False)
    content = model if key is None else {"epoch": 3, key: model, "args": OPTIONS}
    monkeypatch.chdir(tmp_path)
    torch.save(content, "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        NetworkError, match=r"w\.pt: holds a whole pickled module \(debiaskd\.models\.zoo\.small\.SmallNet\)"
    ) as e:
        load_weights(net(), "w.pt")
    assert "\x1b" not in str(e.value) and "\n" not in str(e.value)
    exec("import torch\n" + str(e.value).partition("its package is installed: ")[2], {})
    assert load_weights(model, "w-state.pt") == ""


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_scripted_module_is_refused_with_the_lines_that_convert_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(2, 2))
    torch.jit.trace(model, torch.ones(1, 2)).save("w.pt")
    with pytest.raises(NetworkError, match=r"w\.pt: is a TorchScript archive") as e:
        load_weights(model, "w.pt")
    exec("import torch\n" + str(e.value).partition("convert it: ")[2], {})
    assert load_weights(model, "w-state.pt") == ""


def test_an_object_that_needs_code_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "config": collections.UserDict(a=1)}, tmp_path / "w.pt")
    with pytest.raises(NetworkError, match=r"w\.pt: holds collections\.UserDict, which cannot be read without") as e:
        load_weights(net(), tmp_path / "w.pt")
    assert "\x1b" not in str(e.value)


class Harm:
    def __reduce__(self) -> Any:
        return (pathlib.Path.touch, (pathlib.Path("harm"),))


def test_no_code_of_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content in ({"state_dict": STATE, "args": Harm()}, argparse.Namespace(a=Harm()), [np.array([Harm()])]):
        torch.save(content, "w.pt")
        with pytest.raises(NetworkError, match=r"w\.pt: "):
            load_weights(net(), "w.pt")
    assert not pathlib.Path("harm").exists()


def test_messages_carry_no_escape_codes() -> None:
    assert one_line("a \x1b[1mbold\x1b[0m\n word\x1b[38;5;1m") == "a bold word"
