"""Compressed files read as what is in them; damage is named."""

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from reap_driver.calibration.records import Record, read_records
from reap_driver.calibration.source import DataSource
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


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.gz", "a.json.gz"])
def test_other_files_stay_unknown(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(LINES))
    with pytest.raises(DataError, match=rf"{name}: ending '.gz' is not known; give one of .jsonl"):
        read(path)
