"""Support matrix: what each test run proved about each architecture, one JSON line a fact.

Set REAP_SUPPORT_MATRIX to a file and run the tests; each line is
`{"architecture", "column", "outcome", "transformers"}`. Appending lines is safe across workers.
"""

import json
import os
from collections.abc import Callable

import pytest
import transformers


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
