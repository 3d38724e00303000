"""Two ranks that each have a part of every expert: norms are of whole rows, and count once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from reap_driver.demo.run import MODEL
from tests.interop.vllm.checks import TOKENS, check_mask, check_statistics
from tests.interop.vllm.server import Server, serve
from tests.interop.vllm.traffic import Completion, complete_all, prompts


@pytest.fixture(scope="module")
def server(metadata: Path) -> Iterator[Server]:
    """The demo's model, uncompiled, on two ranks."""
    with serve(MODEL, metadata, "--enforce-eager", "--tensor-parallel-size", "2") as running:
        yield running


@pytest.fixture(scope="module")
def before(server: Server) -> list[Completion]:
    """Completions before anything is observed."""
    return complete_all(server, prompts(4, 60, vocabulary=2048), tokens=TOKENS)


@pytest.mark.parametrize("mode", ["shadow", "replace"])
def test_sums_are_those_of_whole_experts(
    mode: str, server: Server, before: list[Completion], tmp_path: Path
) -> None:
    check_statistics(server, MODEL, before, mode, tmp_path)


def test_masked_is_the_pruned_checkpoint(
    server: Server, before: list[Completion], tmp_path: Path
) -> None:
    check_mask(server, MODEL, before, tmp_path)
