"""Packing: documents of a source end to end in sequences of one length, and the batches they make.

Documents follow each other with the model's end-of-sequence token between them. Nothing is padded
and nothing lost: the last sequence of a source is shorter when the tokens do not fill it, and is a
batch of its own. Attention crosses documents, as in the reference implementation of REAP.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from reap_driver.calibration.encode import Encoder
from reap_driver.calibration.records import Record, read_records
from reap_driver.calibration.source import DataSource
from reap_kernels.errors import DataError

_CHUNK = 256  # records tokenised together


@dataclass(frozen=True)
class PackedSource:
    """All tokens of one source.

    Attributes:
        source: where they came from.
        ids: [tokens] int32, separators included; 4 bytes a token are all that is kept in memory.
        records: how many were read.
        seq_len: length of a sequence.
        seed: of the sample.
        separator: id between documents, None where the model has no such token.
    """

    source: DataSource
    ids: Tensor
    records: int
    seq_len: int
    seed: int
    separator: int | None

    @property
    def sequences(self) -> int:
        """Sequences of `seq_len` tokens; 1 where the tokens do not fill one."""
        return max(1, len(self.ids) // self.seq_len)

    def batch_count(self, batch_size: int = 1) -> int:
        """Batches of that size, the shorter rest included."""
        full, rest = divmod(len(self.ids), self.seq_len)
        return -(-full // batch_size) + (rest > 0)

    def batch(self, number: int, batch_size: int = 1) -> Tensor:
        """input_ids [up to batch_size, seq_len] int64; the last is the shorter rest [1, rest]."""
        full = len(self.ids) // self.seq_len * self.seq_len
        start = number * batch_size * self.seq_len
        if start >= full:
            return self.ids[full:].long()[None]
        stop = min(start + batch_size * self.seq_len, full)
        return self.ids[start:stop].long().view(-1, self.seq_len)

    def batches(self, batch_size: int = 1) -> Iterator[Tensor]:
        """Every batch, in order."""
        return (self.batch(n, batch_size) for n in range(self.batch_count(batch_size)))

    def provenance(self) -> dict[str, Any]:
        """The record statistics keep; the digest is over the ids the model saw, as int32."""
        return {
            "group": self.source.group,
            "source": self.source.name,
            "records": self.records,
            "tokens": len(self.ids),
            "digest": "sha256:" + hashlib.sha256(self.ids.numpy().astype("<i4").data).hexdigest(),
            "seq_len": self.seq_len,
            "seed": self.seed,
            "separator": self.separator,
        }

    def notes(self) -> list[str]:
        """What differs from what was asked for."""
        notes = []
        asked = self.source.samples
        if asked is not None and self.records < asked:
            notes.append(f"{self.source.name} has {self.records} records, {asked} were asked for")
        if self.separator is None and self.records > 1:
            notes.append(
                f"{self.source.name}: the model has no end-of-sequence token, so documents follow "
                "each other without one"
            )
        return notes


def pack(
    source: DataSource,
    encoder: Encoder,
    *,
    seq_len: int,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> PackedSource:
    """Reads, tokenises and packs a source; equal arguments give equal tokens.

    Args:
        source: what to read.
        encoder: of the model.
        seq_len: tokens in a sequence.
        seed: for the sample of records, where the source asks for one.
        progress: called with the number of tokens each chunk of records added.

    Raises:
        DataError: the data cannot be read or tokenised, or holds no token.
    """
    ids, records = array("i"), 0
    for chunk in _chunks(read_records(source, seed)):
        before = len(ids)
        for document in (encoded.ids for encoded in encoder.encode(chunk)):
            separator = encoder.separator
            if ids and document and separator is not None and ids[-1] != separator:
                ids.append(separator)
            ids.extend(document)
        records += len(chunk)
        if progress is not None:
            progress(len(ids) - before)
    if not ids:
        raise DataError(f"data {source.name}: its {records} records hold no token; give some text")
    tokens = torch.frombuffer(ids, dtype=torch.int32)
    return PackedSource(source, tokens, records, seq_len, seed, encoder.separator)


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    iterator = iter(records)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk
