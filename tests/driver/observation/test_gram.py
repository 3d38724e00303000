"""Gram sums of an observation against the definition in float64, and what never changes by them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reap_driver.load.resident import load_model
from reap_driver.model.adapters import KernelAdapter
from reap_driver.model.discover import adapter_of
from reap_driver.observation.observer import Observer, observe
from reap_driver.observation.streamed import observe_streamed
from reap_kernels import LayerGram
from reap_kernels.errors import DataError, UnsupportedModel
from tests.driver import zoo
from tests.driver.observation import oracle
from tests.driver.observation import remote_blocks as remote

# Of each way of binding one; a stacked module with biases, too.
NAMES = ["qwen3_moe", "gpt_oss", "step3p7", "llama4", "dbrx"]


class _Inputs(TorchFunctionMode):
    """Keeps the first factor of the products inside whose inner dimension is `width`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.found = width, []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("linear", "matmul", "bmm", "mm", "__matmul__"):
            first = args[0]
            if first.shape[-1] == self.width and args[1].ndim >= 2:
                self.found.append(first.reshape(-1, self.width))
        return func(*args, **(kwargs or {}))


def inner(module: nn.Module, hidden: Tensor, expert: int, width: int) -> Tensor:
    """h [n, I] of rows in float64: what enters the down projection of the module's own forward."""
    with _Inputs(width) as seen:
        oracle.expert_outputs(module, hidden, expert)
    return seen.found[-1].double()


def expected(layer: Any, calls: oracle.Calls, mask: Tensor | None = None) -> dict[str, Tensor]:
    """The sums of a layer from the inputs of its module."""
    experts, width, module = layer.num_experts, layer.intermediate_size, layer.module
    gram = torch.zeros(experts, width, width, dtype=torch.float64)
    first, weight = gram.new_zeros(experts, width), gram.new_zeros(experts)
    count = torch.zeros(experts, dtype=torch.int64)
    for hidden, ids, weights in calls.inputs:
        keep = torch.ones(len(hidden), dtype=torch.bool) if mask is None else mask
        for expert in range(experts):
            token, slot = torch.where((ids == expert) & (weights != 0) & keep[:, None])
            if not len(token):
                continue
            rows, gate = hidden[token], weights[token, slot]
            if layer.adapter == "llama4":  # the router weight is in the row
                gate_up = (rows * gate.to(rows.dtype)[:, None]).double()
                gate_up = gate_up @ module.gate_up_proj[expert].detach().double()
                left, right = gate_up.chunk(2, dim=-1)
                h, gate = right * module.act_fn(left), torch.ones_like(gate)
            else:
                h = inner(module, rows, expert, width)[: len(token)]
            square = gate.double().square()
            gram[expert] += (h * square[:, None]).mT @ h
            first[expert] += square @ h
            weight[expert] += square.sum()
            count[expert] += len(token)
    return {"gram": gram.tril(), "first": first, "weight": weight, "count": count}


def assert_matches(sums: LayerGram, truth: dict[str, Tensor]) -> None:
    assert torch.equal(sums.count, truth["count"])
    for name in ("gram", "first", "weight"):
        found = getattr(sums, name).double()
        found = found.tril() if name == "gram" else found
        scale = truth[name].abs().amax()
        assert float((found - truth[name]).abs().amax()) <= 2e-6 * float(scale), name


@torch.no_grad()
def observed(model: Any, batches: list[dict[str, Tensor]], **options: Any) -> tuple[Observer, Any]:
    with observe(model, **options) as obs:
        outputs = [obs(**batch, use_cache=False).logits for batch in batches]
    return obs, outputs


@pytest.mark.parametrize("name", NAMES)
def test_sums_are_the_definition_and_change_nothing(name: str) -> None:
    """And outputs and statistics have the bits that they have without."""
    config, model = zoo.tiny(name)
    batches = [zoo.tiny_inputs(name, config, seq=seq) for seq in (40, 12)]
    plain, outputs = observed(model, batches)
    assert plain.grams == {}
    names = [layer.name for layer in plain.layers]
    with oracle.recorded(model, names) as calls:
        summed, again = observed(model, batches, gram=True)
    assert all(map(torch.equal, outputs, again))
    assert list(summed.grams) == list(summed.stats.layers)
    for layer in summed.layers:
        mine, other = (o.stats.layers[layer.name].packed() for o in (plain, summed))
        assert all(map(torch.equal, mine, other))
        assert_matches(summed.grams[layer.name], expected(layer, calls[layer.name]))


def test_masked_tokens_add_nothing() -> None:
    config, model = zoo.tiny("qwen3_moe")
    batch = zoo.tiny_inputs("qwen3_moe", config, batch=2, seq=20)
    mask = torch.arange(40).reshape(2, 20) % 3 != 0
    with oracle.recorded(model, ["model.layers.0.mlp.experts"]) as calls:
        obs, _ = observed(model, [{**batch, "token_mask": mask}], gram=True)
    layer = obs.layers[0]
    assert_matches(obs.grams[layer.name], expected(layer, calls[layer.name], mask.flatten()))
    assert int(obs.grams[layer.name].count.sum()) == int(mask.sum()) * layer.top_k


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_streamed_sums_have_the_bits_of_resident_ones(name, original) -> None:
    """And a layer is given once, with its own weights and statistics."""
    config, _ = zoo.tiny(name)
    batches = [zoo.tiny_inputs(name, config, seq=seq) for seq in (24, 16)]
    model = load_model(original(name))
    resident, _ = observed(model, batches, gram=True)
    given: dict[str, LayerGram] = {}

    def sink(layer: str, stats: Any, sums: LayerGram, weights: Any) -> None:
        assert layer not in given
        assert torch.equal(stats.count, resident.stats.layers[layer].count)
        found = next(la for la in resident.layers if la.name == layer)
        adapter = adapter_of(found)
        assert isinstance(adapter, KernelAdapter)
        own = adapter.weights(found.module, adapter.activation(found.module))
        assert torch.equal(weights.down[1], own.down[1])
        given[layer] = sums

    stats = observe_streamed(original(name), batches, gram=sink)
    assert list(given) == list(resident.grams) == list(stats.layers)
    for layer, sums in given.items():
        expected_sums = resident.grams[layer]
        assert torch.equal(sums.gram.tril(), expected_sums.gram.tril())
        assert all(map(torch.equal, sums.packed()[1:], expected_sums.packed()[1:]))


def _failing(model: Any, layer: Any) -> Any:
    def fail(*_: Any) -> None:
        raise RuntimeError("made to fail")

    return layer.module.register_forward_hook(fail)


def test_after_a_failed_forward_the_sums_are_refused() -> None:
    """Statistics are as before; the sums have a part of the forward, so they are not given."""
    config, model = zoo.tiny("qwen3_moe")
    batch = zoo.tiny_inputs("qwen3_moe", config)
    with observe(model, gram=True) as obs:
        obs(**batch)
        counted = obs.stats.layers["model.layers.0.mlp.experts"].count
        handle = _failing(model, obs.layers[-1])
        with pytest.raises(RuntimeError, match="made to fail"):
            obs(**batch)
        handle.remove()
        assert torch.equal(obs.stats.layers["model.layers.0.mlp.experts"].count, counted)
        with pytest.raises(DataError, match=r"layers.0.mlp.experts: a forward failed after it had"):
            _ = obs.grams
        with pytest.raises(DataError, match="observe anew, or without Gram matrices"):
            obs(**batch)


def test_a_first_forward_that_fails_leaves_nothing() -> None:
    config, model = zoo.tiny("qwen3_moe")
    batch = zoo.tiny_inputs("qwen3_moe", config)
    once, _ = observed(model, [batch], gram=True)
    with observe(model, gram=True) as obs:
        handle = _failing(model, obs.layers[-1])
        with pytest.raises(RuntimeError, match="made to fail"):
            obs(**batch)
        handle.remove()
        assert obs.grams == {}
        obs(**batch)
        for name, sums in obs.grams.items():
            assert torch.equal(sums.gram.tril(), once.grams[name].gram.tril())


def test_blocks_that_hide_their_neurons_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="computes its experts inside its block"):
        observe(remote.remote("inline"), gram=True)
