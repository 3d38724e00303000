"""A masked model routes as the pruned one does, and is itself again afterwards."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import reap_driver as rd
from reap_driver.writer.apply import apply_plan
from reap_kernels import SaliencyStats
from reap_kernels.errors import PlanError, ReapError, UnsupportedModel
from tests.driver import zoo
from tests.driver.writer import saved, test_remote
from tests.driver.writer.test_truth import load

# Plain; groups and selection biases; biased products; tables of ids; the router called by the
# block; experts that are no experts behind the router's rows; a router of several layers; scales.
NAMES = [
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
    "deepseek_v4",
    "llama4",
    "longcat_flash",
    "zaya",
    "gemma4",
]
FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"


def observed(model: PreTrainedModel, inputs: dict[str, Tensor]) -> SaliencyStats:
    with rd.observe(model) as obs:
        obs(**inputs)
    return obs.stats


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_observing_masked_is_observing_pruned(name: str, tmp_path: Path) -> None:
    saved.save(name, tmp_path / "full")
    full = load(tmp_path / "full").double()
    plan = saved.make_plan(tmp_path / "full", full)
    apply_plan(tmp_path / "full", plan, tmp_path / "pruned")
    inputs = zoo.tiny_inputs(name, full.config)

    with rd.masked_experts(full, plan.kept):
        masked = observed(full, inputs)
    pruned = observed(load(tmp_path / "pruned").double(), inputs)

    assert masked.layers.keys() == pruned.layers.keys() == plan.layers.keys()
    for layer, stats in masked.layers.items():
        kept, removed = (list(getattr(plan.layers[layer], what)) for what in ("kept", "removed"))
        assert not stats.counts[..., removed].any()
        assert torch.equal(stats.counts[..., kept], pruned.layers[layer].counts)
        torch.testing.assert_close(
            stats.sums[..., kept], pruned.layers[layer].sums, rtol=1e-6, atol=0
        )


@contextlib.contextmanager
def smaller_router(block: Any, kept: list[int]) -> Any:
    """The router of a model with the kept experts alone, its ids translated: the oracle."""
    gate, weight = block.gate, block.gate.weight
    gate.weight = nn.Parameter(weight.detach()[kept])
    ids = torch.tensor(kept)
    handle = gate.register_forward_hook(lambda _m, _i, out: (*out[:2], ids[out[2]]))
    try:
        yield
    finally:
        handle.remove()
        gate.weight = weight


def test_layers_may_keep_different_numbers_or_all() -> None:
    config, model = zoo.tiny("qwen3_moe", num_hidden_layers=3)
    inputs = zoo.tiny_inputs("qwen3_moe", config)
    kept = {FIRST: [6, 0, 3], SECOND: [1, 2, 3, 4, 7]}  # ids in any order
    with rd.masked_experts(model, kept):
        stats, (logits,) = observed(model, inputs), forwards(model, inputs)
    layers = model.model.layers
    with smaller_router(layers[0].mlp, [6, 0, 3]), smaller_router(layers[1].mlp, kept[SECOND]):
        truth, (expected,) = observed(model, inputs), forwards(model, inputs)
    torch.testing.assert_close(logits, expected, rtol=2e-5, atol=2e-5)
    for name, layer in stats.layers.items():
        assert torch.equal(layer.counts, truth.layers[name].counts)
        torch.testing.assert_close(layer.sums, truth.layers[name].sums, rtol=2e-5, atol=0)
    used = [set(layer.count.sum(0).nonzero().flatten().tolist()) for layer in stats.layers.values()]
    assert used[0] == {0, 3, 6}
    assert used[1] <= set(kept[SECOND])
    assert len(used[2]) > 5  # not named, so not masked


def test_code_of_a_checkpoint_and_a_second_stack(tmp_path: Path) -> None:
    """One module an expert, and a tower that counts as many experts in a field of its own."""
    model = test_remote.save(tmp_path, tower={"num_experts": 8})
    inputs = {"input_ids": torch.arange(3, 40)[None]}
    with rd.masked_experts(model, test_remote.KEPT) as mask, rd.observe(model) as obs:
        (masked,) = forwards(model, inputs)
    assert len(mask.removed) == 2
    for name, kept in test_remote.KEPT.items():
        rows = torch.tensor(sorted(set(range(8)) - set(kept)))
        assert not obs.stats.layers[name].count[:, rows].any()
        gate = model.get_submodule(name.replace("experts", "gate"))
        gate.register_forward_hook(lambda _m, _i, out, rows=rows: out.index_fill(1, rows, -1e9))
    torch.testing.assert_close(masked, forwards(model, inputs)[0], rtol=2e-5, atol=2e-5)


def forwards(model: PreTrainedModel, *batches: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(**batch).logits for batch in batches]


def test_masks_nest_and_lie_in_an_observation() -> None:
    config, model = zoo.tiny("qwen3_moe")
    inputs = zoo.tiny_inputs("qwen3_moe", config)
    first, second = {FIRST: [0, 1, 2, 3]}, {SECOND: [4, 5, 6]}
    with rd.masked_experts(model, {**first, **second}):
        together = observed(model, inputs)
    with (
        rd.masked_experts(model, first),
        rd.observe(model) as obs,
        rd.masked_experts(model, second),
    ):
        obs(**inputs)
    for name, layer in obs.stats.layers.items():
        assert torch.equal(layer.counts, together.layers[name].counts)
        assert torch.equal(layer.sums, together.layers[name].sums)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "gpt_oss", "minimax_m2"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Routers cast their weight to float32 at every call, and float16 holds no -1e9."""
    config, model = zoo.tiny(name, dtype=dtype)
    kept = {la.name: [0, 1, 2, 4, 5, 6] for la in rd.find_moe_layers(model)}
    with rd.masked_experts(model, kept) as mask:
        stats = observed(model, zoo.tiny_inputs(name, config))
    assert len(mask.removed) == len(kept)
    assert not mask.unused
    for layer in stats.layers.values():
        assert not layer.count[:, [3, 7]].any()
        assert layer.count[:, [0, 1, 2, 4, 5, 6]].any()


class _Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [None, _Stop, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v4", "ernie4_5_moe"])
def test_the_model_is_itself_again(name: str, stop: type[BaseException] | None) -> None:
    config, model = zoo.tiny(name)
    inputs = zoo.tiny_inputs(name, config)
    state, before, hooked = bits(model), forwards(model, inputs)[0], hooks(model)
    kept = {la.name: [0, 1, 4, 5] for la in rd.find_moe_layers(model)}
    with contextlib.suppress(stop or ()), rd.masked_experts(model, kept):
        assert not torch.equal(forwards(model, inputs)[0], before)
        if stop is not None:
            raise stop
    assert hooks(model) == hooked
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    assert torch.equal(forwards(model, inputs)[0], before)


def test_keeping_all_changes_nothing() -> None:
    config, model = zoo.tiny("deepseek_v3")
    inputs = zoo.tiny_inputs("deepseek_v3", config)
    with rd.masked_experts(model, {la.name: range(8) for la in rd.find_moe_layers(model)}) as mask:
        masked = forwards(model, inputs)
    assert not mask.removed
    assert torch.equal(masked[0], forwards(model, inputs)[0])


@pytest.mark.parametrize(
    ("name", "layer", "ids", "says"),
    [
        ("qwen3_moe", "model.layers.9.mlp.experts", [0, 1, 2], "'model.layers.9.mlp.experts' is"),
        ("qwen3_moe", FIRST, [0, 1, 8], r"expert 8, outside \[0, 8\)"),
        ("qwen3_moe", FIRST, [-1, 0, 1], r"expert -1, outside \[0, 8\)"),
        ("qwen3_moe", FIRST, [0, 1, 2, 1], "expert 1 twice; name each once"),
        ("qwen3_moe", FIRST, [5, 6], "keeps 2 experts, but a token is routed to 3; keep at least"),
        ("deepseek_v3", SECOND, [0, 1, 2, 4], "'model.layers.1.mlp.experts' keeps .*must be equal"),
    ],
)
def test_what_cannot_be_kept(name: str, layer: str, ids: list[int], says: str) -> None:
    _, model = zoo.tiny(name)
    state = bits(model)
    with pytest.raises(PlanError, match=says), rd.masked_experts(model, {layer: ids}):
        pytest.fail("entered")
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def _no_router(model: Any) -> None:
    model.model.layers[0].mlp.gate = nn.Identity()


def _offloaded(model: Any) -> None:
    model.model.layers[0].mlp.gate.to("meta")


def _unknown_integers(model: Any) -> None:
    model.model.layers[0].mlp.register_buffer("order", torch.arange(8))


def _other_count(model: Any) -> None:
    model.config.num_experts = 7


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_no_router, f"{FIRST}.*router"),
        (_offloaded, "gate.weight: is offloaded"),
        (_unknown_integers, "mlp.order: .* integers .* may hold expert ids"),
        (_other_count, f"no field of its configuration is 8.*{FIRST}"),
    ],
)
def test_models_that_cannot_be_masked(spoil: Callable[[Any], None], says: str) -> None:
    _, model = zoo.tiny("qwen3_moe")
    spoil(model)
    kept = {FIRST: [0, 1, 2]}
    with pytest.raises(ReapError, match=says) as caught, rd.masked_experts(model, kept):
        pytest.fail("entered")
    assert isinstance(caught.value, UnsupportedModel)


def test_a_router_without_a_product_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight used in a way the mask cannot see: the first forward says so, and no result is
    given."""
    config, model = zoo.tiny("qwen3_moe")
    inputs = zoo.tiny_inputs("qwen3_moe", config)
    gate = model.model.layers[1].mlp.gate
    before, hooked = forwards(model, inputs)[0], hooks(model)

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = (hidden[:, None] * gate.weight).sum(-1)
        values, ids = logits.softmax(-1).topk(3)
        return logits, values / values.sum(-1, keepdim=True), ids

    monkeypatch.setattr(gate, "forward", forward)
    kept = {FIRST: [0, 1, 2], SECOND: [0, 1, 2]}
    with rd.masked_experts(model, kept) as mask:
        with pytest.raises(UnsupportedModel, match=r"layers.1.*product with its router .*layers.1"):
            model(**inputs)
        assert mask.unused == {"model.layers.1.mlp.gate.weight"}
    monkeypatch.undo()
    assert hooks(model) == hooked
    assert torch.equal(forwards(model, inputs)[0], before)
