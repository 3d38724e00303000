"""Checkpoints of the published models, written once a session and never changed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.driver.published.checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a published model's small checkpoint, by name."""
    root = tmp_path_factory.mktemp("published")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else write_checkpoint(name, path)

    return folder
