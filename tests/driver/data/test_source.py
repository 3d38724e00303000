"""Parsing `[group=]SOURCE[:N]`, also with ambiguous names."""

import os
import re
from pathlib import Path

import pytest

from reap_driver.data.source import DataSource, HubDataset
from reap_kernels.errors import DataError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("code.jsonl", "a=b.jsonl", "part:7", "part:7:3", "C:x.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "data.d").mkdir()
    (tmp_path / "data.d" / "x.parquet").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "path", "group", "samples"),
    [
        ("code.jsonl", "code.jsonl", "code", None),
        ("code.jsonl:12", "code.jsonl", "code", 12),
        ("tools=code.jsonl", "code.jsonl", "tools", None),
        ("tools=code.jsonl:12", "code.jsonl", "tools", 12),
        ("my group=code.jsonl", "code.jsonl", "my group", None),
        ("data.d", "data.d", "data", None),
        ("data.d/", "data.d", "data", None),
        ("./data.d:5", "data.d", "data", 5),
        ("data.d/x.parquet:5", "data.d/x.parquet", "x", 5),
        # A name that exists is used as it is written.
        ("a=b.jsonl", "a=b.jsonl", "a=b", None),
        ("a=b.jsonl:4", "code.jsonl", None, None),
        ("g=a=b.jsonl", "a=b.jsonl", "g", None),
        ("g=a=b.jsonl:4", "a=b.jsonl", "g", 4),
        ("part:7", "part:7", "part:7", None),
        ("part:7:3", "part:7:3", "part:7:3", None),
        ("part:7:4", "part:7", "part:7", 4),
        ("g=part:7", "part:7", "g", None),
        ("C:x.jsonl", "C:x.jsonl", "C:x", None),
        ("C:x.jsonl:2", "C:x.jsonl", "C:x", 2),
    ],
)
def test_parse(here: Path, text: str, path: str, group: str | None, samples: int | None) -> None:
    if group is None:  # "a=b.jsonl:4" reads as group "a" of a file b.jsonl, which does not exist
        with pytest.raises(DataError, match=r"no file or folder 'b.jsonl'"):
            DataSource.parse(text)
    else:
        assert DataSource.parse(text) == DataSource(Path(path), group, samples)


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("none.jsonl", "none.jsonl"),
        ("none.jsonl:5", "none.jsonl"),
        ("g=none.jsonl:5", "none.jsonl"),
        ("./org/dataset", "org/dataset"),
        ("/org/dataset", "/org/dataset"),
        ("a/b/c:5", "a/b/c"),
        ("none.jsonl.gz", "none.jsonl.gz"),
        ("what is this?", "what is this?"),
    ],
)
def test_missing(here: Path, text: str, missing: str) -> None:
    with pytest.raises(
        DataError, match=re.escape(f"data {text!r}: no file or folder {missing!r}; give")
    ):
        DataSource.parse(text)


@pytest.mark.parametrize("budget", ["0", "0tok", "0.0001ktok"])
def test_zero_records(here: Path, budget: str) -> None:
    with pytest.raises(DataError, match=r"takes 0 records; give a number above 0"):
        DataSource.parse(f"code.jsonl:{budget}")


@pytest.mark.parametrize(
    ("budget", "tokens"),
    [
        ("4096tok", 4096),
        ("500ktok", 500_000),
        ("2Mtok", 2_000_000),
        ("2mtok", 2_000_000),
        ("1.5Mtok", 1_500_000),
        ("1Gtok", 10**9),
    ],
)
def test_budgets_of_tokens(here: Path, budget: str, tokens: int) -> None:
    assert DataSource.parse(f"g=code.jsonl:{budget}") == DataSource(
        Path("code.jsonl"), "g", tokens=tokens
    )


@pytest.mark.parametrize("budget", ["2M", "7records", "1.5", "2Mtokens"])
def test_budgets_that_are_none(here: Path, budget: str) -> None:
    with pytest.raises(
        DataError, match=rf"'{budget}' is not a budget; give a number of records, such"
    ):
        DataSource.parse(f"code.jsonl:{budget}")


@pytest.mark.parametrize(
    ("text", "location", "group", "samples", "tokens"),
    [
        ("owner/name", HubDataset("owner/name"), "name", None, None),
        ("wikitext", HubDataset("wikitext"), "wikitext", None, None),
        ("owner/name:700", HubDataset("owner/name"), "name", 700, None),
        ("code=owner/name-v1.1:2Mtok", HubDataset("owner/name-v1.1"), "code", None, 2_000_000),
        ("owner/name[math]:7", HubDataset("owner/name", "math"), "math", 7, None),
        ("owner/name(tool)", HubDataset("owner/name", None, "tool"), "name", None, None),
        (
            "g=owner/name[a b](train[:10%])@refs/pr/2:7",
            HubDataset("owner/name", "a b", "train[:10%]", "refs/pr/2"),
            "g",
            7,
            None,
        ),
        # No group, although the name contains "=".
        ("owner/name[a=b]", HubDataset("owner/name", "a=b"), "a=b", None, None),
    ],
)
def test_data_sets_of_the_hub(
    here: Path,
    text: str,
    location: HubDataset,
    group: str,
    samples: int | None,
    tokens: int | None,
) -> None:
    source = DataSource.parse(text)
    assert source == DataSource(location, group, samples, tokens)
    assert HubDataset.parse(source.name) == location


def test_what_exists_comes_before_a_data_set_of_its_name(here: Path) -> None:
    (here / "owner" / "name").mkdir(parents=True)
    (here / "wikitext").write_text("")
    assert DataSource.parse("owner/name:5") == DataSource(Path("owner/name"), "name", 5)
    assert DataSource.parse("wikitext").location == Path("wikitext")


def test_groups_of_compressed_files(here: Path) -> None:
    (here / "code.v2.jsonl.gz").write_text("")
    assert DataSource.parse("code.v2.jsonl.gz").group == "code.v2"


def test_a_relative_folder_has_a_name(here: Path) -> None:
    assert DataSource.parse(".").group == here.stem


def test_files_of_a_data_set_are_in_its_name() -> None:
    assert str(HubDataset("o/n", "a", files=("x.json", "y.json"))) == "o/n[a]{x.json,y.json}"


@pytest.mark.parametrize(
    "text",
    [
        "x" * 300 + ".jsonl",
        "y/" * 3000 + ".jsonl",
        "z\0.jsonl",
        "loop.jsonl",
        "~nobody-of-that-name/a.jsonl",
        "~a\0/a.jsonl",
        "pipe.jsonl",
        "g=pipe.jsonl",
        "code.jsonl:" + "9" * 5000,
        "code.jsonl:" + "9" * 400 + "tok",
        "code.jsonl:1e9",
        "code.jsonl:\u0663",
        "",
        " ",
        "=",
        ":5",
        "\ud800.jsonl",
        "g=" + "\n",
        "a" * 100_000,
    ],
)
def test_names_and_budgets_of_any_kind_are_one_error(here: Path, text: str) -> None:
    (here / "loop.jsonl").symlink_to(here / "loop.jsonl")
    os.mkfifo(here / "pipe.jsonl")
    with pytest.raises(DataError) as caught:
        DataSource.parse(text)
    assert len(str(caught.value).encode()) < 1000


def test_a_name_that_is_no_text_is_escaped(here: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jsonl")
    (here / name).write_text("")
    source = DataSource.parse(name)
    assert (source.name, source.group) == ("caf\\udce9.jsonl", "caf\\udce9")
