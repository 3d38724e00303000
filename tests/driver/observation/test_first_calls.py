"""Comparing each layer's first call: what it catches, and that it waits for a device once."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import reap_driver as rd
from reap_driver.compat.experts_interface import grouped_form
from reap_driver.observation import layer_recorder
from reap_driver.observation.first_calls import Code, FirstCalls
from reap_driver.observation.layer_recorder import LayerRecorder
from reap_kernels import Activation, ExpertWeights, observe_layer
from reap_kernels.errors import DataError, UnsupportedModel
from tests.driver import zoo

Batch = dict[str, Tensor]


def tiny(name: str, **changed: Any) -> tuple[PreTrainedModel, Batch]:
    config, model = zoo.tiny(name, **changed)
    return model, zoo.tiny_inputs(name, config)


def _replaced(**fields: Any) -> Callable[[ExpertWeights], ExpertWeights]:
    return lambda experts: dataclasses.replace(experts, **fields)


def _with(field: str, change: Callable[[Any], Any]) -> Callable[[ExpertWeights], ExpertWeights]:
    return lambda experts: dataclasses.replace(experts, **{field: change(getattr(experts, field))})


def _one_expert_less(down: Tensor) -> Tensor:
    down = down.clone()
    down[0] = 0
    return down


# What an adapter may get wrong, by a model whose layers show it: the description of the weights.
WEIGHTS: dict[str, tuple[str, Callable[[ExpertWeights], ExpertWeights]]] = {
    "activation": ("qwen3_moe", _replaced(activation=Activation("gelu_tanh"))),
    "limit": ("gpt_oss", _with("activation", lambda a: dataclasses.replace(a, limit=0.1))),
    "alpha": ("gpt_oss", _with("activation", lambda a: dataclasses.replace(a, alpha=1.0))),
    "activation without gate": (
        "nemotron_h",
        _replaced(activation=Activation("opaque", fn=torch.relu)),
    ),
    "gate and up swapped": ("qwen3_moe", _with("up", lambda up: up.roll(up.shape[1] // 2, 1))),
    "scale": ("qwen3_moe", _with("down", lambda down: 1.001 * down)),
    "up bias": ("gpt_oss", _with("up_bias", torch.zeros_like)),
    "down bias": ("gpt_oss", _with("down_bias", torch.zeros_like)),
    "interleaved": ("gpt_oss", _replaced(interleaved=False)),
    "concatenated": ("qwen3_moe", _replaced(interleaved=True)),
    "order of experts": ("qwen3_moe", _with("down", lambda down: down.roll(1, 0))),
    "order of all matrices": ("mixtral", _with("up", lambda up: up.flip(0))),
    "transposed": ("square", _with("down", lambda down: down.transpose(1, 2))),
    "an expert missing": ("few", _with("down", _one_expert_less)),
    "dbrx gate": ("dbrx", _with("gate", lambda gate: gate.flip(1))),
    "llama4 scale": ("llama4", _with("down", lambda down: 1.001 * down)),
}
# Models of the zoo with other sizes, for mutants that the usual ones cannot show.
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "square": ("qwen3_moe", {"moe_intermediate_size": 32}),
    "few": ("qwen3_moe", {"num_experts": 4}),
}
# What the recorder may get wrong: the arguments of the layer.
CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "router weights in another order": lambda x, ids, w: (x, ids, w.flip(1)),
    "router weights off": lambda x, ids, w: (x, ids, 1.001 * w),
    "ids off": lambda x, ids, w: (x, ids.roll(1, 1), w),
    "a slot less": lambda x, ids, w: (x, ids[:, 1:], w[:, 1:]),
    "other tokens": lambda x, ids, w: (x.roll(1, 0), ids, w),
}


def _model(name: str) -> tuple[PreTrainedModel, Batch]:
    base, sizes = SIZES.get(name, (name, {}))
    return tiny(base, **sizes)


def _nth(model: PreTrainedModel, number: int) -> str:
    return rd.find_moe_layers(model)[number].name


def _assert_refused(model: PreTrainedModel, batch: Batch, bad: str) -> None:
    """A layer is named, nothing of the forward is left, and the next forward is compared too."""
    with rd.observe(model) as obs:
        for _ in range(2):
            with pytest.raises(UnsupportedModel, match="differs from the module's own") as caught:
                obs(**batch)
            assert str(caught.value).startswith(f"{bad} (")
            assert not any(int(layer.tokens.sum()) for layer in obs.stats.layers.values())
        with torch.no_grad(), pytest.raises(UnsupportedModel, match="differs"):
            model(**batch)  # not through the observer
        assert not any(int(layer.count.sum()) for layer in obs.stats.layers.values())


@pytest.mark.parametrize("number", [0, 1])  # compared with its own code; with the grouped form
@pytest.mark.parametrize("mutant", WEIGHTS)
def test_wrong_weights_are_refused(
    mutant: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, change = WEIGHTS[mutant]
    model, batch = _model(name)
    bad, own = _nth(model, number), LayerRecorder.weights

    def weights(self: LayerRecorder) -> ExpertWeights:
        return change(own(self)) if self.name == bad else own(self)

    monkeypatch.setattr(LayerRecorder, "weights", weights)
    _assert_refused(model, batch, bad)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("mutant", CALLS)
def test_wrong_arguments_are_refused(
    mutant: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny("qwen3_moe")
    calls = 0

    def mutated(hidden: Tensor, ids: Tensor, weights: Tensor, *args: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if (calls - 1) % 2 == number:
            hidden, ids, weights = CALLS[mutant](hidden, ids, weights)
        return observe_layer(hidden, ids, weights, *args, **options)

    monkeypatch.setattr(layer_recorder, "observe_layer", mutated)
    _assert_refused(model, batch, _nth(model, number))


def test_wrong_weights_of_a_streamed_layer_are_refused_before_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its first batch: the layer after it is not run."""
    model, batch = tiny("qwen3_moe")
    model.save_pretrained(tmp_path)
    bad, own = _nth(model, 0), LayerRecorder.weights
    ran: list[str] = []

    def weights(self: LayerRecorder) -> ExpertWeights:
        ran.append(self.name)
        found = own(self)
        return dataclasses.replace(found, down=1.001 * found.down) if self.name == bad else found

    monkeypatch.setattr(LayerRecorder, "weights", weights)
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.experts .*differs from"):
        rd.observe_streamed(tmp_path, [batch, batch])
    assert ran == [bad]


def test_own_code_is_run_once_for_modules_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """And again for a module with another attribute, or in another observation."""
    model, batch = tiny("qwen3_moe", num_hidden_layers=4)
    ran = _own_code(monkeypatch)
    observer = rd.observe(model)
    with observer as obs:
        obs(**batch)
        obs(**batch)
    assert ran == [_nth(model, 0)]
    model.model.layers[2].mlp.experts.scale = 1.0
    with rd.observe(model) as obs:
        obs(**batch)
    assert ran[1:] == [_nth(model, 0), _nth(model, 2)]


@pytest.mark.parametrize("kind", ["float64", "autocast", "buffer", "odd width"])
def test_own_code_is_run_for_every_layer_where_grouped_products_do_not_serve(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"moe_intermediate_size": 21} if kind == "odd width" else {}
    model, batch = tiny("qwen3_moe", **sizes)
    ran = _own_code(monkeypatch)
    if kind == "float64":
        model.double()
    if kind == "buffer":
        for layer in model.model.layers:
            layer.mlp.experts.register_buffer("scale", torch.ones(()), persistent=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"), rd.observe(model) as ob:
        ob(**batch)
    assert ran == [_nth(model, 0), _nth(model, 1)]


def test_own_code_is_run_where_torch_refuses_the_grouped_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = tiny("qwen3_moe")
    ran = _own_code(monkeypatch)

    def refuse(*_: Any) -> Tensor:
        raise RuntimeError("no grouped product of these weights")

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", refuse)
    with rd.observe(model) as obs:
        obs(**batch)
    assert ran == [_nth(model, 0), _nth(model, 1)]
    assert not any(map(obs.first_calls.due, obs._recorders))


def _own_code(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of layers whose own code is run from now on, in order."""
    ran: list[str] = []
    own = LayerRecorder._compare_first

    def spied(self: LayerRecorder, call: Any, out: Tensor, eager: Any, grouped: Any) -> None:
        def noted(*args: Tensor) -> Tensor:
            ran.append(self.name)
            result: Tensor = eager(*args)
            return result

        own(self, call, out, noted, grouped)

    monkeypatch.setattr(LayerRecorder, "_compare_first", spied)
    return ran


class _Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: reads of numbers, and shapes that depend on
    them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tags = torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output
        # Only a boolean index is a mask, whose entries must be counted.
        places = func is torch.ops.aten.index.Tensor and all(
            place is None or place.dtype == torch.int64 for place in args[1]
        )
        self.reads += not places and any(tag in func.tags for tag in tags)
        return func(*args, **(kwargs or {}))


def test_a_host_waits_as_often_for_many_layers_as_for_few() -> None:
    """One copy has the results of all; a loop over experts waits for each that is reached."""
    reads = []
    for layers in (2, 5):
        model, batch = tiny("qwen3_moe", num_hidden_layers=layers)
        model.set_experts_implementation("grouped_mm")
        form = grouped_form(rd.find_moe_layers(model)[0].module)
        assert form is not None
        with rd.observe(model) as obs, _Reads() as counted:
            obs.first_calls._kinds.add(form.kind)
            obs(**batch)
            first = counted.reads
            obs(**batch)
        reads.append(2 * first - counted.reads)  # those that the second forward does not have
        assert not any(map(obs.first_calls.due, obs._recorders))
    assert reads[0] == reads[1]


@pytest.mark.parametrize("end", ["error", "interrupt"])
def test_a_forward_that_fails_is_compared_again(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its results are forgotten, so no layer passes by them."""
    model, batch = tiny("qwen3_moe")
    ran = _own_code(monkeypatch)
    error = ValueError if end == "error" else KeyboardInterrupt

    def fail(*_: Any) -> None:
        raise error("on purpose")

    with rd.observe(model) as obs:
        handle = model.lm_head.register_forward_pre_hook(fail)
        with pytest.raises(error):
            obs(**batch)
        handle.remove()
        assert all(map(obs.first_calls.due, obs._recorders))
        obs(**batch)
        assert not any(map(obs.first_calls.due, obs._recorders))
    assert ran == [_nth(model, 0)] * 2


def test_a_device_without_memory_is_not_said_to_be_the_modules_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = tiny("qwen3_moe")

    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(FirstCalls, "reference", lambda *_: (full, Code()))
    with rd.observe(model) as obs, pytest.raises(torch.OutOfMemoryError):
        obs(**batch)


class _Left(BaseException):
    """Ends a forward as streaming does, after the layers that have run."""


def test_an_interrupt_while_results_are_read_counts_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reading waits for the device, so that Ctrl-C comes there."""
    model, batch = tiny("qwen3_moe")

    def leave(*_: Any) -> None:
        raise _Left

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model.lm_head.register_forward_pre_hook(leave)
    with rd.observe(model) as obs:
        monkeypatch.setattr(obs.first_calls, "settle", interrupt)
        with pytest.raises(KeyboardInterrupt):
            obs(**batch)
        assert not any(int(layer.tokens.sum()) for layer in obs.stats.layers.values())


def test_layers_without_counted_tokens_are_compared_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that leaves out every token says nothing, although padding was compared."""
    model, batch = tiny("qwen3_moe")
    own = LayerRecorder.weights

    def weights(self: LayerRecorder) -> ExpertWeights:
        found = own(self)
        return dataclasses.replace(found, down=1.001 * found.down)

    monkeypatch.setattr(LayerRecorder, "weights", weights)
    nothing = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    with rd.observe(model) as obs:
        obs(**batch, token_mask=nothing)
        assert all(map(obs.first_calls.due, obs._recorders))
        with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.experts .*differs from"):
            obs(**batch)


@pytest.mark.parametrize("counted", [0, 1, 3, 4, 40, 100])
def test_samples_are_spread_over_counted_tokens(counted: int) -> None:
    mask = torch.zeros(100, dtype=torch.bool)
    mask[torch.randperm(100, generator=torch.Generator().manual_seed(0))[:counted]] = True
    sample = FirstCalls().sample("layer", 100, mask, mask.device)
    assert sample is not None
    assert sample.counted is not None
    assert int(sample.counted) == counted
    places = mask.nonzero().flatten()
    if counted:
        assert bool(mask[sample.rows].all())
        assert sample.rows[0] == places[0]
        assert sample.rows[-1] == places[-1]
        assert len(sample.rows.unique()) == min(counted, 4)


@pytest.mark.parametrize("tokens", [1, 2, 4, 24])
def test_samples_of_all_tokens_have_the_first_and_the_last(tokens: int) -> None:
    sample = FirstCalls().sample("layer", tokens, None, torch.device("cpu"))
    assert sample is not None
    assert sample.counted is None
    rows = sample.rows.tolist()
    assert rows == sorted(set(rows))
    assert (rows[0], rows[-1], len(rows)) == (0, tokens - 1, min(tokens, 4))
    assert FirstCalls().sample("layer", 0, None, torch.device("cpu")) is None


def test_the_first_layer_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although one after it returns NaN because of it."""
    model, batch = tiny("qwen3_moe", num_hidden_layers=3)
    own = LayerRecorder.weights
    names = [_nth(model, 1), _nth(model, 2)]

    def weights(self: LayerRecorder) -> ExpertWeights:
        found = own(self)
        factor = {names[0]: 2.0, names[1]: math.nan}.get(self.name, 1.0)
        return dataclasses.replace(found, down=factor * found.down)

    monkeypatch.setattr(LayerRecorder, "weights", weights)
    with rd.observe(model) as obs, pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp"):
        obs(**batch)


def test_a_cause_before_the_layer_is_named() -> None:
    """A router's NaN reaches the experts: what comes before them is at fault."""
    model, batch = tiny("qwen3_moe")
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[0] = math.nan
    with rd.observe(model) as obs, pytest.raises(DataError, match=r"layers\.0\.mlp\.experts"):
        obs(**batch)
