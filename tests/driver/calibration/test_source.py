"""`[group=]SOURCE[:N]`, with names that look like something else."""

import re
from pathlib import Path

import pytest

from reap_driver.calibration import DataSource
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
        # What exists as written is meant as written.
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


def test_zero_records(here: Path) -> None:
    with pytest.raises(DataError, match=r"takes 0 records; give a number above 0"):
        DataSource.parse("code.jsonl:0")


def test_a_relative_folder_has_a_name(here: Path) -> None:
    assert DataSource.parse(".").group == here.stem
