"""Batches of packed sources, each of one source and one fold of it.

The sequences of a source are dealt to folds in turn, so that every fold is like a random share of
it. A batch takes sequences of one fold, longest first, as many as have the tokens it may hold.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reap_driver.data.packing import PackedSource


@dataclass(frozen=True)
class _Batch:
    """One batch: which sequences of which source."""

    source: PackedSource
    fold: int
    rows: Sequence[int]


class PackedBatches:
    """The batches of packed sources, one source after the other.

    Args:
        sources: what they hold.
        sizes: for each source, how many sequences of its `seq_len` tokens a batch has at most; of
            shorter ones it has as many as take no more tokens, padding included.
        folds: into how many folds the sequences of each source are dealt.
        pad: whether sequences of `none` packing that differ in length may share a batch, padded on
            the right, with an attention mask. Those of the other packings never do.
    """

    def __init__(
        self,
        sources: Sequence[PackedSource],
        sizes: Sequence[int],
        *,
        folds: int = 1,
        pad: bool = True,
    ) -> None:
        self.folds = folds
        self.groups = list(dict.fromkeys(source.source.group for source in sources))
        self._batches = [
            _Batch(source, fold, rows)
            for source, size in zip(sources, sizes, strict=True)
            for fold in range(folds)
            for rows in _divided(source, fold, folds, size, pad)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def group(self, number: int) -> str:
        """The group of the source a batch is from."""
        return self._batches[number].source.source.group

    def fold(self, number: int) -> int:
        """The fold a batch is from, from 0 on."""
        return self._batches[number].fold

    def inputs(self, number: int) -> dict[str, Tensor]:
        """`input_ids` [batch, seq] int64, and of the same shape, each where it says something:
        `attention_mask` int64, 0 on padding; `position_ids` int64, 0 where an isolated document
        begins; `token_mask` bool, the tokens that count. Of a sequence with images, which is alone
        in its batch, what the model's processor makes."""
        source, rows = self._batches[number].source, self._batches[number].rows
        image_inputs = source.image_inputs.get(source.bounds[rows[0]])
        if image_inputs is not None:
            return image_inputs.inputs()
        spans = [slice(source.bounds[row], source.bounds[row + 1]) for row in rows]
        inputs = {"input_ids": _stacked([source.ids[span] for span in spans]).long()}
        lengths = torch.tensor([span.stop - span.start for span in spans])
        if len(lengths.unique()) > 1:
            inside = torch.arange(int(lengths.max())) < lengths[:, None]
            inputs["attention_mask"] = inside.long()
        if source.packing == "isolated":
            places = [source.positions(span.start, span.stop) for span in spans]
            inputs["position_ids"] = torch.stack(places)
        if source.counted is not None:
            inputs["token_mask"] = _stacked([source.counted[span] for span in spans])
        return inputs


def _divided(
    source: PackedSource, fold: int, folds: int, size: int, pad: bool
) -> Iterator[list[int]]:
    """The sequences of one fold in batches, longest first: what fits, fits from the first on."""

    def length(row: int) -> int:
        return source.bounds[row + 1] - source.bounds[row]

    def alone(row: int) -> bool:
        return source.bounds[row] in source.image_inputs

    ragged = pad and source.packing == "none"
    budget = size * source.seq_len
    rows: list[int] = []
    for row in sorted(range(fold, source.sequences, folds), key=length, reverse=True):
        if rows:
            longest = length(rows[0])
            unlike = not ragged and length(row) != longest
            unlike = unlike or alone(row) or alone(rows[0])
            if unlike or (len(rows) + 1) * longest > budget:
                yield rows
                rows = []
        rows.append(row)
    if rows:
        yield rows


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """[rows, longest], zeros behind shorter ones."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
