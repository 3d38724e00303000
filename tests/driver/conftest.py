"""What driver tests share: the support matrix, and checkpoints that are made once.

Support matrix: what each test run proved about each architecture, one JSON line a fact.

Set REAP_SUPPORT_MATRIX to a file and run the tests; each line is
`{"architecture", "column", "outcome", "transformers"}`. Appending lines is safe across workers.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import transformers
from filelock import FileLock

from reap_driver.compat.library_faults import fault
from reap_driver.compat.pretrained import read_model
from reap_driver.planning.plan import Plan
from reap_driver.writer.apply import apply_plan
from tests.driver.published.checkpoint import write_checkpoint
from tests.driver.published.reduce import small_config
from tests.driver.writer import saved


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


Shared = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """`shared(name, make)`: a path that `make` fills once, for all tests of all workers, which
    never change it.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)

    def once(name: str, make: Callable[[Path], object]) -> Path:
        path, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(path, ignore_errors=True)
                make(path)
                done.touch()
        return path

    return once


@pytest.fixture(scope="session")
def checkpoint(shared: Shared) -> Callable[[str], Path]:
    """The folder of a published model's small checkpoint, by name; never changed. Where the
    installed library cannot run the model, which is refused then, the test is skipped.
    """

    def folder(name: str) -> Path:
        why = fault(small_config(name)["architectures"][0])
        if why is not None:
            pytest.skip(f"transformers {transformers.__version__} cannot run it: {why}")
        return shared(f"published-{name}", partial(write_checkpoint, name))

    return folder


@pytest.fixture(scope="session")
def original(shared: Shared) -> Callable[[str], Path]:
    """The checkpoint of `zoo.tiny(name)`, unsharded; never changed."""
    return lambda name: shared(f"original-{name}", partial(saved.save, name))


@dataclass(frozen=True)
class Pruned:
    """A pruned checkpoint, what it was, and the plan between them; never changed."""

    full: Path
    plan: Plan
    out: Path


@pytest.fixture(scope="session")
def non_uniform(shared: Shared, original: Callable[[str], Path]) -> Callable[[str], Pruned]:
    """An architecture whose layers keep different numbers of experts."""

    def make(name: str, folder: Path) -> None:
        full = original(name)
        plan = saved.make_plan(full, read_model(full)[1], saved.differing())
        folder.mkdir()
        plan.save(folder / "plan.json")
        apply_plan(full, plan, folder / "out", non_uniform=True)

    def pruned(name: str) -> Pruned:
        folder = shared(f"non-uniform-{name}", partial(make, name))
        return Pruned(original(name), Plan.load(folder / "plan.json"), folder / "out")

    return pruned
