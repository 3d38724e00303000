"""Layers of vLLM that cannot be observed or masked: each reason, with its remedy."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.router.aiter_shared_routed_fused_moe_router import (
    AiterSharedRoutedFusedMoERouter,
)
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
from vllm.model_executor.layers.fused_moe.router.routing_simulator_router import (
    RoutingSimulatorRouter,
)
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter

from reap_driver.integrations.vllm.engine import layers, self_check
from reap_driver.integrations.vllm.engine.layer import described

EXPERTS = 8
SIZES: dict[str, Any] = {"top_k": 2, "global_num_experts": EXPERTS}


def external(hidden_states: Any, moe_state: Any = None) -> None:
    """A routing function as vLLM's Transformers backend makes them."""


class Kernel:
    """Of experts."""


def runner(router: Any = None, monolithic: bool = False, dbo: bool = False, **config: Any) -> Any:
    """As much of a MoERunner as reasons read."""
    plain = {
        "num_logical_experts": EXPERTS,
        "experts_per_token": 2,
        "hidden_dim_unpadded": 64,
        "intermediate_size": 32,
        "use_deferred_moe_finalize": False,
        "is_lora_enabled": False,
        "is_sequence_parallel": False,
        "dp_size": 1,
        "pcp_size": 1,
    }
    method = SimpleNamespace(
        is_monolithic=monolithic, moe_kernel=SimpleNamespace(fused_experts=Kernel())
    )
    return SimpleNamespace(
        router=router or CPURouter(**SIZES),
        moe_config=SimpleNamespace(**plain | config),
        routed_experts=SimpleNamespace(quant_method=method),
        routed_scaling_factor=2.5,
        enable_dbo=dbo,
        _fse_fuse_gate=False,
    )


def bias(size: int = EXPERTS) -> torch.Tensor:
    return torch.zeros(size)


def test_nothing_is_refused_without_a_reason() -> None:
    for router in (
        CPURouter(**SIZES),
        CPURouter(**SIZES, e_score_correction_bias=bias()),
        FusedTopKBiasRouter(**SIZES, e_score_correction_bias=bias()),
        GroupedTopKRouter(**SIZES, num_expert_group=4, topk_group=2),
        CustomRoutingRouter(**SIZES, custom_routing_function=lambda **_: None),
    ):
        found = runner(router)
        assert layers.observation_refusal(found) is None
        assert layers.mask_refusal(found) is None
        facts = layers.facts(found)
        grouped = isinstance(router, GroupedTopKRouter)
        assert (facts["n_group"], facts["topk_group"]) == ((4, 2) if grouped else (1, 1))
        assert (facts["num_experts"], facts["top_k"], facts["scale"]) == (EXPERTS, 2, 2.5)
        assert (facts["router"], facts["kernel"]) == (type(router).__name__, "Kernel")


NEITHER = {
    "monolithic": (
        runner(monolithic=True),
        "its kernel Kernel chooses experts inside, where nothing can be observed or masked; start "
        "vLLM with `--moe-backend triton`",
    ),
    "simulated": (runner(RoutingSimulatorRouter(**SIZES)), "unset VLLM_MOE_ROUTING_SIMULATION"),
}
NOT_OBSERVED = {
    "deferred": (runner(use_deferred_moe_finalize=True), "left to a fused kernel after it"),
    "adapters": (runner(is_lora_enabled=True), "start vLLM without `--enable-lora`"),
    "balanced": (runner(CPURouter(**SIZES, eplb_state=object())), "without `--enable-eplb`"),
    "sequence": (runner(is_sequence_parallel=True), "(sequence parallel); start vLLM with"),
    "data": (runner(dp_size=2), "(data parallel); start one server for each replica"),
    "context": (runner(pcp_size=2), "without `--prefill-context-parallel-size`"),
    "halves": (runner(dbo=True), "start vLLM without `--enable-dbo`"),
}
NOT_MASKED = {
    "external": (
        runner(CPURouter(**SIZES, custom_routing_function=partial(external, moe_state=1))),
        "its router is given no logits; write the pruned checkpoint with `apply`",
    ),
    "hashed": (
        runner(FusedTopKBiasRouter(**SIZES, hash_indices_table=torch.zeros(4, 2))),
        "chosen by a table of token ids",
    ),
    "identity": (
        runner(
            ZeroExpertRouter(
                **SIZES,
                e_score_correction_bias=bias(EXPERTS + 4),
                num_logical_experts=EXPERTS,
                zero_expert_type="identity",
            )
        ),
        "identity experts beside the others",
    ),
    "shared": (
        runner(AiterSharedRoutedFusedMoERouter(**SIZES, num_fused_shared_experts=1)),
        "VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=0",
    ),
    "bias": (
        runner(CPURouter(**SIZES, e_score_correction_bias=bias(EXPERTS + 1))),
        "has not one value for each expert",
    ),
}


@pytest.mark.parametrize("name", [*NEITHER, *NOT_OBSERVED, *NOT_MASKED])
def test_every_reason_is_given_with_its_remedy(name: str) -> None:
    found, text = (NEITHER | NOT_OBSERVED | NOT_MASKED)[name]
    observation, mask = layers.observation_refusal(found), layers.mask_refusal(found)
    assert (observation is None) == (name in NOT_MASKED)
    assert (mask is None) == (name in NOT_OBSERVED)
    for reason in (observation, mask):
        assert reason is None or text in reason


def test_biases_that_layers_share_are_found() -> None:
    both = torch.zeros(2, EXPERTS)
    whole = torch.zeros(EXPERTS)
    found = layers.shared_biases(
        {
            name: runner(FusedTopKBiasRouter(**SIZES, e_score_correction_bias=values))
            for name, values in {
                "text": both[0],  # rows of one parameter are apart
                "vision": both[1],
                "first": whole,
                "second": whole,
            }.items()
        }
        | {"none": runner()}
    )
    assert found == {"first": "second", "second": "first"}


def test_copies_of_an_expert_have_its_id() -> None:
    """Under load balancing routers return ids of copies, -1 where an expert has fewer."""
    copies = torch.tensor([[0, 4], [3, -1], [1, 2]])
    state = SimpleNamespace(logical_to_physical_map=copies)
    layer: Any = SimpleNamespace(runner=runner(CPURouter(**SIZES, eplb_state=state)))
    ids = torch.tensor([[4, 3], [2, 0]], dtype=torch.int32)
    assert self_check._logical(layer, ids).tolist() == [[0, 1], [2, 0]]
    layer.runner.router.eplb_state = None
    assert self_check._logical(layer, ids) is ids


def test_errors_of_others_are_told_on_one_line() -> None:
    assert described(AssertionError()) == "AssertionError"
    assert described(RuntimeError("size 8 vs 3\nat ::0")) == "RuntimeError: size 8 vs 3"
