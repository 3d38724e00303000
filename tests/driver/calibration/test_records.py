"""Records of every kind of file, samples of them, and what is wrong with files, by place."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from reap_driver.calibration.records import Record, read_records
from reap_driver.calibration.source import DataSource
from reap_kernels.errors import DataError


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path, samples: int | None = None, seed: int = 0) -> list[Record]:
    return list(read_records(DataSource(path, "g", samples), seed))


def fields(path: Path, samples: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    return [record.fields for record in read(path, samples, seed)]


@pytest.mark.parametrize("ending", ["jsonl", "ndjson"])
def test_json_lines(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_text('{"text": "a\\nb"}\r\n\n   \n{"input_ids": [1, 2], "other": null}')
    assert read(path) == [
        Record(f"{path}:1", {"text": "a\nb"}),
        Record(f"{path}:4", {"input_ids": [1, 2], "other": None}),
    ]


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"text": f"t{i}", "input_ids": list(range(i))} for i in range(10)]
    parquet.write_table(pa.Table.from_pylist(rows), path)
    monkeypatch.setattr("reap_driver.calibration.files._PARQUET_ROWS", 3)
    assert fields(path) == rows
    assert [record.place for record in read(path)][3] == f"{path}, row 4"


def test_text_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\f\nthree — ünïcode\n", encoding="utf-8")
    assert read(path) == [Record(str(path), {"text": "one\n\ntwo\f\nthree — ünïcode\n"})]


def test_folders_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".cache").mkdir()
    write_jsonl(tmp_path / "b" / "z.jsonl", [{"text": "z"}])
    write_jsonl(tmp_path / "c.jsonl", [{"text": "c"}])
    write_jsonl(tmp_path / ".cache" / "hidden.jsonl", [{"text": "hidden"}])
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "README.md").write_text("no data")
    parquet.write_table(pa.Table.from_pylist([{"text": "d"}]), tmp_path / "d.parquet")
    assert [f["text"] for f in fields(tmp_path)] == ["a", "z", "c", "d"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_samples_are_drawn_with_the_seed(tmp_path: Path, kind: str) -> None:
    rows = [{"text": str(i)} for i in range(100)]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        write_jsonl(path, rows)
    else:
        path.mkdir()
        for row in rows:
            (path / f"{int(row['text']):03}.txt").write_text(row["text"])
    drawn = [int(f["text"]) for f in fields(path, 10)]
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 10
    assert drawn == [int(f["text"]) for f in fields(path, 10)]
    assert drawn != [int(f["text"]) for f in fields(path, 10, seed=1)]
    assert max(drawn) > 50  # the sample is not the beginning
    assert len(fields(path, 100)) == len(fields(path, 1000)) == 100


def test_records_that_are_not_drawn_are_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    drawn = {f["text"] for f in fields(write_jsonl(path, [{"text": i} for i in range(50)]), 5)}
    lines = [json.dumps({"text": i}) if i in drawn else "{broken" for i in range(50)]
    path.write_text("\n".join(lines))
    assert {f["text"] for f in fields(path, 5)} == drawn


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "a"', "not valid JSON"),
        ("text", "not valid JSON"),
        ("[1, 2]", "a JSON list; every line must be an object"),
        ('"text"', "a JSON str"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(DataError, match=rf"a.jsonl:3: {says}"):
        read(path)


def test_lines_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xe9t\xe9"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:1: not valid JSON"):
        read(path)
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xe9t\xe9")
    with pytest.raises(DataError, match=r"a.txt is not UTF-8"):
        read(path)


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_empty_files(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    for samples in (None, 5):
        with pytest.raises(DataError, match=r"data .*a.jsonl holds no records; give"):
            read(path, samples)


def test_empty_parquet_and_empty_folder(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="holds no records"):
        read(tmp_path / "a.parquet")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "README.md").write_text("nothing")
    with pytest.raises(DataError, match=r"none: no .jsonl, .ndjson, .parquet, .txt file in this"):
        read(tmp_path / "none")


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist([{"text": "x" * 1000}] * 50), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a.parquet cannot be read as Parquet \("):
        read(path)


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"")
    for module in ("pyarrow", "pyarrow.parquet", "pyarrow.lib"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"pyarrow.*pip install reap-kernels\[data\]"):
        read(path)


def test_unknown_endings(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n")
    with pytest.raises(DataError, match=r"a.csv: ending '.csv' is not known; give one of .jsonl"):
        read(path)
