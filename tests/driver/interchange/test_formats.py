"""The table of formats says what their modules do."""

import ast
from pathlib import Path

import pytest

import reap_driver.interchange
from reap_driver.interchange.formats import FORMATS, OWN

FOLDER = Path(reap_driver.interchange.__file__).parent
# Of the package, but no format.
OTHERS = {"__init__", "content", "formats", "json_files", "known"}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_as_the_table_says(name: str) -> None:
    one = FORMATS[name]
    code = one.code()
    assert (one.name, name in OWN) == (name, False)
    assert (hasattr(code, "read"), hasattr(code, "write")) == (one.reads, one.writes)
    assert one.reads or one.writes
    assert set(one.needs) <= {*one.options, "model"}
    assert one.holds == one.made_from or not one.reads
    assert code.WHAT in one.what or one.what.startswith(code.WHAT)


def test_every_module_is_a_format_of_the_table() -> None:
    modules = {path.stem for path in FOLDER.glob("*.py")} - OTHERS
    assert modules == {one.module for one in FORMATS.values()}


def test_no_two_formats_are_known_by_the_same() -> None:
    keys = [one.keys for one in FORMATS.values() if one.keys]
    for first in keys:
        assert sum(first <= other for other in keys) == 1, first
    for one in FORMATS.values():
        assert one.reads or not one.keys


def test_the_table_imports_no_torch() -> None:
    tree = ast.parse((FOLDER / "formats.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"collections.abc", "dataclasses", "importlib", "types", "typing"}
