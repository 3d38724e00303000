"""The table of engines in docs/support.md is of the versions and models that are tested now."""

from tests.interop.engines import table
from tests.interop.engines.models import BOUND
from tests.interop.engines.sources import SOURCES


def test_the_table_is_of_what_is_tested_now() -> None:
    """`make test-engines`, which measures, is not part of the default run."""
    text = table.PAGE.read_text(encoding="utf-8").split(table.BEGIN)[1].split(table.END)[0]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
    ]
    again = "run: make test-engines && python -m tests.interop.engines.table"
    assert head == table.heads(), again
    assert [(row[0], row[1]) for row in rows] == [
        (architecture, source.model) for architecture, source in SOURCES.items()
    ], again
    for row in rows:
        for cell in row[3:]:
            if cell.startswith("refused: "):
                continue
            whole, _, pruned, _ = cell.partition(";")[0].replace(",", "").split()
            assert max(float(whole), float(pruned)) < BOUND, again


def test_the_page_states_the_bound() -> None:
    assert BOUND == 2e-5
    assert "less than 2e-5" in table.PAGE.read_text(encoding="utf-8")


def test_the_matrix_of_architectures_says_the_same() -> None:
    page = table.PAGE.read_text(encoding="utf-8")
    assert table.in_matrix(page) == page, "run: python -m tests.interop.engines.table"
    assert "| qwen3_moe | " + "pass | " * 8 + "llama.cpp, MLX, vLLM |" in page
    assert "| flex_olmo | " + "pass | " * 8 + "vLLM |" in page
    assert "| afmoe | " + "pass | " * 8 + "- |" in page
