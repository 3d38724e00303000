"""Tests of one environment run only there: `make test-interop` names it in REAP_INTEROP.

`environments/NAME.txt` says what is installed, and `NAME/` holds its tests. These runs do not load
`tests/conftest.py`, which needs what only the project's own environment has.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# As in tests/conftest.py: the same numbers on every machine, and no test reads the hub.
os.environ.setdefault("REAP_CPU_DTYPE", "float32")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# Assertions in helpers that tests import count as those in the tests themselves do.
pytest.register_assert_rewrite("tests.interop")
# The default run collects none of them: their packages are not there.
collect_ignore_glob = [] if os.environ.get("REAP_INTEROP") else ["*"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
