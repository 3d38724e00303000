"""Every reader of our own formats: what is no such file ends in one error that names it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reap_driver.files.matrices import FORMAT as MATRICES
from reap_driver.files.matrices import LAYER_FORMAT
from reap_driver.files.safetensors_file import read_header
from reap_driver.observation.journal import FORMAT as JOURNAL
from reap_driver.observation.state_store import read_state
from reap_driver.plan_search.search_state import read as read_search
from reap_driver.planning.plan import Plan
from reap_driver.reporting.comparison import read_comparison
from reap_driver.workflow.ranking import _Experts, _read
from reap_driver.writer.mask_file import load_masks
from reap_kernels import SaliencyStats
from reap_kernels.errors import ReapError
from reap_kernels.tensor_files import read_tensors
from reap_kernels.tuning import Table

Read = Callable[[Path], Any]

JSON: dict[str, Read] = {
    "plan": Plan.load,
    "journal": JOURNAL.read,
    "state of a search": read_search,
    "launch table": Table.load,
    "comparison": read_comparison,
    "matrices": MATRICES.read,
    "layers": lambda path: _read(path, _Experts()),
}
TENSORS: dict[str, Read] = {
    "statistics": SaliencyStats.load,
    "masks": load_masks,
    "state of a batch": read_state,
    "matrices of a layer": lambda path: read_tensors(path, LAYER_FORMAT),
    "header": read_header,
}
every = pytest.mark.parametrize("read", [*JSON.values(), *TENSORS.values()], ids=[*JSON, *TENSORS])


def refused(read: Read, path: Path) -> str:
    """The one error about a file."""
    with pytest.raises(ReapError) as caught:
        read(path)
    text = str(caught.value)
    assert path.name[:50].split("\0")[0] in text
    assert len(text) < 2000 + len(str(path))
    return text


@every
@pytest.mark.parametrize("name", ["missing", "folder", "pipe", "loop", "x" * 300, "nul\0", "below"])
def test_names_that_name_no_file(tmp_path: Path, read: Read, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    refused(read, tmp_path / "file/below" if name == "below" else tmp_path / name)


@every
@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"\xff" * 64, b"{}", b"3", b"PK\3\4" * 9])
def test_content_of_another_kind(tmp_path: Path, read: Read, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    refused(read, tmp_path / "file")


@pytest.mark.parametrize("read", JSON.values(), ids=JSON)
@pytest.mark.parametrize(
    "value",
    [
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        '"\\ud800"',
        "NaN",
        "1e999",
        "9" * 5000,
        "9223372036854775808",
        '{"a": 1, "a": 2}',
        '"' + "x" * 200_000 + '"',
    ],
    ids=lambda value: value[:12],
)
def test_values_beyond_the_limits(tmp_path: Path, read: Read, value: str) -> None:
    path = tmp_path / "file"
    path.write_text(f'{{"0": {value}}}')
    refused(read, path)
    path.write_text(
        json.dumps({"format": "reap-plan", "version": 1})[:-1] + f', "model": {value}}}'
    )
    refused(read, path)


@every
def test_files_that_cannot_be_read(
    tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything, so the system's refusal is played."""
    path = tmp_path / "file"
    path.write_text("{}")
    opened = os.open

    def deny(name: Any, *rest: Any) -> int:
        if os.fspath(name) == str(path):
            raise PermissionError(13, "Permission denied")
        return opened(name, *rest)

    monkeypatch.setattr(os, "open", deny)
    assert "Permission denied" in refused(read, path)
