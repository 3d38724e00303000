"""Packing: the documents of a source as sequences, in one of three ways.

| packing | a sequence is | attention |
|---|---|---|
| `concat` | `seq_len` tokens of all documents, end to end | crosses documents |
| `isolated` | the same tokens | ends where a document does; positions begin anew |
| `none` | one document, cut to `seq_len` tokens | its own |

`concat` is what the reference implementation of REAP does. The model's end-of-sequence token ends a
document that another one follows. Nothing is padded here, and nothing lost but what `none` cuts
off: the last sequence of a source is shorter when its tokens do not fill it.

Documents that were token ids in their records stay as they were made elsewhere: no token is added
to them, and one of exactly `seq_len` tokens is a sequence of its own, before which the sequence
that was begun ends. A document with images is a sequence of its own, whatever its length, and never
cut.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from reap_driver.compat.library_errors import one_line
from reap_driver.data.encode import Document, Encoder
from reap_driver.data.image_inputs import ImageInputs
from reap_driver.data.records import BadRecords, Record, guard
from reap_driver.data.sampling import read_records
from reap_driver.data.source import DataSource
from reap_kernels.errors import DataError

Packing = Literal["concat", "isolated", "none"]

_CHUNK = 256  # records tokenized together
_CHUNK_SIZE = 2**24  # characters that end a chunk of fewer
_NAMED = 40  # fields not used that are named


@dataclass(frozen=True)
class PackedSource:
    """All tokens of one source.

    Attributes:
        source: where they came from.
        ids: [tokens] int32, separators included.
        starts: [documents] int64, where in `ids` the documents that hold tokens begin.
        counted: [tokens] bool, those whose experts are counted; None where all are.
        records: how many were read.
        seq_len: length of a sequence, of `none` the largest.
        seed: of the sample.
        separator: id between documents, None where there is none.
        packing: how documents make sequences.
        truncated: documents that were longer than `seq_len` and cut.
        skipped: records left out because something is wrong with them; None: none may be.
        given: [documents] bool, those that were token ids; None where none was.
        unused: names of fields of the records that nothing was made of.
        image_inputs: documents with images, by where in `ids` they begin.
    """

    source: DataSource
    ids: Tensor
    starts: Tensor
    counted: Tensor | None
    records: int
    seq_len: int
    seed: int
    separator: int | None
    packing: Packing = "concat"
    truncated: int = 0
    skipped: BadRecords | None = None
    given: Tensor | None = None
    unused: Sequence[str] = ()
    image_inputs: Mapping[int, ImageInputs] = field(default_factory=dict)

    @cached_property
    def bounds(self) -> list[int]:
        """Where in `ids` each sequence begins, and where the last one ends."""
        if self.packing == "none":
            return [*self.starts.tolist(), self.tokens]
        ends = [*sorted({*self._whole, *self._whole.values()}), self.tokens]
        bounds = [0]
        for end in ends:
            alone = bounds[-1] in self._whole
            between = () if alone else range(bounds[-1] + self.seq_len, end, self.seq_len)
            bounds += [*between, end]
        return list(dict.fromkeys(bounds))

    @cached_property
    def _whole(self) -> dict[int, int]:
        """Where documents begin and end that are sequences: those that were token ids, as many as a
        sequence has, and those with images.
        """
        if self.given is None:
            return {}
        ends = [*self.starts[1:].tolist(), self.tokens]
        spans = zip(self.starts.tolist(), ends, self.given.tolist(), strict=True)
        return {
            begin: end
            for begin, end, given in spans
            if begin in self.image_inputs or (given and end - begin == self.seq_len)
        }

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.ids)

    @property
    def sequences(self) -> int:
        """How many there are."""
        return len(self.bounds) - 1

    @property
    def full_sequences(self) -> int:
        """Sequences of `seq_len` tokens that the tokens would make: at least 1."""
        return -(-self.tokens // self.seq_len)

    @cached_property
    def counted_tokens(self) -> int:
        """Tokens whose experts are counted."""
        return self.tokens if self.counted is None else int(self.counted.sum())

    def positions(self, begin: int, end: int) -> Tensor:
        """[end - begin] int64: of each token of a sequence, its place in its document.

        A document that began in another sequence begins anew in this one.
        """
        at = torch.arange(begin, end)
        document = torch.searchsorted(self.starts, at, right=True) - 1
        return at - self.starts[document].clamp(min=begin)

    def provenance(self) -> dict[str, Any]:
        """The record statistics keep. The digest is over the ids as int32, then, where they matter,
        the documents' starts as int64 and a byte a token that says whether it counts; and the
        sequences' bounds as int64 where documents are sequences of their own; and the images."""
        asked = {"samples": self.source.samples, "tokens": self.source.tokens}
        facts = {
            "group": self.source.group,
            "source": self.source.name,
            "records": self.records,
            "tokens": self.tokens,
            "counted_tokens": self.counted_tokens,
            "sequences": self.sequences,
            "digest": "sha256:" + self._digest,
            "packing": self.packing,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "separator": self.separator,
            "asked": {key: value for key, value in asked.items() if value is not None},
            "truncated": self.truncated,
            "unused": list(self.unused),
        }
        if self.image_inputs:
            facts["images"] = sum(len(one.images) for one in self.image_inputs.values())
        bad = self.skipped
        return facts if bad is None else {**facts, "skipped": bad.count, "skipped_first": bad.first}

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(self.ids.numpy().astype("<i4").data)
        if self.packing != "concat":
            digest.update(self.starts.numpy().astype("<i8").data)
        if self.counted is not None:
            digest.update(self.counted.numpy().view("u1").data)
        if self.packing != "none" and any(begin % self.seq_len for begin in self._whole):
            digest.update(torch.tensor(self.bounds).numpy().astype("<i8").data)
        for begin, one in self.image_inputs.items():
            for image in one.images:
                digest.update(f"{begin}:{len(image)}:".encode() + image)
        return digest.hexdigest()

    def notes(self) -> list[str]:
        """What differs from what was asked for."""
        name, asked, notes = self.source.name, self.source, []
        if asked.samples is not None and self.records < asked.samples:
            notes.append(f"{name} has {self.records} records, {asked.samples} were asked for")
        if asked.tokens is not None and self.tokens < asked.tokens:
            notes.append(f"{name} has {self.tokens} tokens, {asked.tokens} were asked for")
        if self.separator is None and self._has_gaps:
            notes.append(
                f"{name}: the model has no end-of-sequence token, so documents follow each other "
                "without one"
            )
        if self.truncated:
            cut = f"{self.truncated} of {self.records} records were cut to {self.seq_len} tokens"
            notes.append(f"{name}: {cut}")
        if self.skipped is not None and self.skipped.count:
            first = "; ".join(self.skipped.first)
            notes.append(f"{name}: {self.skipped.count} bad records were left out, first {first}")
        length = self._common_length
        if length is not None and length != self.seq_len and self.packing != "none":
            notes.append(
                f"{name}: its documents are all of {length} token ids; sequences of as many "
                f"(--seq-len {length}) keep them as they are"
            )
        if self.unused:
            notes.append(f"{name}: fields not used: {', '.join(self.unused)}")
        return notes

    @property
    def _common_length(self) -> int | None:
        """Of the documents, where all were token ids and there are several of one length."""
        if self.given is None or not self.given.all() or len(self.given) < 2:
            return None
        lengths = torch.diff(self.starts, append=torch.tensor([self.tokens])).unique()
        return int(lengths) if len(lengths) == 1 else None

    @property
    def _has_gaps(self) -> bool:
        """Whether separators have a place: another document follows one that was tokenized here."""
        if self.packing == "none" or len(self.starts) < 2:
            return False
        return self.given is None or not bool(self.given[:-1].all())


def pack(
    source: DataSource,
    encoder: Encoder,
    *,
    seq_len: int,
    seed: int = 0,
    packing: Packing = "concat",
    skip_bad: bool = False,
    progress: Callable[[int], None] | None = None,
) -> PackedSource:
    """Reads, tokenises and packs a source; equal arguments give equal tokens.

    Args:
        source: what to read; where it asks for a number of tokens, it is cut to exactly as many.
        encoder: of the model.
        seq_len: tokens in a sequence; with `none`, at most.
        seed: for the sample of records, where the source asks for one.
        packing: how documents make sequences.
        skip_bad: leave bad records out, and count them.
        progress: called with the number of tokens each chunk of records added.

    Raises:
        DataError: the data cannot be read or tokenised, or holds no token that counts.
    """
    bad, unused = BadRecords() if skip_bad else None, set[str]()
    stream = _Stream(source.tokens, seq_len if packing == "none" else None)
    for chunk in _chunks(read_records(source, seed, bad)):
        before = len(stream.ids)
        for document in encoder.encode(chunk, bad):
            with guard(bad):
                _check_length(document, seq_len)
                stream.add(document, encoder.separator)
            if stream.full:
                break
        unused.update(*(record.unused for record in chunk))
        if progress is not None:
            progress(len(stream.ids) - before)
        if stream.full:
            break
    stream.check(source)
    given = torch.frombuffer(stream.given, dtype=torch.bool)
    return PackedSource(
        source,
        torch.frombuffer(stream.ids, dtype=torch.int32),
        torch.frombuffer(stream.starts, dtype=torch.int64),
        None if stream.counted is None else torch.frombuffer(stream.counted, dtype=torch.bool),
        stream.records,
        seq_len,
        seed,
        None if packing == "none" or given.all() else encoder.separator,
        packing,
        stream.truncated,
        bad,
        given if given.any() else None,
        _named(unused - encoder.written),
        stream.image_inputs,
    )


def _check_length(document: Document, seq_len: int) -> None:
    """Raises DataError for a document with images that is longer than a sequence."""
    if document.image_inputs is not None and len(document.ids) > seq_len:
        raise DataError(
            f"{document.image_inputs.place}: has {len(document.ids)} tokens with its images, and a "
            f"sequence {seq_len}; give smaller images, or a larger --seq-len"
        )


def _named(names: set[str]) -> list[str]:
    """Names of fields as they can be kept and shown, in order, and how many more there are."""
    shown = [one_line(name, 60) for name in sorted(names)[:_NAMED]]
    return [*shown, f"{len(names) - _NAMED} more"] if len(names) > _NAMED else shown


class _Stream:
    """Documents one behind the other, as they come.

    Args:
        budget: tokens after which it is full; None: never.
        longest: tokens a document is cut to, documents then being apart; None: they are not cut
            and have a separator between them.

    Attributes:
        ids, starts, counted, given, records, truncated, image_inputs: as in `PackedSource`, but in
            buffers that grow.
    """

    def __init__(self, budget: int | None, longest: int | None) -> None:
        self._budget, self._longest = budget, longest
        self.ids = array("i")
        self.starts = array("q")
        self.given = bytearray()
        self.image_inputs: dict[int, ImageInputs] = {}
        self.counted: bytearray | None = None
        self.records = self.truncated = 0
        self._all_counted = True  # in the document before

    @property
    def full(self) -> bool:
        """Whether the budget is reached."""
        return self._budget is not None and len(self.ids) >= self._budget

    def add(self, document: Document, separator: int | None) -> None:
        """Appends a document; one without tokens is counted and leaves no trace."""
        self.records += 1
        ids = document.ids
        if document.image_inputs is not None and self._over(len(ids)):  # it cannot be cut
            self.records, self._budget = self.records - 1, len(self.ids)
            return
        if not ids:
            return
        if self._longest is not None:
            self.truncated += len(ids) > self._longest
            ids = ids[: self._longest]
        elif self.ids and not self.given[-1] and separator not in (None, self.ids[-1]):
            self.ids.append(separator)
        if document.image_inputs is not None:
            self.image_inputs[len(self.ids)] = document.image_inputs
        self.starts.append(len(self.ids))
        self.given.append(document.given)
        self.ids.extend(ids)
        self._count(document.counted)
        if self.full:
            self._cut()

    def _over(self, tokens: int) -> bool:
        """Whether so many more tokens are more than the budget."""
        return self._budget is not None and len(self.ids) + tokens > self._budget

    def _count(self, counted: bytes | None) -> None:
        """Brings `counted` up to `ids`; a separator counts where all of its document does."""
        begin = self.starts[-1]
        if counted is not None and self.counted is None:
            self.counted = bytearray(b"\1" * begin)
        if self.counted is not None:
            self.counted += bytes([self._all_counted]) * (begin - len(self.counted))
            added = len(self.ids) - begin
            self.counted += b"\1" * added if counted is None else counted[:added]
        self._all_counted = counted is None

    def _cut(self) -> None:
        """To the budget; a document that then has no token goes."""
        del self.ids[self._budget :]
        while self.starts and self.starts[-1] >= len(self.ids):
            self.starts.pop()
            self.given.pop()
        if self.counted is not None:
            del self.counted[self._budget :]

    def check(self, source: DataSource) -> None:
        """Raises DataError where nothing is left to count."""
        if not self.ids:
            raise DataError(
                f"data {source.name}: its {self.records} records hold no token; give some text"
            )
        if self.counted is not None and not any(self.counted):
            raise DataError(
                f"data {source.name}: none of its {len(self.ids)} tokens is an answer's; give "
                "conversations with answers, or leave out --answers-only"
            )


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records to be tokenized together: `_CHUNK` of them, or fewer that are long."""
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += _size(record.fields)
        if len(chunk) == _CHUNK or size > _CHUNK_SIZE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _size(value: Any) -> int:
    """Characters, bytes and numbers in a value, about."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        numbers = not value or isinstance(value[0], int)
        return len(value) if numbers else sum(map(_size, value))
    return 1
