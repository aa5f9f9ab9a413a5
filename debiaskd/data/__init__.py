"""Data sets of images with boxes: preparation, loading, augmentation.

`prepare` decodes a data set once. `PackedDataset` reads the result (or, for LitData's chunks, `ChunkedDataset` by
number and `StreamedDataset` sequentially), `loader` makes batches, and `Augment` transforms pixels and boxes on the
device.
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
