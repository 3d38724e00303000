"""Batches of sequences. All sequences of a batch are from one source and one fold.

Sequence i of a source is in fold i mod F, so every fold is a random sample of the source. A batch
takes sequences of one fold, longest first, up to a maximum number of tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reap_driver.data.packing import PackedSource


@dataclass(frozen=True)
class _Batch:
    """One batch: the indices of its sequences in their source."""

    source: PackedSource
    fold: int
    rows: Sequence[int]


class PackedBatches:
    """The batches of packed sources, one source after the other.

    Args:
        sources: the packed sources.
        sizes: for each source, the maximum number of sequences of `seq_len` tokens per batch. Of
            shorter sequences a batch takes more, up to the same number of tokens with padding.
        folds: number of folds of each source.
        pad: whether sequences of different lengths may share a batch if packing is `none`; they are
            padded on the right, with an attention mask. With other packings they never do.
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
        """The group of the batch's source."""
        return self._batches[number].source.source.group

    def fold(self, number: int) -> int:
        """The fold of the batch, counted from 0."""
        return self._batches[number].fold

    def tokens(self, number: int) -> int:
        """Tokens of the batch's sequences, without padding."""
        bounds, rows = self._batches[number].source.bounds, self._batches[number].rows
        return sum(bounds[row + 1] - bounds[row] for row in rows)

    def inputs(self, number: int) -> dict[str, Tensor]:
        """The tensors of a batch, each [batch, seq].

        Returns:
            `input_ids` int64 and, if needed, `attention_mask` int64, 0 on padding; `position_ids`
            int64, 0 where an isolated document begins; `token_mask` bool, True for tokens whose
            experts are counted. For a sequence with images, which is the only one of its batch, the
            outputs of the model's processor.
        """
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
    """The sequences of one fold in batches, longest first, so that the first batch shows
    whether memory suffices.
    """

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
    """[rows, longest], shorter rows padded with zeros on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
