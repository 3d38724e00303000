"""Batches contain every token exactly once, in one fold, with masks and positions."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reap_driver.data.batches import PackedBatches
from reap_driver.data.packing import PackedSource, Packing
from reap_driver.data.source import DataSource


def source(
    lengths: list[int],
    packing: Packing = "concat",
    seq_len: int = 8,
    group: str = "g",
    marked: bool = False,
) -> PackedSource:
    """Documents of these lengths; the token ids are 1, 2, 3, ..."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.arange(1, int(starts[-1]) + 1, dtype=torch.int32)
    counted = ids % 3 == 0 if marked else None
    return PackedSource(
        DataSource(Path(group), group), ids, starts[:-1], counted, 1, seq_len, 0, None, packing
    )


def tokens(inputs: dict[str, Tensor]) -> list[int]:
    """The ids that are not padding."""
    ids = inputs["input_ids"]
    return ids[inputs.get("attention_mask", torch.ones_like(ids)).bool()].tolist()


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("packing", ["concat", "isolated", "none"])
@pytest.mark.parametrize("folds", [1, 3, 8])
def test_every_token_is_in_one_batch_and_no_batch_too_large(
    folds: int, packing: Packing, pad: bool
) -> None:
    draw = random.Random(folds)
    for size in (1, 2, 5):
        lengths = [draw.randint(1, 8) for _ in range(draw.choice([1, 4, 70]))]
        made = source(lengths, packing)
        batches = PackedBatches([made], [size], folds=folds, pad=pad)
        seen = []
        for number in range(len(batches)):
            inputs = batches.inputs(number)
            assert inputs["input_ids"].dtype == torch.int64
            assert inputs["input_ids"].numel() <= size * made.seq_len
            assert ("attention_mask" in inputs) <= (pad and packing == "none")
            seen += tokens(inputs)
        assert sorted(seen) == made.ids.tolist()


@pytest.mark.parametrize("packing", ["concat", "none"])
def test_sequence_i_is_in_fold_i_modulo_their_number(packing: Packing) -> None:
    made = source([8] * 10, packing)
    batches = PackedBatches([made], [2], folds=4)
    dealt: dict[int, list[int]] = {}
    for number in range(len(batches)):
        first = (batches.inputs(number)["input_ids"][:, 0] - 1) // 8  # which sequence
        dealt.setdefault(batches.fold(number), []).extend(first.tolist())
    assert dealt == {0: [0, 4, 8], 1: [1, 5, 9], 2: [2, 6], 3: [3, 7]}


def test_full_sequences_share_batches_and_the_rest_is_alone() -> None:
    batches = PackedBatches([source([20]), source([7], group="h")], [2, 5])
    shapes = [tuple(batches.inputs(n)["input_ids"].shape) for n in range(len(batches))]
    assert shapes == [(2, 8), (1, 4), (1, 7)]
    assert [batches.group(n) for n in range(len(batches))] == ["g", "g", "h"]
    assert batches.groups == ["g", "h"]


def test_short_documents_fill_the_tokens_of_long_ones() -> None:
    """16 tokens per batch: sequences of 8; of 7 and 5; of 4, 3, 2 and 1; longest first."""
    batches = PackedBatches([source([3, 8, 1, 5, 7, 2, 4, 8], "none")], [2])
    lengths = [
        inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum(1).tolist()
        for inputs in map(batches.inputs, range(len(batches)))
    ]
    assert lengths == [[8, 8], [7, 5], [4, 3, 2, 1]]


def test_padding_is_masked_on_the_right() -> None:
    [inputs] = map(PackedBatches([source([3, 1], "none", marked=True)], [2]).inputs, [0])
    assert inputs["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert inputs["token_mask"].tolist() == [[False, False, True], [False, False, False]]


def test_isolated_documents_have_positions_of_their_own() -> None:
    batches = PackedBatches([source([3, 9, 1, 6], "isolated")], [4])
    inputs = [batches.inputs(n) for n in range(len(batches))]
    assert [batch.keys() for batch in inputs] == [{"input_ids", "position_ids"}] * 2
    assert inputs[0]["position_ids"].tolist() == [
        [0, 1, 2, 0, 1, 2, 3, 4],
        [0, 1, 2, 3, 0, 0, 1, 2],
    ]
    assert inputs[1]["position_ids"].tolist() == [[0, 1, 2]]


def test_marks_go_with_their_tokens() -> None:
    batches = PackedBatches([source([70], marked=True)], [2], folds=3)
    for number in range(len(batches)):
        inputs = batches.inputs(number)
        assert torch.equal(inputs["token_mask"], inputs["input_ids"] % 3 == 0)


def test_whole_sequences_among_others_share_batches() -> None:
    """Documents of 8 given token ids are sequences; those made of the tokens between are
    shorter.
    """
    made = replace(source([3, 8, 2, 9, 8, 8, 1]), given=torch.ones(7, dtype=torch.bool))
    assert made.bounds == [0, 3, 11, 19, 22, 30, 38, 39]
    batches = PackedBatches([made], [2])
    inputs = [batches.inputs(n)["input_ids"] for n in range(len(batches))]
    assert [tuple(ids.shape) for ids in inputs] == [(2, 8), (2, 8), (2, 3), (1, 1)]
    assert sorted(int(token) for ids in inputs for token in ids.flatten()) == made.ids.tolist()
