"""The layer op as a torch operator: opcheck, torch.compile, inference mode, no gradient."""

import pytest
import torch

import reap_kernels as rk
from reap_kernels.testing import CASES, LAYOUTS, make_experts, make_inputs

CASE = CASES[-1]


def arguments(
    layout: str, with_stats: bool, backend: str | None = None, with_gram: bool = False
) -> tuple:
    """The operator's flat arguments for one layout."""
    inputs = make_inputs(CASE)
    kind = "relu2" if layout == "ungated" else "silu"
    experts = make_experts(CASE, layout, rk.Activation(kind))

    def flat(matrices):
        if matrices is None:
            return []
        return [matrices] if isinstance(matrices, torch.Tensor) else list(matrices)

    return (
        inputs.hidden,
        inputs.topk_ids,
        inputs.topk_weights,
        flat(experts.up),
        flat(experts.gate),
        flat(experts.down),
        experts.up_bias,
        experts.gate_bias,
        experts.down_bias,
        kind,
        None,
        1.702,
        experts.interleaved,
        rk.LayerStats(CASE.experts, CASE.groups).packed() if with_stats else [],
        inputs.mask,
        0,
        inputs.group if with_stats else None,
        None,
        rk.LayerGram(CASE.experts, CASE.intermediate).packed() if with_gram else [],
        0.5,
        torch.rand(CASE.tokens) if with_gram else None,
        backend,
    )


@pytest.mark.parametrize("with_stats", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str, with_stats: bool) -> None:
    result = torch.library.opcheck(
        torch.ops.reap_kernels.observe_layer.default, arguments(layout, with_stats)
    )
    assert set(result.values()) == {"SUCCESS"}


def test_opcheck_with_gram_matrices() -> None:
    operator = torch.ops.reap_kernels.observe_layer.default
    result = torch.library.opcheck(operator, arguments("stacked", True, with_gram=True))
    assert set(result.values()) == {"SUCCESS"}


def test_opcheck_of_the_triton_backend() -> None:
    """In the interpreter: kernels mutate only what the operator declares."""
    operator = torch.ops.reap_kernels.observe_layer.default
    tests = ("test_schema", "test_faketensor")
    result = torch.library.opcheck(operator, arguments("stacked", True, "triton"), test_utils=tests)
    assert set(result.values()) == {"SUCCESS"}


def test_compiles_without_a_graph_break() -> None:
    inputs, experts = make_inputs(CASE), make_experts(CASE)
    compiled, eager = (rk.LayerStats(CASE.experts, CASE.groups) for _ in range(2))

    def layer(hidden, stats):
        out = rk.observe_layer(
            hidden, inputs.topk_ids, inputs.topk_weights, experts, stats, group=0
        )
        return out * 2

    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(fast(inputs.hidden, compiled), layer(inputs.hidden, eager))
    assert torch.equal(compiled.sums, eager.sums)


def test_compiles_with_the_group_of_each_token() -> None:
    """Whose values the compiled graph checks without leaving it."""
    inputs, experts = make_inputs(CASE), make_experts(CASE)
    compiled, eager = (rk.LayerStats(CASE.experts, CASE.groups) for _ in range(2))

    def layer(group, mask, stats):
        ids, weights = inputs.topk_ids, inputs.topk_weights
        return rk.observe_layer(inputs.hidden, ids, weights, experts, stats, mask=mask, group=group)

    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    given = inputs.group, inputs.mask
    assert torch.equal(fast(*given, compiled), layer(*given, eager))
    assert all(map(torch.equal, compiled.packed(), eager.packed()))
    with pytest.raises(RuntimeError, match="a group id is outside the groups"):
        fast(inputs.group + CASE.groups, inputs.mask, compiled)


def test_compiles_with_gram_matrices_and_the_factor_of_each_token() -> None:
    inputs, experts = make_inputs(CASE), make_experts(CASE)
    compiled, eager = (rk.LayerGram(CASE.experts, CASE.intermediate) for _ in range(2))
    call = (inputs.hidden, inputs.topk_ids, inputs.topk_weights, experts)

    def layer(scale, sums):
        return rk.observe_layer(*call, mask=inputs.mask, gram=sums, gram_scale=scale)

    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    scale = torch.rand(CASE.tokens)
    assert torch.equal(fast(scale, compiled), layer(scale, eager))
    assert all(map(torch.equal, compiled.packed(), eager.packed()))
    with pytest.raises(RuntimeError, match="scale has values below 0"):
        fast(scale - 2, compiled)


def test_inference_mode_adds_to_ordinary_statistics() -> None:
    inputs, experts = make_inputs(CASE), make_experts(CASE)
    with torch.inference_mode():
        stats = rk.LayerStats(CASE.experts)
        rk.observe_layer(inputs.hidden, inputs.topk_ids, inputs.topk_weights, experts, stats)
    assert not stats.sums.is_inference()
    stats.merge_(stats.to("cpu"))
    assert int(stats.count.sum()) > 0
