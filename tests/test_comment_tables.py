"""Tables of arrays in the comments of csrc/ have columns, which formatting does not touch."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

CSRC = Path(__file__).parent.parent / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".cu", ".cuh", ".cpp", ".h"))
COLUMNS = 100
# Text after two spaces or more that follow other text: a cell of a table.
CELL = re.compile(r"(?<=\S)\s{2,}(?=\S)")

TABLE = """\
// Arrays, with S slots:
//
//   y        [S, H]        outputs before the router weight, by sorted row, by slot without index
//   gates    [S]           router weights, by slot
//   inverse  [S] int64     sorted row of each slot
int slots;
"""
# What clang-format made of such a table while it reflowed comments.
REFLOWED = """\
// Arrays, with S slots:
//
//   y        [S, H]        outputs before the router weight, by sorted row, or by slot without
//   index gates    [S]           router weights, by slot inverse  [S] int64     sorted row
//   of each slot
int slots;
"""


def crooked(text: str) -> list[str]:
    """Rows of tables whose last cell begins in no column of the rows before."""
    found: list[str] = []
    columns: set[int] = set()
    for line in text.splitlines():
        if not line.startswith("//   "):
            columns = set()
            continue
        cells = [cell.end() for cell in CELL.finditer(line)]
        if cells and columns and cells[-1] not in columns:
            found.append(line)
        columns.update(cells)
    return found


def test_a_reflowed_table_is_seen() -> None:
    assert crooked(TABLE) == []
    assert len(crooked(REFLOWED)) == 1


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_tables_have_columns_and_lines_end(path: Path) -> None:
    text = path.read_text()
    assert crooked(text) == []
    # The formatter breaks no comment, so nothing else holds this limit.
    assert [line for line in text.splitlines() if len(line) > COLUMNS] == []


def test_formatting_leaves_a_table_as_it_is(tmp_path: Path) -> None:
    formatter = shutil.which("clang-format", path=str(Path(sys.executable).parent))
    if formatter is None:
        pytest.skip("clang-format comes with the extra `lint`, which is not installed here")

    settings = yaml.safe_load((CSRC.parent / ".clang-format").read_text())
    narrow = {**settings, "ColumnLimit": 80}

    def formatted(style: dict[str, object]) -> str:
        command = [formatter, f"--style={json.dumps(style)}", "--assume-filename=table.cu"]
        done = subprocess.run(command, input=TABLE, capture_output=True, text=True, check=True)
        return done.stdout

    assert formatted(narrow) == TABLE
    assert formatted({**narrow, "ReflowComments": True}) != TABLE
