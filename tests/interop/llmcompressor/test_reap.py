"""REAP of llm-compressor, alone and with our observation: the same experts by the same saliency."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import REAPPruningModifier
from llmcompressor.modifiers.utils.hooks import HooksMixin
from torch import nn
from transformers import PreTrainedModel

import reap_kernels as rk
from reap_driver.integrations import llm_compressor
from reap_driver.integrations.llm_compressor import (
    KernelREAPPruningModifier,
    causal_attention,
    register,
)
from tests.interop.llmcompressor.runs import (
    Observed,
    farthest,
    random_model,
    random_rows,
    run,
    text_rows,
    trained,
)

PIPELINES = [("basic", True), ("sequential", True), ("sequential", False)]
# In groups that divide the bundled model's matrices.
FOUR_BITS = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16},
}
# A gate without and with clamps and biases, no gate, groups of experts, shared experts, an
# activation that is no closed formula.
ARCHITECTURES = ["mixtral", "qwen2_moe", "gpt_oss", "olmoe", "minimax_m2", "glm4_moe", "nemotron_h"]


def same_decisions(ours: list[Observed], theirs: list[Observed]) -> bool:
    return all(
        torch.equal(a.count, b.count) and a.kept == b.kept
        for a, b in zip(ours, theirs, strict=True)
    )


def same_weights(ours: PreTrainedModel, theirs: PreTrainedModel) -> bool:
    mine, other = ours.state_dict(), theirs.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[n], other[n]) for n in mine)


def run_again(block: nn.Module, router: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a router: runs the block it is in once more, with hooks turned off."""
    if not HooksMixin._HOOKS_DISABLED:
        with HooksMixin.disable_hooks():
            block(args[0][None])


def hooks(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(("pipeline", "propagate"), PIPELINES)
def test_pipelines(pipeline: str, propagate: bool) -> None:
    found: dict[type, list[Observed]] = {}
    models: dict[type, PreTrainedModel] = {}
    for kind in (REAPPruningModifier, KernelREAPPruningModifier):
        models[kind] = trained()
        found[kind] = run(
            models[kind],
            [kind(sparsity=0.25)],
            text_rows(),
            around=causal_attention,
            pipeline=pipeline,
            propagate_error=propagate,
            moe_calibrate_all_experts=False,
        )
    theirs, ours = found.values()
    assert len(ours) == 4
    assert farthest(ours, theirs) < 1e-12
    assert same_decisions(ours, theirs)
    assert same_weights(*models.values())
    assert models[KernelREAPPruningModifier].config.num_experts == 24


def test_default_options() -> None:
    """By default llm-compressor computes every expert for every token, in products of other sizes,
    whose sums round differently.
    """
    alone, ours = trained(), trained()
    theirs = run(alone, [REAPPruningModifier(sparsity=0.25)], text_rows(), around=causal_attention)
    found = run(
        ours, [KernelREAPPruningModifier(sparsity=0.25)], text_rows(), around=causal_attention
    )
    assert farthest(found, theirs) < 1e-5
    assert same_decisions(found, theirs)
    assert same_weights(ours, alone)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, tmp_path: Path) -> None:
    found = []
    for kind in (REAPPruningModifier, KernelREAPPruningModifier):
        model = random_model(name, tmp_path)
        data = random_rows(model.config.vocab_size)
        options = {"pipeline": "basic", "moe_calibrate_all_experts": False}
        found.append(run(model, [kind(sparsity=0.25)], data, **options))
    theirs, ours = found
    assert farthest(ours, theirs) < 1e-6  # their norms are float32
    assert same_decisions(ours, theirs)


def test_experts_are_not_run_one_by_one() -> None:
    calls: list[str] = []
    model = trained()
    register_hook = HooksMixin.register_hook

    def counted(self: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(type(target).__name__)
        return register_hook(self, target, *args, **kwargs)

    with mock.patch.object(HooksMixin, "register_hook", counted):
        run(model, [KernelREAPPruningModifier(sparsity=0.25)], text_rows(2), pipeline="basic")
    assert sorted(set(calls)) == ["LinearExperts2D", "Qwen3MoeAttention"]


def test_nothing_is_left_on_the_model() -> None:
    model = trained()
    run(model, [KernelREAPPruningModifier(sparsity=0.25)], text_rows(2), pipeline="basic")
    assert hooks(model) == 0
    for module in model.modules():
        if isinstance(module, LinearExperts2D):
            assert module.forward.__name__ == "forward"  # a partial function has no name


def test_recipe_text_finds_the_registered_class() -> None:
    recipe = (
        "prune_stage:\n  prune_modifiers:\n    KernelREAPPruningModifier:\n      sparsity: 0.25"
    )
    register()
    model = trained()
    found = run(model, recipe, text_rows(2), pipeline="basic")
    assert [len(layer.kept) for layer in found] == [24] * 4


def test_gptq_in_the_same_pass_sees_what_it_sees_alone() -> None:
    """In `sequential` both modifiers observe one pass, so the experts' modules must run."""
    models, found, calls = [], [], []
    for kind in (REAPPruningModifier, KernelREAPPruningModifier):
        model = trained()
        calibrate = GPTQModifier.calibrate_module
        with mock.patch.object(GPTQModifier, "calibrate_module", autospec=True) as spy:
            spy.side_effect = calibrate
            recipe = [
                kind(sparsity=0.25),
                GPTQModifier(config_groups={"all": FOUR_BITS}, ignore=["lm_head", "re:.*gate$"]),
            ]
            found.append(
                run(
                    model,
                    recipe,
                    text_rows(2),
                    around=causal_attention,
                    pipeline="sequential",
                    moe_calibrate_all_experts=False,
                )
            )
        models.append(model)
        calls.append(spy.call_count)
    assert calls[0] == calls[1] > 500
    assert farthest(found[1], found[0]) < 1e-12
    assert same_decisions(found[1], found[0])
    assert same_weights(models[1], models[0])


def test_passes_with_hooks_turned_off_are_not_counted() -> None:
    """Modifiers such as AWQ run modules again, hooks turned off, to compare their outputs."""
    found = []
    for again in (False, True):
        model = trained()
        for layer in model.model.layers if again else ():
            layer.mlp.gate.register_forward_hook(partial(run_again, layer.mlp))
        recipe = [KernelREAPPruningModifier(sparsity=0.25)]
        found.append(run(model, recipe, text_rows(2), pipeline="basic"))
    assert farthest(found[1], found[0]) < 1e-12
    assert same_decisions(found[1], found[0])


def test_outputs_that_are_not_finite_are_refused() -> None:
    model = trained()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3].fill_(torch.inf)
    with pytest.raises(rk.errors.DataError, match=r"layers\.1\.mlp: \d+ outputs .* NaN"):
        run(model, [KernelREAPPruningModifier(sparsity=0.25)], text_rows(2), pipeline="basic")
    assert hooks(model) == 0


def test_an_interrupted_run_leaves_nothing_on_the_model() -> None:
    model = trained()
    with (
        mock.patch.object(rk, "observe_layer", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        run(model, [KernelREAPPruningModifier(sparsity=0.25)], text_rows(2), pipeline="basic")
    assert hooks(model) == 0
    for module in model.modules():
        if isinstance(module, LinearExperts2D):
            assert module.forward.__name__ == "forward"


def test_experts_run_themselves_where_their_weights_do_not_tell_all() -> None:
    """Gradients, hooks, modules of another kind and rounding: what other modifiers rely on."""
    experts = trained().model.layers[0].mlp.experts
    linear_experts = LinearExperts2D.get_linear_experts_cls(type(experts))
    with torch.no_grad():
        own = linear_experts.from_experts_module(experts, trained().config)
    assert llm_compressor._unwatched(own)
    handle = own[3].gate_proj.register_forward_pre_hook(lambda *_: None)
    assert not llm_compressor._unwatched(own)
    handle.remove()
    own[3].up_proj.quantization_scheme = "anything"
    assert not llm_compressor._unwatched(own)
    own[3].up_proj.quantization_enabled = False
    assert llm_compressor._unwatched(own)
    own[3].down_proj = nn.modules.linear.NonDynamicallyQuantizableLinear(48, 160)
    assert not llm_compressor._unwatched(own)
