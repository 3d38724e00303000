"""Packs the documents of a source into sequences, in one of three ways.

| packing | a sequence is | attention |
|---|---|---|
| `concat` | `seq_len` tokens of the concatenated documents | across documents |
| `isolated` | the same tokens | within each document; positions restart there |
| `none` | one document, truncated to `seq_len` tokens | within the document |

`concat` is what the reference implementation of REAP does. The model's end-of-sequence token
separates consecutive documents. Packing adds no padding and drops no tokens, except those that
`none` truncates; the last sequence of a source may be shorter.

Documents that are token ids in their records stay as they are: no token is added to them, and a
document of exactly `seq_len` tokens is a sequence of its own. A document with images is always a
sequence of its own and never truncated.
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
_CHUNK_SIZE = 2**24  # characters after which a chunk of fewer records ends
_NAMED = 40  # unused fields that are listed by name


@dataclass(frozen=True)
class PackedSource:
    """All tokens of one source.

    Attributes:
        source: the data source.
        ids: [tokens] int32, separators included.
        starts: [documents] int64, index in `ids` of the first token of each document that has any.
        counted: [tokens] bool, True for tokens whose experts are counted; None if all are.
        records: number of records read.
        seq_len: tokens per sequence; with packing `none`, the maximum.
        seed: seed of the random sample.
        separator: token id between documents; None if there is none.
        packing: how documents are packed into sequences.
        truncated: number of documents that were longer than `seq_len` and truncated.
        skipped: bad records that were skipped; None if they were not to be skipped.
        given: [documents] bool, True for documents that are token ids in their records; None if
            there are none.
        unused: names of fields of the records that were not used.
        image_inputs: documents with images, by the index in `ids` of their first token.
        chat_template: digest of the file whose template was used instead of the tokenizer's; None
            if the tokenizer's was.
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
    chat_template: str | None = None

    @cached_property
    def bounds(self) -> list[int]:
        """Index in `ids` of the first token of each sequence, and the end of the last one."""
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
        """First token -> end, of the documents that are sequences of their own: token ids of length
        `seq_len`, and documents with images.
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
        """Number of tokens."""
        return len(self.ids)

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return len(self.bounds) - 1

    @property
    def full_sequences(self) -> int:
        """Number of sequences of `seq_len` tokens that hold all tokens, at least 1."""
        return -(-self.tokens // self.seq_len)

    @cached_property
    def counted_tokens(self) -> int:
        """Number of tokens whose experts are counted."""
        return self.tokens if self.counted is None else int(self.counted.sum())

    def positions(self, begin: int, end: int) -> Tensor:
        """[end - begin] int64: the position of each token of a sequence in its document.

        Positions of a document that started in an earlier sequence start at 0 in this one.
        """
        at = torch.arange(begin, end)
        document = torch.searchsorted(self.starts, at, right=True) - 1
        return at - self.starts[document].clamp(min=begin)

    def provenance(self) -> dict[str, Any]:
        """What statistics record of the source.

        The digest is over the ids as int32 and, if they apply, the starts of documents as int64,
        one byte per token that says whether it counts, the bounds of sequences as int64 (if
        documents are sequences of their own), and the encoded images.
        """
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
        if self.chat_template is not None:
            facts["chat_template"] = self.chat_template
        if self.source.recipe is not None:
            facts["recipe"] = dict(zip(("name", "digest"), self.source.recipe, strict=True))
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
        """What the user should know: fewer records or tokens than requested, truncation,
        bad records, unused fields.
        """
        name, asked, notes = self.source.name, self.source, []
        filled = asked.tokens is not None and self.tokens == asked.tokens
        if asked.samples is not None and self.records < asked.samples and not filled:
            notes.append(f"{name} has {self.records} records, {asked.samples} were requested")
        if asked.tokens is not None and self.tokens < asked.tokens:
            notes.append(f"{name} has {self.tokens} tokens, {asked.tokens} were requested")
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
                f"(`seq_len={length}`) keep them as they are"
            )
        if self.unused:
            notes.append(f"{name}: fields not used: {', '.join(self.unused)}")
        return notes

    @property
    def _common_length(self) -> int | None:
        """The common length of all documents, if they are token ids and more than one; else
        None.
        """
        if self.given is None or not self.given.all() or len(self.given) < 2:
            return None
        lengths = torch.diff(self.starts, append=torch.tensor([self.tokens])).unique()
        return int(lengths) if len(lengths) == 1 else None

    @property
    def _has_gaps(self) -> bool:
        """Whether there are boundaries for a separator: after a document that was tokenized
        here.
        """
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
    """Reads, tokenizes and packs a source. Equal arguments give equal tokens.

    Args:
        source: the source to read. If it has a budget of tokens, exactly that many are kept.
        encoder: the encoder of the model.
        seq_len: tokens per sequence; with packing `none`, the maximum.
        seed: seed of the random sample of records, if the source has a budget.
        packing: how documents are packed into sequences.
        skip_bad: skip and count bad records instead of raising an error.
        progress: called with the number of tokens that each chunk of records added.

    Raises:
        DataError: the data cannot be read or tokenized, or has no token that counts.
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
        None if encoder.chat_template is None else encoder.chat_template.digest,
    )


def _check_length(document: Document, seq_len: int) -> None:
    """Raises DataError for a document with images that is longer than a sequence."""
    if document.image_inputs is not None and len(document.ids) > seq_len:
        raise DataError(
            f"{document.image_inputs.place}: has {len(document.ids)} tokens with its images, and a "
            f"sequence {seq_len}; give smaller images, or a larger `seq_len`"
        )


def _named(names: set[str]) -> list[str]:
    """The first names of fields, sorted, shortened to one line each, and how many more
    there are.
    """
    shown = [one_line(name, 60) for name in sorted(names)[:_NAMED]]
    return [*shown, f"{len(names) - _NAMED} more"] if len(names) > _NAMED else shown


class _Stream:
    """Concatenates documents.

    Args:
        budget: maximum number of tokens; None for no limit.
        longest: truncate documents to this many tokens and add no separators; None to keep them
            whole, with separators between them.

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
        self._all_counted = True  # whether all tokens of the previous document count

    @property
    def full(self) -> bool:
        """Whether the budget is reached."""
        return self._budget is not None and len(self.ids) >= self._budget

    def add(self, document: Document, separator: int | None) -> None:
        """Appends a document. One without tokens only adds to `records`."""
        self.records += 1
        ids = document.ids
        if document.image_inputs is not None and self._over(len(ids)):  # images cannot be truncated
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
        """Whether this many more tokens would exceed the budget."""
        return self._budget is not None and len(self.ids) + tokens > self._budget

    def _count(self, counted: bytes | None) -> None:
        """Extends `counted` to the length of `ids`. A separator counts if the whole
        document before it does.
        """
        begin = self.starts[-1]
        if counted is not None and self.counted is None:
            self.counted = bytearray(b"\1" * begin)
        if self.counted is not None:
            self.counted += bytes([self._all_counted]) * (begin - len(self.counted))
            added = len(self.ids) - begin
            self.counted += b"\1" * added if counted is None else counted[:added]
        self._all_counted = counted is None

    def _cut(self) -> None:
        """Truncates to the budget; removes documents that then have no tokens."""
        del self.ids[self._budget :]
        while self.starts and self.starts[-1] >= len(self.ids):
            self.starts.pop()
            self.given.pop()
        if self.counted is not None:
            del self.counted[self._budget :]

    def check(self, source: DataSource) -> None:
        """Raises DataError if no token counts."""
        if not self.ids:
            raise DataError(
                f"data {source.name}: its {self.records} records hold no token; give some text"
            )
        if self.counted is not None and not any(self.counted):
            raise DataError(
                f"data {source.name}: none of its {len(self.ids)} tokens is part of an answer; "
                "give conversations with answers, or leave out `answers_only=True`"
            )


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Groups of records to tokenize at once: `_CHUNK` records, or fewer long ones."""
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
    """Approximate number of characters, bytes and numbers in a value."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        numbers = not value or isinstance(value[0], int)
        return len(value) if numbers else sum(map(_size, value))
    return 1
