"""YAML as JSON values: what is read, and that alias bombs and other types are refused at once."""

import pytest

from reap_driver.base.yaml_text import MAX_BYTES, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1\nb: [x, 2.5, null, true]", {"a": 1, "b": ["x", 2.5, None, True]}),
        ("3: 0.5", {"3": 0.5}),
        ("date: 2024-13-01", {"date": "2024-13-01"}),
        ("date: 2024-12-01T10:00:00Z", {"date": "2024-12-01T10:00:00Z"}),
        ('{"a": {"b": [1]}}', {"a": {"b": [1]}}),
        (b"\xef\xbb\xbfa: 1", {"a": 1}),
        ("", None),
    ],
    ids=repr,
)
def test_read(text: str | bytes, value: object) -> None:
    assert parse_yaml(text) == value


BILLION = "a0: &a0 x\n" + "\n".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 11)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BILLION, "anchor or alias 'a0' in line 1"),
        ("a: &a [*a]", "anchor or alias 'a'"),
        ("a: *b", "anchor or alias 'b'"),
        ("a: 1\na: 2", "name 'a' twice"),
        ("1: 1\n'1': 2", "name '1' twice"),
        ("? [1, 2]\n: 3", "names are texts"),
        ("? {a: 1}\n: 3", "names are texts"),
        ("1.5: 3", "names are texts"),
        ("on: 3", "names are texts"),
        ("a: .nan", "nan"),
        ("a: .inf", "inf"),
        ("a: " + "9" * 30, "64 bits"),
        ("a: " + "9" * 5000, "digits"),
        ("a: !!python/object:os.system x", "not YAML"),
        ("a: !!binary aGk=", "not YAML"),
        ("a: !!timestamp 2024-13-01", "not YAML"),
        ("[" * 100 + "]" * 100, "deep"),
        ("[" * 20_000, "deep"),
        ("a: [1", "not YAML"),
        ('a: "\\ud800"', "surrogate"),
        (b"\xff", "not UTF-8"),
        ("a" * (MAX_BYTES + 1), "larger than"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_yaml(text)
