"""Cached tokens equal those that tokenizing gives; invalid entries are replaced."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig

from reap_driver.data import token_cache as caches
from reap_driver.data.encode import Encoder
from reap_driver.data.packing import PackedSource
from reap_driver.data.source import DataSource, HubDataset
from reap_driver.data.token_cache import Cache
from reap_kernels.errors import DataError
from tests.driver.data.conftest import TEMPLATE


@dataclass
class Kept:
    """A cache, with the number of times that it had to tokenize."""

    cache: Cache
    folder: Path
    encoder: Encoder
    data: Path
    made: list[PackedSource]
    notes: list[str]
    seen: list[int]

    def pack(self, source: DataSource | None = None, **more: Any) -> PackedSource:
        options = {"seq_len": 8, "seed": 0, "packing": "concat", "skip_bad": False, **more}
        source = DataSource(self.data, "g") if source is None else source
        return self.cache.pack(source, self.encoder, progress=self.seen.append, **options)

    @property
    def entries(self) -> list[Path]:
        return sorted(self.folder.glob("tokens/*.safetensors"))


@pytest.fixture
def kept(
    tmp_path: Path, folder: Path, config: PretrainedConfig, monkeypatch: pytest.MonkeyPatch
) -> Kept:
    """A cache that stores every result, and records of several formats."""
    monkeypatch.setenv("REAP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(caches, "_WORTH", 0.0)
    made: list[PackedSource] = []
    pack = caches.pack

    def counting(*args: Any, **kwargs: Any) -> PackedSource:
        made.append(pack(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(caches, "pack", counting)
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(20)))
    notes: list[str] = []
    cache = Cache(folder, {"answers_only": False}, notes.append)
    encoder = Encoder(folder, config)
    return Kept(cache, tmp_path / "cache", encoder, data, made, notes, [])


def assert_equal(mine: PackedSource, theirs: PackedSource) -> None:
    for name in ("ids", "starts", "counted"):
        left, right = getattr(mine, name), getattr(theirs, name)
        assert (left is None and right is None) or torch.equal(left, right), name
    assert mine.provenance() == theirs.provenance()
    assert mine.notes() == theirs.notes()


@pytest.mark.parametrize("packing", ["concat", "isolated", "none"])
def test_the_second_time_nothing_is_tokenized(kept: Kept, packing: str) -> None:
    first, again = (kept.pack(packing=packing) for _ in range(2))
    assert len(kept.made) == len(kept.entries) == 1
    assert_equal(again, first)
    assert again.packing == packing
    assert sum(kept.seen) == 2 * first.tokens


def test_bad_records_and_answers_are_kept(
    kept: Kept, folder: Path, config: PretrainedConfig
) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    encoder = Encoder(folder, config, answers_only=True)
    kept = replace(kept, encoder=encoder)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    kept.data.write_text(json.dumps({"messages": turns}) + "\n{\n" + '{"messages": 3}\n')
    first, again = (kept.pack(skip_bad=True) for _ in range(2))
    assert len(kept.made) == 1
    assert first.skipped is not None
    assert first.skipped.count == 2
    assert 0 < first.counted_tokens < first.tokens
    assert_equal(again, first)


def test_a_group_and_the_length_of_sequences_do_not_matter(kept: Kept) -> None:
    kept.pack()
    other = kept.pack(DataSource(kept.data, "another"), seq_len=5)
    assert len(kept.made) == 1
    assert (other.source.group, other.seq_len, other.provenance()["seq_len"]) == ("another", 5, 5)


def _content(kept: Kept) -> PackedSource:
    text = kept.data.read_text()
    kept.data.write_text(text.replace("text 7", "text 8"))  # the same size
    return kept.pack()


def _tokenizer(kept: Kept) -> PackedSource:
    path = kept.cache.model / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")
    return kept.pack()


CHANGES: dict[str, Callable[[Kept], PackedSource]] = {
    "content": _content,
    "tokenizer": _tokenizer,
    "options": lambda kept: replace(kept, cache=replace(kept.cache, options={})).pack(),
    "samples": lambda kept: kept.pack(DataSource(kept.data, "g", 5)),
    "tokens": lambda kept: kept.pack(DataSource(kept.data, "g", None, 50)),
    "tools": lambda kept: kept.pack(DataSource(kept.data, "g", tools="[]")),
    "seed": lambda kept: kept.pack(seed=1),
    "length of documents": lambda kept: kept.pack(packing="none"),
    "skip bad": lambda kept: kept.pack(skip_bad=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_tokens_depend_on_is_looked_at(kept: Kept, change: str) -> None:
    kept.pack()
    CHANGES[change](kept)
    assert len(kept.made) == len(kept.entries) == 2


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _no_facts(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path)


@pytest.mark.parametrize("spoil", [_cut, _flip, _no_facts])
def test_a_damaged_entry_is_made_again(kept: Kept, spoil: Callable[[Path], None]) -> None:
    first = kept.pack()
    spoil(kept.entries[0])
    assert_equal(kept.pack(), first)
    assert len(kept.made) == 2
    [note] = kept.notes
    assert f"{kept.entries[0]}: damaged (" in note
    assert note.endswith("so the data is tokenized again")
    assert_equal(kept.pack(), first)
    assert len(kept.made) == 2


def test_one_bit_anywhere_is_noticed(kept: Kept) -> None:
    """Damage in the header, the facts and the tokens never gives an error or other tokens."""
    first = kept.pack()
    [entry] = kept.entries
    whole = entry.read_bytes()
    for bit in range(3, 8 * len(whole), 8 * len(whole) // 80):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        entry.write_bytes(content)
        made = len(kept.made)
        assert_equal(kept.pack(), first)
        assert len(kept.made) == made + 1
        assert "damaged (" in kept.notes[-1]


def _planted(kept: Kept, entry: Path) -> None:
    """Another user's tokens, signed with that user's key, under the name that is looked up."""
    other = kept.folder.parent / "other"
    other.mkdir()
    path = other / entry.name
    source = kept.made[-1]
    kept.cache._save(path, replace(source, ids=source.ids.flip(0)))
    shutil.copy(path, entry)


def _renamed(kept: Kept, entry: Path) -> None:
    """An entry that this user wrote for other data."""
    kept.pack(seed=1)
    [other] = set(kept.entries) - {entry}
    os.replace(other, entry)


def _without_key(kept: Kept, entry: Path) -> None:
    (entry.parent / "key").unlink()


def _known_key(kept: Kept, entry: Path) -> None:
    """A key that other users can read is not used."""
    (entry.parent / "key").chmod(0o644)


def _linked_key(kept: Kept, entry: Path) -> None:
    key = entry.parent / "key"
    os.replace(key, kept.folder / "elsewhere")
    key.symlink_to(kept.folder / "elsewhere")


def _pipe_as_key(kept: Kept, entry: Path) -> None:
    (entry.parent / "key").unlink()
    os.mkfifo(entry.parent / "key", 0o600)


def _short_key(kept: Kept, entry: Path) -> None:
    (entry.parent / "key").write_bytes(b"short")


@pytest.mark.parametrize(
    "change",
    [_planted, _renamed, _without_key, _known_key, _linked_key, _pipe_as_key, _short_key],
)
def test_what_this_user_has_not_made_is_not_read(
    kept: Kept, change: Callable[[Kept, Path], None]
) -> None:
    first = kept.pack()
    change(kept, kept.entries[0])
    made = len(kept.made)
    assert_equal(kept.pack(), first)
    assert len(kept.made) == made + 1
    assert "so the data is tokenized again" in " ".join(kept.notes)


def test_another_users_key_is_not_taken(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    first = kept.pack()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert_equal(kept.pack(), first)
    assert len(kept.made) == 2
    assert "key is not private to this user" in kept.notes[0]
    assert "the tokens cannot be cached" in kept.notes[1]


def test_the_key_is_private(kept: Kept) -> None:
    kept.pack()
    assert (kept.folder / "tokens" / "key").stat().st_mode & 0o777 == 0o600


def test_what_cannot_be_kept_is_said(kept: Kept) -> None:
    kept.folder.write_text("in the way")
    kept.pack()
    [note] = kept.notes
    assert "the tokens cannot be cached (Not a directory); set REAP_CACHE_DIR" in note


def test_little_work_is_not_kept(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "_WORTH", 60.0)
    kept.pack()
    assert kept.entries == []


def test_the_entry_longest_unused_goes_first(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [DataSource(kept.data, "g", samples) for samples in (10, 11, 12)]
    first, second = (kept.pack(source) for source in sources[:2])
    for entry in kept.entries:
        os.utime(entry, (0, 0))
    assert_equal(kept.pack(sources[0]), first)  # used again
    size = max(entry.stat().st_size for entry in kept.entries)
    monkeypatch.setattr(caches, "_LIMIT", int(2.5 * size))
    kept.pack(sources[2])
    assert len(kept.entries) == 2
    kept.pack(sources[0])
    assert len(kept.made) == 3
    assert_equal(kept.pack(sources[1]), second)
    assert len(kept.made) == 4


def test_folders_are_known_by_their_files(kept: Kept) -> None:
    folder = kept.data.parent / "many"
    folder.mkdir()
    (folder / "b.txt").write_text("one")
    source = DataSource(folder, "g")
    kept.pack(source)
    (folder / ".hidden.txt").write_text("nobody reads it")
    kept.pack(source)
    assert len(kept.made) == 1
    (folder / "c.txt").write_text("two")
    assert kept.pack(source).records == 2


def test_a_branch_on_the_hub_may_move(kept: Kept) -> None:
    """Only a commit identifies the content of a data set."""
    digest = caches._data_digest
    assert digest(DataSource(HubDataset("a/b"), "g")) is None
    assert digest(DataSource(HubDataset("a/b", revision="main"), "g")) is None
    pinned = [HubDataset("a/b", s, revision=40 * c) for s in (None, "x") for c in "ab"]
    assert len({digest(DataSource(location, "g")) for location in pinned}) == 4


def test_data_that_cannot_be_read(kept: Kept) -> None:
    with pytest.raises(DataError, match=r"data .*nowhere.jsonl cannot be read: No such file"):
        kept.pack(DataSource(kept.data.with_name("nowhere.jsonl"), "g"))
