"""JSON arrays, read an element at a time, and CSV and TSV files with their mistakes."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reap_driver.data import csv_rows, json_array
from reap_driver.data.local_files import Files
from reap_driver.data.records import BadRecords, Record
from reap_driver.data.sampling import read_records
from reap_driver.data.source import DataSource
from reap_kernels.errors import DataError

ROWS = [{"text": 'a, [b] "c" {é}\n'}, {"text": "x" * 50, "list": [1, {"n": 2.5}]}, {"text": ""}]


def read(path: Path, samples: int | None = None, bad: BadRecords | None = None) -> list[Record]:
    return list(read_records(DataSource(path, path.stem, samples), 0, bad))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 7, 2**20])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b" \n\t "])
def test_arrays_are_read_element_by_element(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, chunk: int, start: bytes
) -> None:
    monkeypatch.setattr(json_array, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_bytes(start + json.dumps(ROWS, indent=indent, ensure_ascii=False).encode())
    if chunk < 10 and start:
        monkeypatch.setattr("reap_driver.data.local_files._is_array", lambda _: True)
    found = read(path)
    assert [record.fields for record in found] == ROWS
    assert found[1].place == f"{path}, record 2"
    assert found[1].folder == tmp_path
    assert Files(path).count() == 3
    [drawn] = read(path, 1)
    assert drawn.fields in ROWS


def test_arrays_may_be_compressed_and_stand_in_folders(tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    (tmp_path / "b.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "c.json").write_text(' {"text": "one"} ')
    (tmp_path / "dataset_info.json").write_text('{\n  "splits": {}\n}')
    found = [record.fields for record in read(tmp_path)]
    assert found == [*ROWS, *ROWS, {"text": "one"}]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[{"text": "a"}, {"text": }]', "a.json, record 2: is not JSON (Expecting value); what"),
        ('[{"text": "a"}', "a.json: has no comma or ] after record 1; correct the file"),
        ('[{"text": "a"} {"text": "b"}]', "a.json: has no comma or ] after record 1"),
        ('[{"text": "a"},]', "a.json, record 2: is not JSON (Expecting value)"),
        ('[{"text": "a"}] x', "a.json: something follows the array, after record 1"),
        ("[" * 100_000, "a.json, record 1: is not JSON (nested too deeply)"),
        ('[{"text": "a"}, 5]', "a.json, record 2: a JSON int; every element must be an object"),
        ('[{"a": ' + "9" * 5000 + "}]", "a.json, record 1: holds a number that cannot be read ("),
        ('[{"text": "a", "text": "b"}]', "a.json, record 1: has the name 'text' twice"),
        ("[]", "a.json holds no records; give data with at least one"),
        ('{\n  "data": [{"text": "a"}]\n}', "a.json: holds neither JSON lines nor an array of ob"),
        ("text", "a.json: holds neither JSON lines nor an array of objects (its first line is no"),
    ],
)
def test_mistakes_in_arrays_are_named(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert says in str(caught.value)


def test_arrays_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "\xff"}]')
    with pytest.raises(DataError, match=r"a.json: is not UTF-8 \(invalid start byte\); convert it"):
        read(path)


def test_bad_elements_are_counted_and_large_ones_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, bad = tmp_path / "a.json", BadRecords()
    path.write_text('[5, {"text": "a"}, {"text": "\\ud800"}]')
    assert [record.fields for record in read(path, bad=bad)] == [{"text": "a"}]
    assert bad.count == 2
    monkeypatch.setattr(json_array, "LARGEST", 100)
    monkeypatch.setattr(json_array, "_CHUNK", 10)
    path.write_text(json.dumps([{"text": "a"}, {"text": "b" * 200}, {"text": "c"}]))
    with pytest.raises(DataError, match=r"record 2: is (not JSON .* or )?larger than 100 bytes"):
        read(path)


def table(path: Path, *lines: str, ending: str = "\n") -> Path:
    path.write_bytes("".join(line + ending for line in lines).encode())
    return path


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")])
def test_rows_of_tables(tmp_path: Path, name: str, mark: str, ending: str) -> None:
    lines = [
        f"{mark}question{mark} answer {mark}note",
        f'0{mark}"a{mark} ""b"""{mark}"c',
        f'd"{mark}',
        "",
        f"1{mark}e{mark}f{mark}é",
    ]
    path = table(tmp_path / name, *lines, ending=ending)
    if name.endswith("gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    first, second = read(path)
    assert first.fields == {"question": f'a{mark} "b"', "answer": f"c{ending}d"}
    assert second.fields == {"question": "e", "answer": "f", "note": "é"}
    assert (first.place, second.place) == (f"{path}:2", f"{path}:5")
    assert Files(path).count() == 2
    [drawn] = read(path, 1)
    assert drawn.fields in (first.fields, second.fields)


def test_tables_of_excel_and_of_long_cells(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", "\ufefftext", "x" * 200_000)
    assert read(path)[0].fields == {"text": "x" * 200_000}
    calls = json.dumps([{"role": "user", "content": "hi"}]).replace('"', '""')
    path = table(tmp_path / "b.csv", "messages,input", f'"{calls}",')
    assert json.loads(read(path)[0].fields["messages"]) == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["text,id", "a,1", "b"], "a.csv:3: has 1 cells, and the first row 2; quote cells that"),
        (["text", 'a"b', '"c" d'], "a.csv:3: is not CSV (',' expected after '\"'); correct its"),
        (["text", '"a'], "a.csv:2: is not CSV (unexpected end of data)"),
        (["first text", "second text"], "a.csv: its first row names no field of a known format, "),
        (["a;text", "1;b"], "(it has a;text); give it a first row of names"),
        ([""], "(it has nothing); give it a first row of names"),
        (["text,text", "a,b"], "a.csv: its first row has text twice; rename one"),
        (['"text" x', "a"], "a.csv: its first row is not CSV ("),
        (["text"], "a.csv holds no records"),
    ],
)
def test_mistakes_in_tables_are_named(tmp_path: Path, lines: list[str], says: str) -> None:
    path = table(tmp_path / "a.csv", *lines)
    with pytest.raises(DataError) as caught:
        read(path)
    assert says in str(caught.value)


def test_bad_rows_are_counted(tmp_path: Path) -> None:
    path, bad = table(tmp_path / "a.csv", "text,id", "a", '"b" x,1', "c,2"), BadRecords()
    assert [record.fields for record in read(path, bad=bad)] == [{"text": "c", "id": "2"}]
    assert bad.count == 2
    assert Files(path).count() == 3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"text\n\xff\n", r"a.csv:2: is not UTF-8 \(invalid start byte\)"),
        (b"text\n" + b"x" * 200, "a.csv:2: its row is larger than 100 bytes"),
        (b'text\n"' + b"x\n" * 100, r"a.csv:\d+: its row is larger than 100 bytes; divide it, or"),
    ],
)
def test_tables_within_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, says: str
) -> None:
    monkeypatch.setattr(csv_rows, "LARGEST", 100)
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        read(path)


MAKERS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "json": json.dumps,
    "csv": lambda rows: "text\n" + "".join(f"{row['text']}\n" for row in rows),
}


def test_a_sample_is_the_same_from_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}"} for n in range(40)]
    drawn = []
    for kind, make in MAKERS.items():
        path = tmp_path / f"a.{kind}"
        path.write_text(make(rows))
        drawn.append([record.fields for record in read(path, 7)])
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(drawn[0]) == 7
