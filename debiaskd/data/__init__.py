"""Data sets: pictures with boxes, read fast.

`prepare` decodes a data set once; `PackedDataset` (or, through LitData, `ChunkedDataset` by number and
`StreamedDataset` from beginning to end) reads what it wrote, `loader` makes batches of it, and `Augment` moves pixels
and boxes on the device. `digits` draws its own pictures.
"""

from debiaskd.data.augment import Augment
from debiaskd.data.batch import Batch, collate
from debiaskd.data.loading import EpochSampler, loader, open_dataset, set_epoch
from debiaskd.data.packed import manifest
from debiaskd.data.packed.chunked import ChunkedDataset
from debiaskd.data.packed.mapped import PackedDataset
from debiaskd.data.packed.prepare import Prepared, prepare
from debiaskd.data.packed.streamed import StreamedDataset
from debiaskd.data.sources.records import DataError

__all__ = [
    "Augment",
    "Batch",
    "ChunkedDataset",
    "DataError",
    "EpochSampler",
    "PackedDataset",
    "Prepared",
    "StreamedDataset",
    "collate",
    "loader",
    "manifest",
    "open_dataset",
    "prepare",
    "set_epoch",
]
