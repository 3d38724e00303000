"""Data sets of the hub, loaded by the `datasets` library from local files instead of the hub."""

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from pyarrow import parquet

from reap_driver.data.hub import check_access
from reap_driver.data.records import Record
from reap_driver.data.sampling import read_records
from reap_driver.data.source import DataSource, HubDataset
from reap_kernels.errors import DataError

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"q{n}"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": "{}"}]}
            if n % 2
            else {"role": "assistant", "content": f"a{n}"},
        ],
        "source": f"s{n}",
        "num_tokens": n,
    }
    for n in range(50)
]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The arguments of `load_dataset`, which is replaced: it builds owner/name from JSON lines."""
    monkeypatch.chdir(tmp_path)
    lines = tmp_path / "rows.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    load, calls = datasets.load_dataset, []

    def local(name: str, subset: str | None, **options: Any) -> Any:
        calls.append({"name": name, "subset": subset, **options})
        files = {"train": str(lines), "tool": str(lines)}
        cache = str(tmp_path / "cache")
        return load("json", data_files=files, split=options["split"], cache_dir=cache)

    monkeypatch.setattr(datasets, "load_dataset", local)
    return calls


def read(text: str, seed: int = 0) -> list[Record]:
    return list(read_records(DataSource.parse(text), seed))


def test_rows_are_records_of_the_known_columns(asked: list[dict[str, Any]]) -> None:
    records = read("owner/name")
    assert records[0] == Record("owner/name, row 1", {"messages": ROWS[0]["messages"]})
    # Older versions of the library leave out the null.
    [_, call] = records[49].fields["messages"]
    assert {"content": None, **call} == ROWS[49]["messages"][1]
    assert [r.fields["messages"][0]["content"] for r in records] == [f"q{n}" for n in range(50)]
    assert asked == [
        {
            "name": "owner/name",
            "subset": None,
            "split": "train",
            "revision": None,
            "data_files": None,
        }
    ]


def test_columns_that_are_not_read_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unused columns are recorded for files and the hub alike, except those about a row's
    origin.
    """
    monkeypatch.chdir(tmp_path)
    table = pa.Table.from_pylist([{"text": "a", "verdict": 1, "id": 7, "url": "u"}] * 2)
    parquet.write_table(table, "rows.parquet")
    rows = datasets.Dataset.from_parquet("rows.parquet", cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: rows)
    for name in ("owner/name", "rows.parquet"):
        assert [(record.fields, record.unused) for record in read(name)] == [
            ({"text": "a"}, {"verdict"})
        ] * 2


def test_subset_split_and_revision_reach_the_library(asked: list[dict[str, Any]]) -> None:
    assert len(read("g=owner/name[code](tool)@v1.0:7")) == 7
    assert asked[0] | {"data_files": None} == {
        "name": "owner/name",
        "subset": "code",
        "split": "tool",
        "revision": "v1.0",
        "data_files": None,
    }
    source = DataSource(HubDataset("owner/name", files=("en/a.json.gz",)), "g", 1)
    assert len(list(read_records(source, 0))) == 1
    assert asked[1]["data_files"] == {"train": ["en/a.json.gz"]}


def test_keys_that_other_rows_have_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parquet.write_table(pa.Table.from_pylist(ROWS), "rows.parquet")  # objects of all keys
    rows = datasets.Dataset.from_parquet("rows.parquet", cache_dir=str(tmp_path / "cache"))
    assert set(rows[0]["messages"][0]) == {"role", "content", "tool_calls"}
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: rows)
    found = [record.fields["messages"] for record in read("owner/name")]
    assert found[0] == ROWS[0]["messages"]
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]}
    assert found[1] == [ROWS[1]["messages"][0], call]
    assert found == [record.fields["messages"] for record in read("rows.parquet")]


@pytest.mark.parametrize("budget", [":9", ":1ktok"])
def test_samples_are_those_of_a_file(
    asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: str
) -> None:
    monkeypatch.setattr("reap_driver.data.hub._ROWS", 4)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for seed in (0, 1):
        hub, local = read(f"owner/name{budget}", seed), read(f"rows.jsonl{budget}", seed)
        rows = [int(record.place.rpartition(" ")[2]) for record in hub]
        assert rows == [int(record.place.rpartition(":")[2]) for record in local]
        firsts = [record.fields["messages"][0] for record in hub]
        assert firsts == [record.fields["messages"][0] for record in local]
    assert rows != [int(record.place.rpartition(" ")[2]) for record in read(f"owner/name{budget}")]


def test_a_folder_of_that_name_comes_first(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "a.txt").write_text("local")
    assert [record.fields for record in read("owner/name")] == [{"text": "local"}]
    assert asked == []


def test_an_unknown_split_is_named_with_those_there_are(asked: list[dict[str, Any]]) -> None:
    with pytest.raises(
        DataError, match=r"data owner/name\(test\): .*\['train', 'tool'\].*; give one that it has"
    ):
        read("owner/name(test)")


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError,
        match=r"data owner/none\[a\]: no file or folder has that name, and the hub's data set "
        r"cannot be loaded \(ConnectionError: .*\); unset HF_HUB_OFFLINE, or download it before",
    ):
        read("owner/none[a]:5")


def test_a_hub_that_cannot_be_reached_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's error says that a file is missing, because it wraps that of the network."""

    def load(*given: Any, **options: Any) -> Any:
        try:
            raise socket.gaierror(-2, "Name or service not known")
        except OSError as error:
            raise FileNotFoundError("Couldn't find any data file") from error

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        DataError,
        match=r"data owner/name: .* the hub cannot be reached \(\[Errno -2\] Name or service not "
        r"known\); check the network, .* set HF_HUB_OFFLINE=1",
    ):
        read("owner/name")


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (type("DatasetNotFoundError", (OSError,), {})("no such"), "check its name and the network"),
        (type("GatedRepoError", (OSError,), {})("401"), "ask for access on its page and log in"),
        (ValueError("Config name is missing.\nPick one"), r"as name\[subset\]\(split\)"),
    ],
)
def test_other_failures_have_their_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, remedy: str
) -> None:
    def load(*given: Any, **options: Any) -> Any:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        DataError, match=rf"data owner/name: .*{type(error).__name__}.*; .*{remedy}"
    ):
        read("owner/name")


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"data owner/name: .*pip install reap-kernels\[data\]"):
        read("owner/name")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (GatedRepoError, r"\(GatedRepoError\); ask for access on its page and log in with `hf a"),
        (
            RepositoryNotFoundError,
            r"\(RepositoryNotFoundError\); check its name, and log in with `hf a",
        ),
        (HfHubHTTPError, None),
        (OSError, None),
    ],
)
def test_access_is_checked_before_other_data_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], says: str | None
) -> None:
    asked = []

    def refuse(self: HfApi, name: str, *, repo_type: str) -> None:
        asked.append((name, repo_type))
        raise kind.__new__(kind)

    monkeypatch.setattr(HfApi, "auth_check", refuse)
    location = HubDataset("owner/name", files=("a.json",))
    if says is None:
        check_access(location)
    else:
        with pytest.raises(DataError, match=rf"data owner/name{{a.json}}: no file .*{says}"):
            check_access(location)
    assert asked == [("owner/name", "dataset")]
