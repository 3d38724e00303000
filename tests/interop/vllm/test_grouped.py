"""A router with sigmoid scores, a bias, groups and a scaling factor, as of the DeepSeek family."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.driver.published.reduce import VOCAB
from tests.interop.vllm.checks import TOKENS, check_mask, check_statistics
from tests.interop.vllm.models import EXPERTS, GROUPS, write_model
from tests.interop.vllm.server import Server, serve
from tests.interop.vllm.traffic import Completion, complete_all, prompts

# Prompts are computed in parts of at most this many tokens.
PART = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint, whose first layer has no experts."""
    return write_model("grouped", tmp_path_factory.mktemp("grouped") / "model")


@pytest.fixture(scope="module")
def server(metadata: Path, model: Path) -> Iterator[Server]:
    """The model, uncompiled, with few tokens a step."""
    flags = ("--enforce-eager", "--max-num-batched-tokens", str(PART))
    with serve(model, metadata, *flags) as running:
        yield running


@pytest.fixture(scope="module")
def before(server: Server) -> list[Completion]:
    """Completions before anything is observed, some of more than one part."""
    return complete_all(server, prompts(4, 3 * PART, vocabulary=VOCAB), tokens=TOKENS)


@pytest.mark.parametrize("mode", ["shadow", "replace"])
def test_sums_have_the_scaling_factor(
    mode: str, server: Server, model: Path, before: list[Completion], tmp_path: Path
) -> None:
    check_statistics(server, model, before, mode, tmp_path)


def test_masked_is_the_pruned_checkpoint(
    server: Server, model: Path, before: list[Completion], tmp_path: Path
) -> None:
    plan = check_mask(server, model, before, tmp_path)
    size = EXPERTS // GROUPS
    for layer in plan.layers.values():
        kept = [sum(expert // size == group for expert in layer.kept) for group in range(GROUPS)]
        assert len(set(kept)) == 1


def test_a_group_too_small_to_be_ranked_is_refused(
    server: Server, before: list[Completion]
) -> None:
    size = EXPERTS // GROUPS
    one_each = [[1, expert] for expert in range(EXPERTS) if expert % size]
    whole_group = [[1, expert] for expert in range(size)]
    for pairs in (one_each, whole_group):
        body = {"version": 1, "pruned_experts": pairs}
        answer = server.request("POST", "/reap/mask", body)
        assert answer.status == 400
        assert "group" in answer.message
    assert server.ask("GET", "/reap/mask") == {"removed": {}}
    profile = {"version": 1, "pruned_experts": [[1, group * size] for group in range(GROUPS)]}
    assert server.ask("POST", "/reap/mask", profile)["mask"]["experts"] == GROUPS
    found = server.ask("GET", "/reap/profile")
    assert found["pruned_experts"] == profile["pruned_experts"]
    server.ask("DELETE", "/reap/mask")


def test_a_layer_without_experts_is_none_of_a_mask(server: Server) -> None:
    answer = server.request("POST", "/reap/mask", {"version": 1, "pruned_experts": [[0, 0]]})
    assert answer.status == 400
    assert "layer 0 has no experts" in answer.message
