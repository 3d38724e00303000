"""The table of engines in docs/support.md is of the versions and models that are tested now."""

from tests.interop.engines import table
from tests.interop.engines.models import BOUND, PUBLISHED


def test_the_table_is_of_what_is_tested_now() -> None:
    """`make test-engines`, which measures, is not part of the default run."""
    text = table.PAGE.read_text(encoding="utf-8").split(table.BEGIN)[1].split(table.END)[0]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
    ]
    again = "run: make test-engines && python -m tests.interop.engines.table"
    assert head == table.heads(), again
    assert [(row[0], row[1]) for row in rows] == list(PUBLISHED.items()), again
    for row in rows:
        for cell in row[3:]:
            whole, _, pruned, _ = cell.replace(",", "").split()
            assert max(float(whole), float(pruned)) < BOUND, again


def test_the_page_states_the_bound() -> None:
    assert BOUND == 2e-5
    assert "less than 2e-5" in table.PAGE.read_text(encoding="utf-8")
