#!/usr/bin/env bash
# Lightning Fabric 2.6.6 + torchdata 0.11.0 + torch 2.13.0: a loader that is resumed in the middle of an epoch goes on
# in the order of epoch 0.
#
# A `StatefulDataLoader` with a shuffling `DistributedSampler`, set up by `fabric.setup_dataloaders`, is saved after two of
# the four batches of epoch 2 (`fabric.save`) and loaded into a new one (`fabric.load`), as a restarted process does.
# torchdata's state holds how many indices the sampler has given, not its epoch (`DistributedSampler` has no state of its own).
# Fabric's wrapper calls `sampler.set_epoch` with its count of `iter()` calls, which a new process begins at 0 and no
# state holds. So the two batches that are read next are the last two of epoch 0: some samples are seen twice in the
# epoch and others never, without a word; and the epoch that follows repeats epoch 1. Each library alone is right: torchdata's
# loader without Fabric goes on rightly after `sampler.set_epoch(2)`, which Fabric overrides when it is called before iterating.
#
# Exits 0 while that is so, 1 when it has changed.
#
# Output seen:
#   epoch 2 as a whole   [[0, 9, 3], [2, 10, 5], [6, 7, 8], [1, 4, 11]]
#   seen before saving   [[0, 9, 3], [2, 10, 5]]
#   read after loading   [[2, 10, 3], [1, 11, 6]]   (the last two of epoch 0: True)
#   never seen           [4, 7, 8]
#   the epoch after is   epoch 1
#   without Fabric       [[6, 7, 8], [1, 4, 11]]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 lightning-fabric==2.6.6 torchdata==0.11.0
cat > resume.py <<'PYTHON'
import sys
import warnings

from lightning_fabric import Fabric
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

warnings.simplefilter("ignore")
fabric = Fabric(accelerator="cpu", devices=1)


def loader():
    samples = list(range(12))
    return StatefulDataLoader(samples, batch_size=3, sampler=DistributedSampler(samples, 1, 0, seed=0))


def read(batches):
    return [batch.tolist() for batch in batches]


def begun(batches):
    """Two whole epochs and two batches of the third."""
    read(batches), read(batches)
    iterator = iter(batches)
    return [next(iterator).tolist() for _ in range(2)]


whole = fabric.setup_dataloaders(loader())
epochs = [read(whole) for _ in range(4)]
first = fabric.setup_dataloaders(loader())
seen = begun(first)
fabric.save("state.ckpt", {"batches": first})
resumed = fabric.setup_dataloaders(loader())
fabric.load("state.ckpt", {"batches": resumed})
resumed.sampler.set_epoch(2)
rest = read(resumed)
after = read(resumed)

plain, again = loader(), loader()
for epoch in range(2):
    plain.sampler.set_epoch(epoch)
    read(plain)
plain.sampler.set_epoch(2)
iterator = iter(plain)
assert [next(iterator).tolist() for _ in range(2)] == seen == epochs[2][:2]
again.load_state_dict(plain.state_dict())
again.sampler.set_epoch(2)
alone = read(again)

missed = sorted(set(range(12)) - {number for batch in seen + rest for number in batch})
print("epoch 2 as a whole  ", epochs[2])
print("seen before saving  ", seen)
print("read after loading  ", rest, f"  (the last two of epoch 0: {rest == epochs[0][2:]})")
print("never seen          ", missed)
print("the epoch after is  ", f"epoch {epochs.index(after)}" if after in epochs else after)
print("without Fabric      ", alone)
unchanged = rest == epochs[0][2:] and missed and after == epochs[1] and alone == epochs[2][2:]
sys.exit(0 if unchanged else 1)
PYTHON
venv/bin/python resume.py
