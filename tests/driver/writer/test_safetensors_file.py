"""Headers of safetensors files: what the library refuses is refused, with a reason."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from reap_driver.files.safetensors_file import read_header
from reap_kernels.errors import CheckpointError


def _entry(**change: Any) -> Callable[[bytes], bytes]:
    """Another header with the data of the file: one tensor of 16 bytes, with this changed."""
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **change}
    return _header(json.dumps({"a": entry}))


def _header(text: str) -> Callable[[bytes], bytes]:
    raw = text.encode("utf-8", "surrogatepass")
    return lambda _: struct.pack("<Q", len(raw)) + raw + bytes(16)


_FOUR_BITS = {"dtype": "F4", "shape": [31], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (_entry(dtype=["F32"]), "malformed entry"),
        (_entry(dtype=None), "malformed entry"),
        (_entry(shape=[True, 4]), "malformed entry"),
        (_entry(shape=[2.0, 2]), "malformed entry"),
        (_entry(shape=[-2, -2]), "malformed entry"),
        (_entry(shape="22"), "malformed entry"),
        (_entry(shape=[2] * 100), "malformed entry"),
        (_entry(shape=[2**62, 2**62]), "claims offsets 0 to 16"),
        (_entry(shape=[2**62] * 60), "claims offsets 0 to 16"),
        (_entry(shape=[2**64]), "64 bits do not hold"),
        (_entry(data_offsets=[0, 16, 16]), "malformed entry"),
        (_entry(data_offsets=[False, 16]), "malformed entry"),
        (_entry(data_offsets=[16, 0]), "claims offsets 16 to 0"),
        (_entry(**_FOUR_BITS), "claims offsets 0 to 16"),
        (_header('{"a": 3}'), "malformed entry"),
        (_header("[]"), "a list, not an object"),
        (_header("[" * 100_000 + "]" * 100_000), "nested deeper"),
        (_header('{"__metadata__": {"a": 1}}'), "not an object of texts"),
        (_header('{"__metadata__": []}'), "not an object of texts"),
        (_header('{"a": {}, "a": {}}'), "'a' twice"),
        (_header('{"\\ud800": {}}'), "surrogate"),
        (_header("{}" + "\0"), "not JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_headers_that_the_library_refuses_or_would_misread(
    tmp_path: Path, damage: Callable[[bytes], bytes], part: str
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(_entry()(b""))
    assert read_header(path).tensors["a"].shape == (2, 2)
    path.write_bytes(damage(b""))
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as caught:
        read_header(path)
    assert part in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_the_library_has_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a later version of it refuses."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(_entry()(b""))

    def refuse(*_: object) -> None:
        raise SafetensorError("a new rule")

    monkeypatch.setattr("reap_driver.files.safetensors_file.safe_open", refuse)
    with pytest.raises(CheckpointError, match=r"library refuses it \('a new rule'\)"):
        read_header(path)
