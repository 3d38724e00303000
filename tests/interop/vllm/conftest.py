"""Fixtures of vLLM's tests; those that fail show the end of the server's log."""

from collections.abc import Generator
from pathlib import Path

import pytest

from tests.interop.engines.fixtures import compare, pairs  # noqa: F401
from tests.interop.vllm.installed import write_metadata
from tests.interop.vllm.server import Server


@pytest.fixture(scope="session")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH by which vLLM finds the plugins."""
    return write_metadata(tmp_path_factory.mktemp("metadata"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the end of the log of each server of the test to the report of a failure."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, Server):
                report.sections.append(("vLLM's log", value.tail()))
    return report
