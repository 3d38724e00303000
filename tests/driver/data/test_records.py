"""Records of every kind of file, random samples, and errors, which name the place."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from reap_driver.data.encode import Encoder
from reap_driver.data.records import BadRecords, Record
from reap_driver.data.sampling import read_records
from reap_driver.data.source import DataSource
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
    monkeypatch.setattr("reap_driver.data.local_files._PARQUET_ROWS", 3)
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
        ('{"text": "a"', "is not JSON"),
        ("text", "is not JSON"),
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
    with pytest.raises(DataError, match=r"a.jsonl:1: is not UTF-8 .*; correct the line"):
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
    with pytest.raises(
        DataError, match=r"none: no .jsonl, .ndjson, .json, .parquet, .csv, .tsv, .txt file in"
    ):
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
    path = tmp_path / "a.xml"
    path.write_text("text\n")
    with pytest.raises(DataError, match=r"a.xml: ending '.xml' is not known; give one of .jsonl"):
        read(path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_a_budget_of_tokens_brings_all_in_random_order(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reap_driver.data.sampling._FIRST_PASS", 4)
    monkeypatch.setattr("reap_driver.data.sampling._LARGEST_PASS", 16)
    rows = [{"text": f"{n:03}"} for n in range(100)]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        write_jsonl(path, rows)
    else:
        path.mkdir()
        for part in range(4):
            write_jsonl(path / f"{part}.jsonl", rows[25 * part : 25 * part + 25])

    def order(samples: int | None = None, seed: int = 0) -> list[int]:
        source = DataSource(path, "g", samples, tokens=10)
        return [int(record.fields["text"]) for record in read_records(source, seed)]

    assert sorted(order()) == list(range(100))
    assert order() == order() != order(seed=1)
    assert max(order()[:10]) > 50  # what comes first is not the beginning
    assert len(set(order(30))) == len(order(30)) == 30
    # The same records as without the budget of tokens, in another order.
    assert sorted(order(30)) == [int(f["text"]) for f in fields(path, 30)]


def test_what_a_budget_does_not_need_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": str(n)} for n in range(1000)])
    source = DataSource(path, "g", tokens=10)
    order = [record.fields["text"] for record in read_records(source, 0)]
    first = set(order[:256])
    lines = [json.dumps({"text": str(n)}) if str(n) in first else "{" for n in range(1000)]
    path.write_text("\n".join(lines))
    stream = read_records(source, 0)
    assert [next(stream).fields["text"] for _ in range(256)] == order[:256]
    with pytest.raises(DataError, match="is not JSON"):
        next(stream)


@pytest.mark.parametrize("budget", [{}, {"samples": 9}, {"tokens": 100}])
def test_bad_records_are_counted_where_they_may_be(tmp_path: Path, budget: dict[str, int]) -> None:
    path = tmp_path / "data"
    path.mkdir()
    (path / "a.jsonl").write_text("".join(f'{{"text": "{n}"}}\n{{broken\n' for n in range(10)))
    (path / "b.txt").write_bytes(b"\xe9")
    source, bad = DataSource(path, "g", **budget), BadRecords()
    found = [int(record.fields["text"]) for record in read_records(source, 0, bad)]
    expected = min(9, 21) if "samples" in budget else 21
    assert len(found) + bad.count == expected
    assert len(found) == len(set(found))
    assert len(bad.first) == min(bad.count, BadRecords.SHOWN)
    assert all("is not JSON" in text or "not UTF-8" in text for text in bad.first)
    with pytest.raises(DataError, match=r"a.jsonl:\d+: is not JSON|b.txt is not UTF-8"):
        list(read_records(source, 0))


def test_files_that_cannot_be_read_are_no_bad_records(tmp_path: Path) -> None:
    bad = BadRecords()
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        list(read_records(DataSource(tmp_path, "g"), 0, bad))
    assert bad.count == 0


def test_only_bad_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{\n[]\n")
    bad = BadRecords()
    assert list(read_records(DataSource(path, "g"), 0, bad)) == []
    assert [text.partition(": ")[0] for text in bad.first] == [f"{path}:1", f"{path}:2"]


DEEP = "[" * 100_000
ODD_LINES = {
    "deep": (f'{{"text": "a", "more": {DEEP}', "is nested deeper than 64 levels"),
    "deep and whole": (f'{{"text": {"[" * 65}{"]" * 65}}}', "is nested deeper than 64 levels"),
    "surrogate": ('{"text": "a \\ud800 b"}', "holds a text that no encoding writes"),
    "surrogate in a name": ('{"text": "a", "\\udfff": 1}', "holds a text that no encoding writes"),
    "digits": (f'{{"text": "a", "n": {"9" * 5000}}}', "holds a number that cannot be read"),
    "twice": ('{"text": "a", "text": "b"}', "has the name 'text' twice in one object"),
    "utf-16": ('{"text": "a"}'.encode("utf-16"), "is not UTF-8"),
}


@pytest.mark.parametrize("case", ODD_LINES)
def test_odd_lines_are_bad_records(tmp_path: Path, case: str) -> None:
    line, says = ODD_LINES[case]
    path = tmp_path / "a.jsonl"
    content = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"text": "fine"}\n' + content.replace(b"\n", b"") + b'\n{"text": "fine"}')
    with pytest.raises(DataError, match=rf"^.*a.jsonl:2: {says}.*; correct the line$"):
        read(path)
    bad = BadRecords()
    found = list(read_records(DataSource(path, "g"), 0, bad))
    assert [record.fields for record in found] == [{"text": "fine"}] * 2
    assert bad.count == 1


def test_numbers_that_other_tools_write_are_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "score": NaN, "high": Infinity, "seen": 99999999999999999999}\n')
    assert [record["text"] for record in fields(path)] == ["a"]


def _table(**columns: Any) -> pa.Table:
    return pa.table({name: pa.array(*value) for name, value in columns.items()})


ODD_TABLES: dict[str, tuple[pa.Table, str]] = {
    "bytes": (_table(text=([b"a"], pa.binary())), "text is a bytes"),
    "numbers": (_table(text=([1.5], pa.float64())), "text is a float"),
    "ids as text": (_table(input_ids=(["1"], pa.string())), "input_ids must be a flat list"),
    "ids that are real": (_table(input_ids=([[1.0]], pa.list_(pa.float32()))), "input_ids must be"),
    "ids with none": (_table(input_ids=([[1, None]], pa.list_(pa.int64()))), "input_ids must be"),
    "large ids": (_table(input_ids=([[2**63]], pa.list_(pa.uint64()))), "token id 92233720368547"),
    "messages as a map": (
        _table(messages=([[("role", "user")]], pa.map_(pa.string(), pa.string()))),
        "messages must be a list of objects",
    ),
    "a date as content": (
        _table(
            messages=(
                [[{"role": "user", "content": 5}]],
                pa.list_(pa.struct({"role": pa.string(), "content": pa.date32()})),
            )
        ),
        r"the content of messages\[0\] is a date",
    ),
    "no such date": (_table(text=([2**62], pa.timestamp("ms"))), "cannot be read"),
    "no text": (
        pa.table({"text": pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())}),
        "cannot be read .*codec can't decode",
    ),
}


@pytest.mark.parametrize("case", ODD_TABLES)
def test_odd_columns_are_bad_records(tmp_path: Path, case: str, encoder: Encoder) -> None:
    """Rows before and after a bad one are read."""
    table, says = ODD_TABLES[case]
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path)
    with pytest.raises(DataError, match=rf"^.*a.parquet, row 1: .*{says}"):
        list(encoder.encode(read(path)))
    bad = BadRecords()
    records = list(read_records(DataSource(path, "g"), 0, bad))
    assert list(encoder.encode(records, bad)) == []
    assert bad.count == 1


def test_the_rows_beside_one_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": texts}), path)
    bad = BadRecords()
    found = list(read_records(DataSource(path, "g"), 0, bad))
    assert [(record.place, record.fields) for record in found] == [
        (f"{path}, row 1", {"text": "a"}),
        (f"{path}, row 3", {"text": "c"}),
    ]
    assert bad.first[0].startswith(f"{path}, row 2: cannot be read")


def _dictionary(texts: list[str], indices: list[int]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(texts))


@pytest.mark.parametrize("nested", [False, True])
def test_texts_that_many_rows_name_take_memory_once(
    tmp_path: Path, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of a kilobyte with 300 rows of 1 MB; a row above the limit is a bad record."""
    monkeypatch.setattr("reap_driver.data.arrow.LARGEST", 1_500_000)
    texts = _dictionary(["a" * 1_000_000, "b"], [0] * 299 + [1])
    column: pa.Array = texts
    if nested:
        struct = pa.StructArray.from_arrays([texts], ["content"])
        column = pa.ListArray.from_arrays(pa.array([*range(0, 299, 2), 299, 300]), struct)
    path = tmp_path / "a.parquet"
    table = pa.table({"messages" if nested else "text": column})
    parquet.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 5000
    before, peak, bad = pa.total_allocated_bytes(), 0, BadRecords()
    fields: dict[str, Any] = {}
    for record in read_records(DataSource(path, "g"), 0, bad):
        peak, fields = max(peak, pa.total_allocated_bytes() - before), record.fields
    assert fields == ({"messages": [{"content": "b"}]} if nested else {"text": "b"})
    assert peak < 20_000_000
    assert bad.count == (149 if nested else 0)
    if nested:
        assert bad.first[0] == f"{path}, row 1: is larger than 1500000 bytes; divide the record"


def test_links_in_a_loop_and_pipes_in_a_folder_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    os.mkfifo(tmp_path / "c.jsonl")
    (tmp_path / "up").symlink_to(tmp_path)
    write_jsonl(tmp_path / "d.jsonl", [{"text": "d"}])
    assert fields(tmp_path) == [{"text": "d"}]
