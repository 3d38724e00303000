"""A model that vLLM runs with transformers' code is observed and masked as any other."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.driver.published.reduce import VOCAB
from tests.interop.vllm.checks import TOKENS, check_mask, check_statistics
from tests.interop.vllm.models import write_model
from tests.interop.vllm.server import Server, serve
from tests.interop.vllm.traffic import complete_all, prompts

TEXTS = prompts(4, 60, vocabulary=VOCAB)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small FlexOlmo."""
    return write_model("external", tmp_path_factory.mktemp("external") / "model")


@pytest.fixture(scope="module")
def server(metadata: Path, model: Path) -> Iterator[Server]:
    """The model, uncompiled."""
    with serve(model, metadata, "--enforce-eager") as running:
        yield running


def test_masked_is_the_pruned_checkpoint(server: Server, model: Path, tmp_path: Path) -> None:
    assert any("Using Transformers modeling backend" in line for line in server.lines)
    before = complete_all(server, TEXTS, tokens=TOKENS)
    check_statistics(server, model, before, "replace", tmp_path)
    check_mask(server, model, before, tmp_path)
