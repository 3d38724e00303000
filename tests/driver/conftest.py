"""What driver tests share: the support matrix, and the checkpoints of published models.

Support matrix: what each test run proved about each architecture, one JSON line a fact.

Set REAP_SUPPORT_MATRIX to a file and run the tests; each line is
`{"architecture", "column", "outcome", "transformers"}`. Appending lines is safe across workers.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from tests.driver.published.checkpoint import write_checkpoint


@pytest.fixture
def support() -> Callable[[str, str, str], None]:
    """`support(architecture, column, outcome)`, called when a check has passed."""
    path = os.environ.get("REAP_SUPPORT_MATRIX")

    def record(architecture: str, column: str, outcome: str) -> None:
        if path is None:
            return
        fact = {"architecture": architecture, "column": column, "outcome": outcome}
        line = json.dumps({**fact, "transformers": transformers.__version__})
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    return record


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a published model's small checkpoint, by name; never changed."""
    root = tmp_path_factory.mktemp("published")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else write_checkpoint(name, path)

    return folder
