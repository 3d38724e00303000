"""Packing loses no token, invents none, and gives the same for the same seed."""

import hashlib
import json
import random
import struct
from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig

from reap_driver.calibration import DataSource, Encoder, PackedSource, pack
from reap_kernels.errors import DataError
from tests.driver.calibration.conftest import EOS


def write(path: Path, documents: list[list[int]]) -> Path:
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in documents))
    return path


def packed(path: Path, encoder: Encoder, seq_len: int, samples: int | None = None) -> PackedSource:
    return pack(DataSource(path, "g", samples), encoder, seq_len=seq_len)


def test_documents_follow_each_other_with_the_separator_between(
    tmp_path: Path, encoder: Encoder
) -> None:
    path = write(tmp_path / "a.jsonl", [[5, 6, 7], [8, EOS], [9], [], [10, 11]])
    source = packed(path, encoder, 4)
    assert source.ids.tolist() == [5, 6, 7, EOS, 8, EOS, 9, EOS, 10, 11]  # one EOS, never two
    assert [batch.tolist() for batch in source.batches()] == [
        [[5, 6, 7, EOS]],
        [[8, EOS, 9, EOS]],
        [[10, 11]],
    ]
    assert source.records == 5


def test_no_token_is_lost_whatever_the_sizes(tmp_path: Path, encoder: Encoder) -> None:
    draw = random.Random(0)
    for trial in range(12):
        documents = [
            [draw.randrange(3, 259) for _ in range(draw.choice([0, 1, 3, 40, 200]))]
            for _ in range(draw.randint(1, 600))
        ] + [[5]]
        seq_len, size = draw.choice([1, 7, 64, 10_000]), draw.choice([1, 3, 8])
        source = packed(write(tmp_path / f"{trial}.jsonl", documents), encoder, seq_len)
        filled = [ids for ids in documents if ids]
        expected = [token for ids in filled for token in [*ids, EOS]][:-1]
        batches = list(source.batches(size))
        assert [t for batch in batches for t in batch.flatten().tolist()] == expected
        assert all(batch.dtype == torch.int64 for batch in batches)
        assert all(batch.shape == (size, seq_len) for batch in batches[:-2])
        assert all(0 < len(batch) <= size and batch.shape[1] <= seq_len for batch in batches)
        assert all(batch.numel() for batch in batches)


def test_records_are_encoded_in_chunks_as_one(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(20)))
    whole, steps = packed(path, encoder, 16), []
    monkeypatch.setattr("reap_driver.calibration.packing._CHUNK", 3)
    chunked = pack(DataSource(path, "g"), encoder, seq_len=16, progress=steps.append)
    assert torch.equal(whole.ids, chunked.ids)
    assert len(steps) == 7
    assert sum(steps) == len(whole.ids)


def test_provenance_records_what_the_model_saw(tmp_path: Path, encoder: Encoder) -> None:
    path = write(tmp_path / "a.jsonl", [[5, 6], [7]])
    assert packed(path, encoder, 8).provenance() == {
        "group": "g",
        "source": str(path),
        "records": 2,
        "tokens": 4,
        "digest": "sha256:" + hashlib.sha256(struct.pack("<4i", 5, 6, EOS, 7)).hexdigest(),
        "seq_len": 8,
        "seed": 0,
        "separator": EOS,
    }


def test_equal_seeds_give_equal_tokens(tmp_path: Path, encoder: Encoder) -> None:
    path = write(tmp_path / "a.jsonl", [[i] * (i % 5 + 1) for i in range(3, 103)])
    digests = [
        pack(DataSource(path, "g", 20), encoder, seq_len=8, seed=seed).provenance()["digest"]
        for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_fewer_records_than_asked_is_said(tmp_path: Path, encoder: Encoder) -> None:
    path = write(tmp_path / "a.jsonl", [[5], [6]])
    assert packed(path, encoder, 8, 5).notes() == [f"{path} has 2 records, 5 were asked for"]
    assert packed(path, encoder, 8, 2).notes() == packed(path, encoder, 8).notes() == []


def test_without_end_of_sequence_documents_touch_and_it_is_said(
    tmp_path: Path, config: PretrainedConfig
) -> None:
    config.eos_token_id = None
    source = packed(write(tmp_path / "a.jsonl", [[5], [6]]), Encoder(tmp_path, config), 8)
    assert source.ids.tolist() == [5, 6]
    [note] = source.notes()
    assert "no end-of-sequence token" in note


def test_records_without_tokens(tmp_path: Path, encoder: Encoder) -> None:
    path = write(tmp_path / "a.jsonl", [[], []])
    with pytest.raises(DataError, match=r"a.jsonl: its 2 records hold no token; give some text"):
        packed(path, encoder, 8)
