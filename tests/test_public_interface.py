"""Public names and file formats are those that are recorded; readers refuse other versions."""

import copy
import json
from typing import Any

import pytest

from docs.generate import fields
from reap_kernels.documents import Format
from tests import public_interface
from tests.public_interface import lacking, misread, needed

FORMATS = fields.formats()
ANEW = "decide what RELEASE.md says of this change, then run: python -m tests.public_interface"


def test_names_and_formats_are_those_recorded() -> None:
    old, new = public_interface.recorded(), public_interface.current()
    for part in ("reap_kernels", "formats"):
        for name in {*old[part], *new[part]}:
            assert new[part].get(name) == old[part].get(name), f"{name} changed; {ANEW}"
    assert old["version"] == new["version"], ANEW


def test_no_format_changed_under_its_version() -> None:
    assert misread(public_interface.recorded(), public_interface.current()) == []


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("newer", [1, 7])
def test_a_newer_file_is_refused_with_what_to_do(form: Format, newer: int) -> None:
    text = f'{{"format": "{form.name}", "version": {form.version + newer}}}'
    with pytest.raises(form.error) as caught:
        form.parse(text, "FILE")
    known = f"has version {form.version + newer}, this reap-kernels reads {form.version}"
    said = f"{form.what} FILE {known}; update reap-kernels, or {form.remedy}"
    assert str(caught.value) == said


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("version", ["0", '"1"', "true", "null", "1.0"])
def test_what_is_no_newer_version_is_made_again(form: Format, version: str) -> None:
    with pytest.raises(form.error, match="this reap-kernels reads") as caught:
        form.parse(f'{{"format": "{form.name}", "version": {version}}}', "FILE")
    assert str(caught.value).endswith(f"reads {form.version}; {form.remedy}")


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_file_names_its_format(form: Format) -> None:
    with pytest.raises(form.error, match="its format is not"):
        form.parse(f'{{"format": "other", "version": {form.version}}}', "FILE")
    assert [other for other in FORMATS.values() if other.name == form.name] == [form]


def test_a_field_of_a_newer_version_is_refused_by_its_name() -> None:
    form = FORMATS["reap_kernels.tuning.FORMAT"]
    kept = form.complete({"arch": "sm90", "origin": "a test", "entries": []})
    assert form.parse(json.dumps(kept), "FILE") == kept
    with pytest.raises(form.error, match=r"'speed' is unknown.*; update reap-kernels if a newer"):
        form.parse(json.dumps({**kept, "speed": 1}), "FILE")


LATE = ["*, c: int = 2", "-> int"]
OLD: dict[str, Any] = {
    "version": "1.2.0",
    "reap_kernels": {"f": ["a: int", "b: int = 1", *LATE]},
    "formats": {"plan": {"version": 1, "fields": ["| `kept` | MUST | list |"]}},
}


def changed(path: tuple[str, ...], value: object) -> dict[str, Any]:
    new = inner = copy.deepcopy(OLD)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return new


@pytest.mark.parametrize(
    ("path", "value", "kind"),
    [
        (("version",), "1.2.0", ""),
        (("reap_kernels", "g"), ["a: int"], "minor"),
        (("reap_kernels", "f"), [*OLD["reap_kernels"]["f"], "*, d: int = 3"], "minor"),
        (("reap_kernels", "f"), ["a: int", "b: int = 1", "d: int = 0", "-> int"], "major"),
        (("reap_kernels", "f"), ["a: int", "b: int = 1", "d: x = 0", *LATE], "minor"),
        (("reap_kernels", "f"), ["a: int", "b: int = 1", "d: x", *LATE], "major"),
        (("reap_kernels", "f"), ["a: int", "b: int = 1", "*, c: int = 2", "-> str"], "major"),
        (("reap_kernels", "f"), ["a: int", "b: int = 2", "*, c: int = 2", "-> int"], "major"),
        (("reap_kernels", "f"), ["a: int", "*, c: int = 2", "-> int"], "major"),
        (("reap_kernels", "f"), ["d: int = 0", *OLD["reap_kernels"]["f"]], "major"),
        (("reap_kernels", "f"), [*OLD["reap_kernels"]["f"], "*, d: int"], "major"),
        (("reap_kernels",), {}, "major"),
        (("formats", "masks"), {"version": 1, "fields": []}, "minor"),
        (("formats", "plan", "version"), 2, "major"),
        (("formats",), {}, "major"),
        (("formats", "plan", "fields"), ["| `kept` | MUST | list |", "| `n` | MAY | x |"], "minor"),
    ],
)
def test_a_change_needs_the_number_that_it_is_worth(path, value, kind) -> None:
    assert needed(OLD, changed(path, value)) == kind


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (["| `kept` | MUST | list |", "| `n` | MAY | x |"], []),
        (["| `kept` | MUST | list |", "| `n` | MAY | x |", "| `n.a` | MUST | x |"], []),
        (["| `kept` | MUST | list |", "| `n` | MUST | x |"], ["plan"]),
        (["| `kept` | MAY | list |"], ["plan"]),
        ([], ["plan"]),
    ],
)
def test_a_field_that_old_files_lack_needs_another_version_of_the_format(rows, names) -> None:
    new = changed(("formats", "plan", "fields"), rows)
    assert misread(OLD, new) == names
    new["formats"]["plan"]["version"] = 2
    assert misread(OLD, new) == []


@pytest.mark.parametrize(
    ("was", "now", "path", "words"),
    [
        ("1.2.0", "1.2.0", ("reap_kernels", "g"), "set the version to 1.3.0 or more"),
        ("1.2.0", "1.3.0", ("reap_kernels", "g"), ""),
        ("1.2.0", "1.9.0", ("reap_kernels",), "set the version to 2.0.0 or more"),
        ("1.2.0", "2.0.0", ("reap_kernels",), ""),
        ("0.2.0", "0.2.1", ("reap_kernels",), "set the version to 0.3.0 or more"),
        ("0.2.0", "0.3.0", ("reap_kernels",), ""),
    ],
)
def test_what_was_released_changes_with_its_version_only(
    was, now, path, words, monkeypatch
) -> None:
    old, new = {**OLD, "version": was}, {**changed(path, {}), "version": now}
    monkeypatch.setattr(public_interface, "released", lambda version: version == was)
    assert lacking(old, new).startswith(words)
    assert bool(lacking(old, new)) == bool(words)
    monkeypatch.setattr(public_interface, "released", lambda version: False)
    assert lacking(old, new) == ""


def test_a_date_in_the_changelog_is_a_release(tmp_path, monkeypatch) -> None:
    (tmp_path / "CHANGELOG.md").write_text("## 0.2.0 (unreleased)\n\n## 0.1.0 (2027-01-31)\n")
    monkeypatch.setattr(public_interface, "ROOT", tmp_path)
    assert public_interface.released("0.1.0")
    assert not public_interface.released("0.2.0")
    assert not public_interface.released("0.0.1")
