"""Observation files, against the reference implementation's own observer and pruning step.

Run with REAP_REFERENCE naming a clone of github.com/CerebrasResearch/reap (read at commit 1970473).
What its modules import for evaluation and data, and neither step uses, is replaced by nothing.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

import reap_kernels as rk
from reap_driver.interchange import reference_observations
from reap_driver.interchange.content import ModelFacts, Source
from reap_driver.planning.planner import make_plan
from reap_driver.planning.scoring import score
from reap_kernels.errors import DataError

CLONE = os.environ.get("REAP_REFERENCE")
UNUSED = ("reap.main", "reap.args", "reap.data", "reap.cluster", "reap.eval")
EXPERTS, TOP_K, HIDDEN, TOKENS = 8, 2, 16, 200
NUMBERS = (0, 2)  # of the decoder layers with experts
NAMES = {number: f"model.layers.{number}.mlp.experts" for number in NUMBERS}
# Its pruning methods and our criteria.
METHODS = {
    "frequency": "frequency",
    "ean_sum": "ean_sum",
    "ean_mean": "ean_mean",
    "weighted_ean_sum": "weighted_ean",
    "reap": "reap",
}

pytestmark = pytest.mark.skipif(
    CLONE is None, reason="REAP_REFERENCE names no clone of github.com/CerebrasResearch/reap"
)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the pruning step, imported from the clone."""
    monkeypatch.syspath_prepend(str(Path(str(CLONE)) / "src"))
    for name in UNUSED:
        monkeypatch.setitem(sys.modules, name, MagicMock())
    for name in ("reap.prune", "reap.pruning_metrics"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("reap.prune")


def facts() -> ModelFacts:
    layer = {"num_experts": EXPERTS, "top_k": TOP_K, "n_group": 1, "topk_group": 1}
    model = {"id": "some/model", "model_type": "qwen3_moe", "config_digest": "sha256:0"}
    return ModelFacts({"model": model, "layers": dict.fromkeys(NAMES.values(), layer)}, 3)


def observed_by_both() -> tuple[dict[int, dict], rk.SaliencyStats]:
    """The same batches through the reference's observer and through ours, in float32."""
    metrics = importlib.import_module("reap.pruning_metrics")
    states, layers = {}, {}
    for number, name in NAMES.items():
        draw = torch.Generator().manual_seed(number)
        state = metrics.initialize_pruning_state(EXPERTS)
        layers[name] = rk.LayerStats(EXPERTS)
        for _ in range(3):
            outputs = torch.randn(EXPERTS, TOKENS, HIDDEN, generator=draw)
            logits = 3 * torch.randn(TOKENS, EXPERTS, generator=draw)
            chosen = logits.topk(TOP_K).indices
            metrics.update_pruning_state(
                state,
                activations=outputs,
                selected_experts=chosen,
                router_logits=logits,
                num_experts=EXPERTS,
                renormalize_router_weights=True,
            )
            weights = logits.softmax(dim=1).gather(1, chosen)
            weights = weights / weights.sum(dim=1, keepdim=True)
            rows = outputs[chosen.flatten(), torch.arange(TOKENS).repeat_interleave(TOP_K)]
            rk.accumulate(rows, chosen.flatten(), weights.flatten(), layers[name])
            layers[name].add_tokens(TOKENS)
        states[number] = state
    provenance = {**facts().record, "gate": "model"}
    return states, rk.SaliencyStats(layers, ["all"], provenance)


def reported(states: dict[int, dict]) -> dict[int, dict[str, torch.Tensor]]:
    """What the reference's observer saves at the end: trackers by their means."""
    return {
        number: {key: getattr(value, "mean", value) if not torch.is_tensor(value) else value
                 for key, value in state.items()}
        for number, state in states.items()
    }  # fmt: skip


def test_its_file_says_what_we_observe(reference: ModuleType, tmp_path: Path) -> None:
    states, ours = observed_by_both()
    torch.save(reported(states), tmp_path / "o.pt")
    found = reference_observations.read(tmp_path / "o.pt", facts())
    for name, layer in found.layers.items():
        mine = ours.layers[name]
        assert torch.equal(layer.count, mine.count)
        assert torch.equal(layer.tokens, mine.tokens)
        assert torch.equal(layer.out_max, mine.out_max)
        for field in ("norm_sum", "weighted_norm_sum", "router_weight_sum"):
            torch.testing.assert_close(
                getattr(layer, field), getattr(mine, field), rtol=1e-6, atol=0
            )


def test_ours_has_its_keys_dtypes_and_values(reference: ModuleType, tmp_path: Path) -> None:
    states, ours = observed_by_both()
    reference_observations.write(tmp_path / "o.pt", Source(facts(), ours))
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    for number, keys in reported(states).items():
        assert set(found[number]) == set(keys)
        for key, value in keys.items():
            mine = found[number][key]
            assert (mine.dtype, mine.shape) == (value.dtype, value.shape), key
            torch.testing.assert_close(mine, value, rtol=1e-5, atol=0, msg=key)


def test_its_files_of_blocks_are_refused(reference: ModuleType, tmp_path: Path) -> None:
    states, _ = observed_by_both()
    torch.save(states, tmp_path / "block_000_metrics.pt")
    with pytest.raises(DataError, match=r"run code .*OnlineStatsTracker.* of each block"):
        reference_observations.read(tmp_path / "block_000_metrics.pt", facts())


class Qwen3MoeForCausalLM(nn.Module):
    """A model as the pruning step reads one, with experts that know their ids."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Module() for _ in range(3)]
        for number in NUMBERS:
            blocks[number].mlp = nn.Module()
            experts = nn.ModuleList(nn.Linear(1, 1) for _ in range(EXPERTS))
            for expert, module in enumerate(experts):
                module.id = expert
            blocks[number].mlp.experts = experts
            blocks[number].mlp.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(blocks)
        self.config = SimpleNamespace(num_experts=EXPERTS)

    def save_pretrained(self, folder: Path) -> None:
        """Nothing is read of it."""


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.6])
@pytest.mark.parametrize("method", METHODS)
def test_its_pruning_step_prunes_the_same_experts(
    reference: ModuleType, tmp_path: Path, method: str, ratio: float
) -> None:
    _, ours = observed_by_both()
    reference_observations.write(tmp_path / "o.pt", Source(facts(), ours))
    content = torch.load(tmp_path / "o.pt", weights_only=False)  # as it does
    arguments = SimpleNamespace(
        prune_method=method, perserve_super_experts=False, perserve_outliers=False
    )
    model = Qwen3MoeForCausalLM()
    gates = {number: model.model.layers[number].mlp.gate.weight.clone() for number in NUMBERS}
    reference.prune(content, model, arguments, int(EXPERTS * ratio), tmp_path / "pruned")
    plan = make_plan(score(ours, METHODS[method]), ratio)
    for number, name in NAMES.items():
        block, kept = model.model.layers[number].mlp, list(plan.kept[name])
        assert [module.id for module in block.experts] == kept
        assert torch.equal(block.gate.weight, gates[number][kept])
    assert model.config.num_experts == EXPERTS - int(EXPERTS * ratio)
