"""The MoE layers of a model inside vLLM: which they are, what they are, and why one is refused.

vLLM computes every MoE layer in a `MoERunner`, whose `router` chooses experts from logits and whose
`routed_experts` compute them. Layers are found by that class, whatever model wraps them; models
that draft tokens are other models of the worker and hold none of these.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.router.aiter_shared_routed_fused_moe_router import (
    AiterSharedRoutedFusedMoERouter,
)
from vllm.model_executor.layers.fused_moe.router.routing_simulator_router import (
    RoutingSimulatorRouter,
)
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

Facts = dict[str, Any]
# Reasons, each with what it holds of; the first that holds is given.
_Reasons = tuple[tuple[Callable[[Any], bool], str], ...]


def find_layers(model: nn.Module) -> dict[str, Any]:
    """{qualified name: MoERunner} of a model, in the order of its modules.

    A layer that an adapter (LoRA) wraps has the name that it has without the adapter.
    """
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, MoERunner)
    }


def facts(runner: Any) -> Facts:
    """What one layer is, in values that messages between processes can hold.

    Returns:
        num_experts (without copies for load balancing, and identity experts), top_k, n_group and
        topk_group (1 without groups), hidden_size and intermediate_size of the experts (whole, not
        this rank's part), scale (by which vLLM multiplies the sum of the experts' outputs instead
        of the router weights), and the class names of router and kernel.
    """
    config, router = runner.moe_config, runner.router
    grouped = getattr(router, "use_grouped_topk", hasattr(router, "num_expert_group"))
    return {
        "num_experts": int(config.num_logical_experts),
        "top_k": int(config.experts_per_token),
        "n_group": int((grouped and router.num_expert_group) or 1),
        "topk_group": int((grouped and router.topk_group) or 1),
        "hidden_size": int(config.hidden_dim_unpadded),
        "intermediate_size": int(config.intermediate_size),
        "scale": float(runner.routed_scaling_factor),
        "router": type(router).__name__,
        "kernel": kernel_name(runner),
    }


def kernel_name(runner: Any) -> str:
    """The class of the experts' kernel or, until vLLM has chosen one, of what holds weights."""
    method = runner.routed_experts.quant_method
    kernel = getattr(method, "moe_kernel", None)
    found = getattr(kernel, "fused_experts", None) or getattr(method, "experts_cls", None) or method
    return found.__name__ if isinstance(found, type) else type(found).__name__


def selection_biases(runner: Any) -> list[Tensor]:
    """What the router adds to scores before it selects, `[E]` each: tensors of the model itself."""
    names = ("e_score_correction_bias", "bias_vl")
    found = (getattr(runner.router, name, None) for name in names)
    return [bias for bias in found if bias is not None]


def shared_biases(runners: Mapping[str, Any]) -> dict[str, str]:
    """{layer: another layer} for layers whose selection biases are, at least in part, the same
    memory: a mask of one, which changes it, would change the routing of the other.
    """
    places: dict[int, str] = {}  # address of a value -> the first layer that has it
    shared: dict[str, str] = {}
    for name, runner in runners.items():
        for bias in selection_biases(runner):
            first, step = bias.data_ptr(), bias.stride(0) * bias.element_size()
            for place in range(first, first + step * len(bias), step or 1):
                other = places.setdefault(place, name)
                if other != name:
                    shared[name], shared[other] = other, name
    return shared


def _monolithic(runner: Any) -> bool:
    return bool(runner.routed_experts.quant_method.is_monolithic)


def _external_routing(runner: Any) -> bool:
    """Whether the model routes before it calls the layer, as vLLM's Transformers backend does."""
    routing = getattr(runner.router, "custom_routing_function", None)
    return hasattr(runner, "_moe_state") or "moe_state" in (
        getattr(routing, "keywords", None) or {}
    )


def _fused_shared(runner: Any) -> bool:
    router = runner.router
    return isinstance(router, AiterSharedRoutedFusedMoERouter) or runner._fse_fuse_gate


def _wrong_bias(runner: Any) -> bool:
    experts = runner.moe_config.num_logical_experts
    return any(tuple(bias.shape) != (experts,) for bias in selection_biases(runner))


def _parallel(name: str) -> Callable[[Any], bool]:
    """Whether a size of the layer's parallelism is more than one."""
    return lambda runner: getattr(runner.moe_config, name) > 1


_NEITHER: _Reasons = (
    (
        _monolithic,
        "its kernel {kernel} chooses experts inside, where nothing can be observed or masked; "
        "start vLLM with `--moe-backend triton` (MXFP4: `triton_unfused`, NVFP4: `cutlass`; on a "
        "CPU no flag helps: run without zentorch, and no W4A8 on Arm)",
    ),
    (
        lambda runner: isinstance(runner.router, RoutingSimulatorRouter),
        "vLLM simulates its routing; unset VLLM_MOE_ROUTING_SIMULATION_STRATEGY",
    ),
)
_NOT_OBSERVED: _Reasons = (
    *_NEITHER,
    (
        lambda runner: runner.moe_config.use_deferred_moe_finalize,
        "the sum of its experts' outputs is left to a fused kernel after it; start vLLM with "
        "`--moe-backend triton`",
    ),
    (
        lambda runner: runner.moe_config.is_lora_enabled,
        "its kernel takes adapters by the place of a token, which observing changes; start vLLM "
        "without `--enable-lora`",
    ),
    (
        lambda runner: runner.router.eplb_state is not None,
        "load balancing moves its experts while they are observed; start vLLM without "
        "`--enable-eplb`",
    ),
    (
        lambda runner: runner.moe_config.is_sequence_parallel,
        "ranks share the tokens of a step (sequence parallel); start vLLM with another "
        "`--all2all-backend`, or without `--enable-expert-parallel`",
    ),
    (
        _parallel("dp_size"),
        "ranks exchange tokens inside it (data parallel); start one server for each replica",
    ),
    (
        _parallel("pcp_size"),
        "ranks share the tokens of a step (context parallel); start vLLM without "
        "`--prefill-context-parallel-size`",
    ),
    (
        lambda runner: runner.enable_dbo,
        "steps run in two interleaved halves; start vLLM without `--enable-dbo`",
    ),
)
_NOT_MASKED: _Reasons = (
    *_NEITHER,
    (
        _external_routing,
        "the model routes outside of it (vLLM's Transformers backend), so that its router is given "
        "no logits; write the pruned checkpoint with `apply` and serve that",
    ),
    (
        lambda runner: getattr(runner.router, "_hash_indices_table", None) is not None,
        "its experts are chosen by a table of token ids, which no mask reaches; write the pruned "
        "checkpoint with `apply` and serve that",
    ),
    (
        lambda runner: isinstance(runner.router, ZeroExpertRouter),
        "its router has identity experts beside the others; write the pruned checkpoint with "
        "`apply` and serve that",
    ),
    (
        _fused_shared,
        "its logits hold those of shared experts; start vLLM with "
        "VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=0",
    ),
    (
        _wrong_bias,
        "its router's selection bias has not one value for each expert; write the pruned "
        "checkpoint with `apply` and serve that",
    ),
)


def observation_refusal(runner: Any) -> str | None:
    """Why a layer cannot be observed, with the remedy, or None."""
    return _first(_NOT_OBSERVED, runner)


def mask_refusal(runner: Any) -> str | None:
    """Why experts of a layer cannot be masked, with the remedy, or None."""
    return _first(_NOT_MASKED, runner)


def _first(reasons: _Reasons, runner: Any) -> str | None:
    found = (text for holds, text in reasons if holds(runner))
    text = next(found, None)
    return None if text is None else text.format(kernel=kernel_name(runner))
