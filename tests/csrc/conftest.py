"""The emulation, compiled once for all programs that are linked to it."""

from pathlib import Path

import pytest

from tests.csrc.programs import compile_emulation


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return compile_emulation(tmp_path_factory.mktemp("emulation"))
