"""The one reader of JSON: limits of size, depth, numbers and texts; kinds that name the field."""

import json
import os
from pathlib import Path

import pytest

from reap_kernels.documents import MAX_DEPTH, Format, parse_json, read_bytes, to_json
from reap_kernels.errors import PlanError
from reap_kernels.files import is_file
from reap_kernels.schema import (
    Flag,
    Int,
    ListOf,
    MapOf,
    Mismatch,
    OrNull,
    Real,
    Record,
    Text,
    check,
)

FORMAT = Format(
    "test-format",
    2,
    "thing",
    {"counts": MapOf(ListOf(Int(0, 9)), 1), "ratio": Real(0, 1)},
    PlanError,
    "make it again",
    {"name": OrNull(Text(5)), "kind": Text(choices=("a", "b")), "on": Flag()},
)
GOOD = {"format": "test-format", "version": 2, "counts": {"x": [1, 2]}, "ratio": 1}


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (nested(MAX_DEPTH + 1), "nested deeper"),
        (nested(100_000), "nested deeper"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested deeper"),
        ('{"a": "\\ud800"}', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
        ("[NaN]", "nan"),
        ("[-Infinity]", "inf"),
        ("[1e999]", "inf"),
        ("[9223372036854775808]", "64 bits"),
        ("[" + "9" * 5000 + "]", "number"),
        ('{"a": 1, "a": 2}', "'a' twice"),
        ("{", "not JSON"),
        ("", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_what_is_outside_the_limits_is_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (nested(MAX_DEPTH), None),
        ('"\\ud83d\\ude00"', "\U0001f600"),  # a pair is a character
        (b"\xef\xbb\xbf{}", {}),
        ("[9223372036854775807, -9223372036854775808]", [2**63 - 1, -(2**63)]),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_within_them_is_read(text: str | bytes, value: object) -> None:
    assert parse_json(text) == (json.loads(text) if value is None else value)


def test_other_tools_may_write_infinity_and_huge_numbers() -> None:
    assert parse_json("[Infinity, 1" + "0" * 30 + "]", plain=False) == [float("inf"), 10**30]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "format is not 'test-format'"),
        ({"version": 3}, "has version 3"),
        ({"version": True}, "has version True"),
        ({"counts": {}}, "'counts' has 0 entries"),
        ({"counts": {"x": [1, 10]}}, r"'counts.x\[1\]' is 10; expected a whole number, 0 to 9"),
        ({"counts": {"x": [True]}}, r"'counts.x\[0\]' is True"),
        ({"counts": {"x": 3}}, "'counts.x' is 3; expected a list"),
        ({"counts": []}, r"'counts' is \[\]; expected an object"),
        ({"ratio": 1.5}, "'ratio' is 1.5; expected a finite number, 0 or more, 1 or less"),
        ({"ratio": "1"}, "'ratio' is '1'"),
        ({"name": "abcdef"}, "'name' has 6 characters"),
        ({"name": 3}, "'name' is 3; expected a text"),
        ({"kind": "c"}, "'kind' is 'c'; expected one of a, b"),
        ({"on": 1}, "'on' is 1; expected true or false"),
        ({"more": 1}, "'more' is unknown"),
    ],
)
def test_a_format_names_the_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        FORMAT.parse(json.dumps({**GOOD, **change}), "file.json")
    assert "file.json" in str(caught.value)
    assert str(caught.value).endswith("make it again")


def test_a_missing_field_is_named() -> None:
    with pytest.raises(PlanError, match="'ratio' is missing"):
        FORMAT.parse(json.dumps({k: v for k, v in GOOD.items() if k != "ratio"}), "x")
    with pytest.raises(Mismatch, match="the content is 3"):
        check(3, Record({}))


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(GOOD))
    assert FORMAT.read(path) == GOOD
    assert read_bytes(path, path.stat().st_size) == path.read_bytes()
    with pytest.raises(ValueError, match="larger than"):
        read_bytes(path, path.stat().st_size - 1)


@pytest.mark.parametrize("name", ["missing", "x" * 300, "nul\0", "loop"])
def test_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert not is_file(tmp_path / name)
    with pytest.raises(PlanError, match="cannot be read"):
        FORMAT.read(tmp_path / name)


@pytest.mark.parametrize("name", ["folder", "pipe"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PlanError, match=r"cannot be read \((a folder|no regular file)\)"):
        FORMAT.read(tmp_path / name)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (Real(above=0, below=1), 1, "above 0, below 1"),
        (Real(above=0), 0, "a finite number, above 0$"),
        (Real(low=0, below=1), 1.0, "0 or more, below 1"),
        (Real(high=3), 4, "3 or less"),
        (Real(), float("nan"), "a finite number$"),
    ],
)
def test_limits_of_numbers(kind: Real, value: float, message: str) -> None:
    with pytest.raises(Mismatch, match=message):
        check(value, kind)
    check(0.5, kind)


SEALED = Format("sealed", 1, "thing", {"n": Int(), "x": Real()}, PlanError, "again", sealed=True)


def test_a_sealed_file_is_refused_when_anything_changed() -> None:
    content = SEALED.complete({"n": 1, "x": 0.1}, [b"data"])
    assert SEALED.parse(to_json(content), "x", [b"da", b"ta"]) == content
    for changed, data in (
        ({**content, "n": 2}, b"data"),
        ({**content, "x": 0.1 + 2e-17 * 4}, b"data"),
        ({**content, "digest": "sha256:0"}, b"data"),
        (content, b"dbta"),
    ):
        with pytest.raises(PlanError, match=r"thing x is damaged.*; again"):
            SEALED.parse(to_json(changed), "x", [data])
    with pytest.raises(PlanError, match="'digest' is missing"):
        SEALED.parse(to_json({k: v for k, v in content.items() if k != "digest"}), "x", [b"data"])


@pytest.mark.parametrize(
    "content", [{"n": -1, "x": 1}, {"n": 1}, {"n": 1, "x": float("inf")}, {"n": 1, "x": {2}}]
)
def test_what_could_not_be_read_is_not_written(content: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="thing"):
        SEALED.complete(content)


def test_halves_of_surrogate_pairs_are_written_as_question_marks() -> None:
    assert to_json({"a\udcff": "\ud800", "b": "ä"}) == '{"a?": "?", "b": "ä"}'
