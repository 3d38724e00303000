"""llm-compressor's sequential pipeline calibrates without a causal mask: noticed, and corrected."""

import re

import pytest
from llmcompressor.modifiers.pruning import REAPPruningModifier

import reap_kernels as rk
from reap_driver.integrations.llm_compressor import KernelREAPPruningModifier, causal_attention
from tests.interop.llmcompressor.runs import Observed, farthest, run, text_rows, trained


def alone(**options: object) -> list[Observed]:
    modifier = REAPPruningModifier(sparsity=0.25)
    return run(trained(), [modifier], text_rows(), propagate_error=False, **options)


def test_the_pipeline_alone_keeps_other_experts() -> None:
    """The reproduction of the guide, without our code until the last run. A release in which the
    first assertion fails has corrected its pipeline: say so there and in the docstrings.
    """
    causal, sequential = alone(pipeline="basic"), alone(pipeline="sequential")
    assert farthest(sequential, causal) > 0.2
    assert [layer.kept for layer in sequential] != [layer.kept for layer in causal]
    corrected = alone(pipeline="sequential", around=causal_attention)
    assert farthest(corrected, causal) < 1e-5
    assert [layer.kept for layer in corrected] == [layer.kept for layer in causal]


@pytest.mark.parametrize("pipeline", ["sequential", "independent"])
def test_our_modifier_refuses(pipeline: str) -> None:
    model = trained()
    want = "model.layers.0.self_attn: llm-compressor calibrates with eager attention"
    with pytest.raises(rk.errors.UnsupportedModel, match=re.escape(want)):
        run(model, [KernelREAPPruningModifier(sparsity=0.25)], text_rows(), pipeline=pipeline)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert hooks == 0
    # The model is as it was, so that the remedy can be followed at once.
    again = run(
        model,
        [KernelREAPPruningModifier(sparsity=0.25)],
        text_rows(),
        around=causal_attention,
        pipeline=pipeline,
        propagate_error=False,
    )
    assert [layer.kept for layer in again] == [layer.kept for layer in alone(pipeline="basic")]


def test_padded_batches_are_refused_too() -> None:
    """With padding the pipeline makes a mask of another kind, which hides nothing either."""
    rows = text_rows()
    rows = rows.map(lambda row, i: {k: v[: 48 - i] for k, v in row.items()}, with_indices=True)
    options = {"pipeline": "sequential", "batch_size": 4, "data_collator": "padding"}
    with pytest.raises(rk.errors.UnsupportedModel, match="no causal mask"):
        run(trained(), [KernelREAPPruningModifier(sparsity=0.25)], rows, **options)
    found = run(
        trained(),
        [KernelREAPPruningModifier(sparsity=0.25)],
        rows,
        around=causal_attention,
        **options,
    )
    assert len(found) == 4


def test_correction_ends_with_its_context() -> None:
    from llmcompressor.pipelines.sequential.helpers import SequentialTracer

    before = SequentialTracer.create_arg
    with causal_attention():
        assert SequentialTracer.create_arg is not before
    assert SequentialTracer.create_arg is before
