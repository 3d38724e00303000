"""Compressed files give the records of the plain ones; errors name damaged files."""

import bz2
import gzip
import json
import lzma
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from reap_driver.data import compressed_files as compressed
from reap_driver.data.records import BadRecords, Record
from reap_driver.data.sampling import read_records
from reap_driver.data.source import DataSource
from reap_kernels.errors import DataError

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}
LINES = "".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(1000)).encode()


def read(path: Path, samples: int | None = None) -> list[Record]:
    return list(read_records(DataSource(path, "g", samples), 0))


@pytest.mark.parametrize("ending", PACK)
def test_lines_and_texts(tmp_path: Path, ending: str) -> None:
    lines, text = tmp_path / f"a.jsonl{ending}", tmp_path / f"b.txt{ending}"
    plain = tmp_path / "a.jsonl"
    plain.write_bytes(LINES)
    lines.write_bytes(PACK[ending](LINES))
    text.write_bytes(PACK[ending]("déjà\nvu".encode()))
    assert [r.fields for r in read(lines)] == [r.fields for r in read(plain)]
    assert [r.fields for r in read(lines, 9)] == [r.fields for r in read(plain, 9)]
    assert read(lines)[999].place == f"{lines}:1000"
    assert read(text) == [Record(str(text), {"text": "déjà\nvu"})]
    plain.unlink()
    assert len(read(tmp_path)) == 1001  # a folder has them too


@pytest.mark.parametrize("ending", PACK)
def test_damage_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    whole = PACK[ending](LINES)
    for damaged in (b"no archive at all", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a.jsonl{ending} cannot be decompressed \(.*; make"):
            read(path)


def test_zstandard_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(PACK[".zst"](LINES))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r".zst needs pyarrow.*pip install reap-kernels\[data\]"):
        read(path)


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.gz", "a.md.gz"])
def test_other_files_stay_unknown(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(LINES))
    with pytest.raises(DataError, match=rf"{name}: ending '.gz' is not known; give one of .jsonl"):
        read(path)


PLAIN: dict[str, Callable[[bytes], bytes]] = {"": bytes, **PACK}


@pytest.mark.parametrize("ending", PLAIN)
def test_records_above_a_size_are_refused(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad records with file and line; the records after them are read. The same for text files."""
    monkeypatch.setattr(compressed, "LARGEST", 1000)
    monkeypatch.setattr("reap_driver.data.local_files.LARGEST", 1000)
    path = tmp_path / f"a.jsonl{ending}"
    large = [b'{"text": "%s"}\n' % (b"x" * n) for n in (987, 988, 50_000)]
    content = b'{"text": "1"}\n' + b"".join(large) + b'{"text": "2"}\n' + b"y" * 70_000
    path.write_bytes(PLAIN[ending](content))
    with pytest.raises(DataError, match=rf"a.jsonl{ending}:3: is larger than 1000 bytes; divide"):
        read(path)
    for samples in (None, 6):
        bad = BadRecords()
        found = list(read_records(DataSource(path, "g", samples), 0, bad))
        assert [len(record.fields["text"]) for record in found] == [1, 987, 1]
        assert bad.count == 3
    text = tmp_path / f"b.txt{ending}"
    text.write_bytes(PLAIN[ending](b"x" * 1001))
    with pytest.raises(DataError, match=rf"b.txt{ending}: is larger than 1000 bytes, which are on"):
        read(text)


@pytest.mark.parametrize("ending", PLAIN)
@pytest.mark.parametrize("blank", [b"\n", b" \r\n"])
def test_empty_lines_without_end_are_refused(
    tmp_path: Path, ending: str, blank: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed, "BLANK", 6000)
    path = tmp_path / f"a.jsonl{ending}"
    some = blank * (6000 // len(blank))
    path.write_bytes(PLAIN[ending](b'{"text": "1"}\n' + some + b'{"text": "2"}\n' + some))
    assert len(read(path)) == 2
    path.write_bytes(PLAIN[ending](b'{"text": "1"}\n' + some + blank + b'{"text": "2"}\n'))
    with pytest.raises(DataError, match=rf"a.jsonl{ending}: has more than 6000 bytes of empty"):
        read(path)


@pytest.mark.parametrize("samples", [None, 1])
def test_a_small_file_that_holds_a_large_line_takes_little_memory(
    tmp_path: Path, samples: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 2**20
    monkeypatch.setattr(compressed, "LARGEST", largest)
    path = tmp_path / "a.jsonl.bz2"
    path.write_bytes(bz2.compress(b"a" * 20_000_000))
    assert path.stat().st_size < 200
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"a.jsonl.bz2:1: is larger than"):
            read(path, samples)
        assert tracemalloc.get_traced_memory()[1] < 8 * largest  # of 19
    finally:
        tracemalloc.stop()
