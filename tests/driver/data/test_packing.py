"""Packing keeps exactly the tokens of the documents and separators, the same for the same seed."""

import hashlib
import itertools
import json
import random
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig

from reap_driver.data.encode import Document, Encoder
from reap_driver.data.packing import PackedSource, Packing, pack
from reap_driver.data.records import BadRecords, Record
from reap_driver.data.source import DataSource
from reap_kernels.errors import DataError
from tests.driver.data.conftest import EOS


class Tokenizing(Encoder):
    """Returns the ids of records as if it had tokenized them from texts."""

    def encode(self, records: Sequence[Record], bad: BadRecords | None = None):
        for document in super().encode(records, bad):
            yield replace(document, given=False)


@pytest.fixture
def encoder(folder: Path, config: PretrainedConfig) -> Encoder:
    return Tokenizing(folder, config)


def write(path: Path, documents: list[list[int]]) -> Path:
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in documents))
    return path


def packed(
    path: Path,
    encoder: Encoder,
    seq_len: int,
    samples: int | None = None,
    tokens: int | None = None,
    packing: Packing = "concat",
) -> PackedSource:
    source = DataSource(path, "g", samples, tokens)
    return pack(source, encoder, seq_len=seq_len, packing=packing)


def sequences(source: PackedSource) -> list[list[int]]:
    """The tokens of every sequence."""
    pairs = itertools.pairwise(source.bounds)
    return [source.ids[begin:end].tolist() for begin, end in pairs]


@pytest.mark.parametrize("packing", ["concat", "isolated"])
def test_documents_follow_each_other_with_the_separator_between(
    tmp_path: Path, encoder: Encoder, packing: Packing
) -> None:
    path = write(tmp_path / "a.jsonl", [[5, 6, 7], [8, EOS], [9], [], [10, 11]])
    source = packed(path, encoder, 4, packing=packing)
    assert source.ids.tolist() == [5, 6, 7, EOS, 8, EOS, 9, EOS, 10, 11]  # one EOS, never two
    assert source.starts.tolist() == [0, 4, 6, 8]
    assert sequences(source) == [[5, 6, 7, EOS], [8, EOS, 9, EOS], [10, 11]]
    assert (source.records, source.sequences, source.full_sequences) == (5, 3, 3)


def test_positions_begin_anew_with_every_document_and_sequence(
    tmp_path: Path, encoder: Encoder
) -> None:
    path = write(tmp_path / "a.jsonl", [[5] * 6, [6], [7] * 5])
    source = packed(path, encoder, 5, packing="isolated")
    positions = [source.positions(*pair).tolist() for pair in itertools.pairwise(source.bounds)]
    assert positions == [[0, 1, 2, 3, 4], [0, 1, 0, 1, 0], [0, 1, 2, 3]]


def test_no_token_is_lost_whatever_the_sizes(tmp_path: Path, encoder: Encoder) -> None:
    draw = random.Random(0)
    for trial in range(12):
        documents = [
            [draw.randrange(3, 259) for _ in range(draw.choice([0, 1, 3, 40, 200]))]
            for _ in range(draw.randint(1, 600))
        ] + [[5]]
        seq_len = draw.choice([1, 7, 64, 10_000])
        source = packed(write(tmp_path / f"{trial}.jsonl", documents), encoder, seq_len)
        filled = [ids for ids in documents if ids]
        expected = [token for ids in filled for token in [*ids, EOS]][:-1]
        assert source.ids.tolist() == expected
        assert [token for ids in sequences(source) for token in ids] == expected
        assert all(len(ids) == seq_len for ids in sequences(source)[:-1])
        assert 0 < len(sequences(source)[-1]) <= seq_len


def test_a_sequence_for_every_document(tmp_path: Path, encoder: Encoder) -> None:
    """No separators; longer documents are truncated, with a note."""
    path = write(tmp_path / "a.jsonl", [[5, 6, 7, 8], [9, EOS], [], [10, 11, 12]])
    source = packed(path, encoder, 3, packing="none")
    assert sequences(source) == [[5, 6, 7], [9, EOS], [10, 11, 12]]
    assert (source.records, source.truncated, source.separator) == (4, 1, None)
    assert source.notes() == [f"{path}: 1 of 4 records were cut to 3 tokens"]


@pytest.mark.parametrize("packing", ["concat", "isolated", "none"])
@pytest.mark.parametrize("budget", [1, 3, 4, 5, 9, 10])
def test_a_budget_of_tokens_is_kept_exactly(
    tmp_path: Path, encoder: Encoder, budget: int, packing: Packing
) -> None:
    path = write(tmp_path / "a.jsonl", [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15]])
    whole = packed(path, encoder, 4, tokens=1000, packing=packing)  # in the order of the draw
    source = packed(path, encoder, 4, tokens=budget, packing=packing)
    kept = min(budget, whole.tokens)  # `none` cuts a document: 9 tokens
    assert source.ids.tolist() == whole.ids[:kept].tolist()
    assert source.starts.tolist() == [at for at in whole.starts.tolist() if at < kept]
    asked = f"{path} has {whole.tokens} tokens, {budget} were requested"
    assert (asked in source.notes()) == (budget > whole.tokens)
    assert source.provenance()["asked"] == {"tokens": budget}


def test_a_budget_reads_no_further(tmp_path: Path, encoder: Encoder) -> None:
    """Records after the budget are not counted."""
    path = write(tmp_path / "a.jsonl", [[5, 6, 7]] * 20)
    assert packed(path, encoder, 4, tokens=9).records == 3


class Answering(Tokenizing):
    """Tokens from 100 on count; all tokens of a document that begins with 3 do."""

    def encode(self, records: Sequence[Record], bad: BadRecords | None = None):
        for document in super().encode(records, bad):
            if document.ids[:1] == [3]:
                yield document
            else:
                yield Document(document.ids, bytes(i >= 100 for i in document.ids))


@pytest.mark.parametrize("packing", ["concat", "none"])
def test_answers_keep_their_marks(
    tmp_path: Path, folder: Path, config: PretrainedConfig, packing: Packing
) -> None:
    """Counted flags stay with their tokens after truncation; a separator counts if its
    whole document does.
    """
    encoder = Answering(folder, config)
    documents = [[3, 4, 5], [3], [], [6, 100, 101, 7], [8, 102], [3, 9], [103, 10]]
    path = write(tmp_path / "a.jsonl", documents)
    source = packed(path, encoder, 3 if packing == "none" else 5, packing=packing)
    want = {
        "concat": "3,4,5,S,3,S,6_,100,101,7_,S_,8_,102,S_,3,9,S,103,10_",
        "none": "3,4,5,3,6_,100,101,8_,102,3,9,103,10_",
    }[packing]
    tokens = want.replace("S", str(EOS)).split(",")
    assert source.ids.tolist() == [int(token.rstrip("_")) for token in tokens]
    assert source.counted is not None
    assert source.counted.tolist() == ["_" not in token for token in tokens]
    assert source.counted_tokens == sum("_" not in token for token in tokens)
    whole = packed(path, encoder, 3, tokens=1000, packing=packing)
    for budget in range(1, whole.tokens):
        cut = packed(path, encoder, 3, tokens=budget, packing=packing)
        assert whole.counted is not None
        assert cut.counted_tokens == int(whole.counted[:budget].sum())
        if cut.counted is not None:  # else no marked document has come yet
            assert torch.equal(cut.counted, whole.counted[:budget])


def test_data_without_answers(tmp_path: Path, folder: Path, config: PretrainedConfig) -> None:
    path = write(tmp_path / "a.jsonl", [[6, 7], [8]])
    with pytest.raises(
        DataError, match=r"a.jsonl: none of its 4 tokens is part of an answer; give"
    ):
        packed(path, Answering(folder, config), 8)


def test_records_are_encoded_in_chunks_as_one(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(20)))
    whole, steps = packed(path, encoder, 16), []
    monkeypatch.setattr("reap_driver.data.packing._CHUNK", 3)
    chunked = pack(DataSource(path, "g"), encoder, seq_len=16, progress=steps.append)
    assert torch.equal(whole.ids, chunked.ids)
    assert len(steps) == 7
    monkeypatch.setattr("reap_driver.data.packing._CHUNK_SIZE", 10)
    small = pack(DataSource(path, "g"), encoder, seq_len=16, progress=steps.append)
    assert torch.equal(whole.ids, small.ids)
    assert len(steps) == 7 + 10
    del steps[7:]
    assert sum(steps) == len(whole.ids)


def test_provenance_records_what_the_model_saw(tmp_path: Path, encoder: Encoder) -> None:
    path = write(tmp_path / "a.jsonl", [[5, 6], [7]])
    assert packed(path, encoder, 8).provenance() == {
        "group": "g",
        "source": str(path),
        "records": 2,
        "tokens": 4,
        "counted_tokens": 4,
        "sequences": 1,
        "digest": "sha256:" + hashlib.sha256(struct.pack("<4i", 5, 6, EOS, 7)).hexdigest(),
        "packing": "concat",
        "seq_len": 8,
        "seed": 0,
        "separator": EOS,
        "asked": {},
        "truncated": 0,
        "unused": [],
    }


def test_the_digest_knows_boundaries_and_answers(
    tmp_path: Path, encoder: Encoder, folder: Path, config: PretrainedConfig
) -> None:
    """The digest differs if attention or the counted tokens differ, even if the tokens are
    equal.
    """
    path = write(tmp_path / "a.jsonl", [[5, 6, 101, EOS], [7]])
    other = write(tmp_path / "b.jsonl", [[5, 6, 101], [7]])
    sources = [
        packed(path, encoder, 8),
        packed(path, encoder, 8, packing="isolated"),
        packed(path, Answering(folder, config), 8),
        packed(other, Answering(folder, config), 8),
    ]
    assert len({tuple(source.ids.tolist()) for source in sources}) == 1
    assert len({source.provenance()["digest"] for source in sources}) == 3


def test_equal_seeds_give_equal_tokens(tmp_path: Path, encoder: Encoder) -> None:
    path = write(tmp_path / "a.jsonl", [[i] * (i % 5 + 1) for i in range(3, 103)])
    digests = [
        pack(DataSource(path, "g", 20), encoder, seq_len=8, seed=seed).provenance()["digest"]
        for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_fewer_records_than_asked_is_said(tmp_path: Path, encoder: Encoder) -> None:
    path = write(tmp_path / "a.jsonl", [[5], [6]])
    assert packed(path, encoder, 8, 5).notes() == [f"{path} has 2 records, 5 were requested"]
    assert packed(path, encoder, 8, 2).notes() == packed(path, encoder, 8).notes() == []


def test_without_end_of_sequence_documents_touch_and_it_is_said(
    tmp_path: Path, config: PretrainedConfig
) -> None:
    config.eos_token_id = None
    source = packed(write(tmp_path / "a.jsonl", [[5], [6]]), Tokenizing(tmp_path, config), 8)
    assert source.ids.tolist() == [5, 6]
    [note] = source.notes()
    assert "no end-of-sequence token" in note


def test_records_without_tokens(tmp_path: Path, encoder: Encoder) -> None:
    path = write(tmp_path / "a.jsonl", [[], []])
    with pytest.raises(DataError, match=r"a.jsonl: its 2 records hold no token; give some text"):
        packed(path, encoder, 8)


@pytest.mark.parametrize("packing", ["concat", "isolated", "none"])
def test_sequences_packed_elsewhere_stay_as_they_are(
    tmp_path: Path, folder: Path, config: PretrainedConfig, packing: Packing
) -> None:
    documents = [[(i + j) % 250 + 3 for j in range(512)] for i in range(16)]
    path = write(tmp_path / "a.jsonl", documents)
    source = packed(path, Encoder(folder, config), 512, packing=packing)
    assert sequences(source) == documents
    assert (source.tokens, source.separator) == (8192, None)
    assert source.notes() == []
    if packing != "none":  # of the length that would keep them, the user hears
        [note] = packed(path, Encoder(folder, config), 300, packing=packing).notes()
        assert note.endswith(
            "all of 512 token ids; sequences of as many (`seq_len=512`) keep them as they are"
        )


@pytest.mark.parametrize("packing", ["concat", "isolated"])
def test_ids_of_other_lengths_follow_each_other_around_whole_sequences(
    tmp_path: Path, folder: Path, config: PretrainedConfig, packing: Packing
) -> None:
    """No separator between given token ids; one after a text if another document follows."""
    path = tmp_path / "a.jsonl"
    records: list[dict[str, object]] = [
        {"input_ids": [n] * length}
        for n, length in ((5, 2), (6, 4), (7, 3), (8, 6), (9, 4), (10, 1))
    ]
    records[3:3] = [{"text": "a"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    encoder = Encoder(folder, config)
    [text] = encoder.encode([Record("a:1", {"text": "a"})])
    source = packed(path, encoder, 4, packing=packing)
    stream = [7, 7, 7, *text.ids, EOS, *[8] * 6]
    parts = [stream[n : n + 4] for n in range(0, len(stream), 4)]
    assert sequences(source) == [[5, 5], [6] * 4, *parts, [9] * 4, [10]]
    assert source.separator == EOS
    cut = packed(path, encoder, 4, tokens=5, packing=packing)
    assert cut.tokens == 5


def test_the_digest_knows_sequences_of_their_own(
    tmp_path: Path, folder: Path, config: PretrainedConfig
) -> None:
    """The same tokens in the same order, but in other sequences."""
    given = Encoder(folder, config)
    split, whole = ([[5], [6, 7], [8]], [[5, 6], [7, 8]])
    found = [packed(write(tmp_path / "a.jsonl", ids), given, 2) for ids in (split, whole)]
    assert [sequences(source) for source in found] == [[[5], [6, 7], [8]], whole]
    assert len({source.provenance()["digest"] for source in found}) == 2


def test_what_nothing_is_made_of_is_named_once(
    tmp_path: Path, folder: Path, config: PretrainedConfig
) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "a", "id": n, "b": n} | ({"a": "x"} if n else {"c": []}) for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = packed(path, Encoder(folder, config), 8)
    assert source.notes() == [f"{path}: fields not used: a, b"]
    assert source.provenance()["unused"] == ["a", "b"]
