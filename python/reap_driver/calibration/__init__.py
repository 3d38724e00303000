"""Calibration data: local files to batches of token ids.

source    what `--data [group=]SOURCE[:N]` means
records   records of JSON lines, Parquet and text files, with their places
encode    records to token ids
packing   token ids to sequences
batches   sequences to the batches a model runs on
prefetch  batches made ready while the model runs
"""

from reap_driver.calibration.batches import PackedBatches
from reap_driver.calibration.encode import Encoder
from reap_driver.calibration.packing import PackedSource, pack
from reap_driver.calibration.prefetch import prefetched
from reap_driver.calibration.source import DataSource

__all__ = ["DataSource", "Encoder", "PackedBatches", "PackedSource", "pack", "prefetched"]
