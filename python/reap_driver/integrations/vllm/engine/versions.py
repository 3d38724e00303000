"""Which versions of vLLM were tested, and whether the one here has what the plugin hooks into.

vLLM promises none of it. A version that lacks some of it is refused by name when the plugin is
loaded, before a model is; one that has all of it, but was not tested, is used and said to be so.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Sequence

from reap_kernels.errors import BackendUnavailable

# Versions with which the tests of this plugin ran, oldest first.
TESTED = ("0.32.0",)
REMEDY = f"install a version that was tested: vLLM {', '.join(TESTED)}"
_FUSED = "vllm.model_executor.layers.fused_moe"


@dataclasses.dataclass(frozen=True)
class Seam:
    """Something of vLLM's that is hooked or read.

    Attributes:
        module: its module.
        path: its name within; of operators their name in `torch.ops.vllm`.
        needs: parameters of a function; attributes, fields or parameters of a class.
    """

    module: str
    path: str
    needs: tuple[str, ...] = ()


# What runs in workers. The model runners are looked at when they are there (`runners.Passes`).
ENGINE = (
    Seam(
        f"{_FUSED}.runner.moe_runner",
        "MoERunner",
        (
            "layer_name",
            "moe_config",
            "router",
            "routed_experts",
            "routed_scaling_factor",
            "enable_dbo",
            "shared_experts",
            "_fused_output_is_reduced",
        ),
    ),
    Seam(f"{_FUSED}.runner.moe_runner", "torch.ops.vllm.moe_forward"),
    Seam(f"{_FUSED}.runner.moe_runner", "torch.ops.vllm.moe_forward_shared"),
    Seam(
        f"{_FUSED}.router.fused_moe_router",
        "FusedMoERouter.select_experts",
        ("hidden_states", "router_logits"),
    ),
    Seam(f"{_FUSED}.router.base_router", "BaseRouter", ("top_k", "global_num_experts")),
    Seam(f"{_FUSED}.router.zero_expert_router", "ZeroExpertRouter"),
    Seam(f"{_FUSED}.router.routing_simulator_router", "RoutingSimulatorRouter"),
    Seam(
        f"{_FUSED}.router.aiter_shared_routed_fused_moe_router", "AiterSharedRoutedFusedMoERouter"
    ),
    Seam(
        f"{_FUSED}.routed_experts",
        "RoutedExperts.forward_modular",
        ("x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input"),
    ),
    Seam(
        f"{_FUSED}.routed_experts",
        "RoutedExperts",
        (
            "expert_map_manager",
            "apply_router_weight_on_input",
            "_ensure_moe_quant_config_init",
        ),
    ),
    Seam(
        f"{_FUSED}.fused_moe_method_base",
        "FusedMoEMethodBase",
        ("is_monolithic", "topk_indices_dtype", "skip_forward_padding"),
    ),
    Seam(
        f"{_FUSED}.config",
        "FusedMoEConfig",
        (
            "num_logical_experts",
            "experts_per_token",
            "hidden_dim",
            "hidden_dim_unpadded",
            "intermediate_size",
            "in_dtype",
            "router_logits_dtype",
            "max_num_tokens",
            "use_deferred_moe_finalize",
            "use_ep",
            "tp_size",
            "dp_size",
            "pcp_size",
            "is_sequence_parallel",
            "is_lora_enabled",
        ),
    ),
    Seam("vllm.distributed", "tensor_model_parallel_all_reduce"),
    Seam("vllm.forward_context", "set_forward_context", ("attn_metadata", "vllm_config")),
    Seam(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        (
            "num_scheduled_tokens",
            "total_num_scheduled_tokens",
            "scheduled_spec_decode_tokens",
            "finished_req_ids",
        ),
    ),
    Seam("vllm.v1.cudagraph_dispatcher", "CudagraphDispatcher.dispatch", ("num_tokens",)),
    Seam("vllm.v1.worker.worker_base", "WorkerBase", ("vllm_config", "load_model")),
    Seam("vllm.config", "VllmConfig", ("additional_config", "compute_hash")),
)
# What runs in the API server.
SERVER = (
    Seam(
        "vllm.plugins.endpoint_plugins.interface",
        "EndpointPlugin",
        ("name", "required_tasks", "attach_router", "init_state"),
    ),
    Seam("vllm.v1.engine.async_llm", "AsyncLLM.collective_rpc", ("method", "args", "kwargs")),
    Seam(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.reset_prefix_cache",
        ("reset_running_requests", "reset_connector"),
    ),
    Seam("vllm.v1.engine.async_llm", "AsyncLLM.pause_generation", ("mode", "clear_cache")),
    Seam("vllm.v1.engine.async_llm", "AsyncLLM.resume_generation"),
    Seam("vllm.v1.engine.async_llm", "AsyncLLM.is_sleeping"),
)


def version() -> str:
    """The version of vLLM that is installed, without what a build adds (`+cpu`).

    Raises:
        BackendUnavailable: vLLM is not installed.
    """
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:
        raise BackendUnavailable(
            f"vLLM cannot be imported ({error}); run `pip install reap-kernels[vllm]`"
        ) from error
    return str(vllm.__version__).partition("+")[0]


def note() -> str | None:
    """What to say about the version that is installed: that it was not tested; None if it was."""
    found = version()
    if found in TESTED:
        return None
    return (
        f"the plugin `reap` was not tested with vLLM {found} ({', '.join(TESTED)} was); it has all "
        "that the plugin hooks into, and every layer checks itself before it is observed or masked"
    )


def check(seams: Sequence[Seam] = ENGINE) -> None:
    """Checks that the vLLM here has all that is hooked.

    Raises:
        BackendUnavailable: it lacks something; the message names all that it lacks, and a version
            that works.
    """
    lacking = [reason for seam in seams if (reason := missing(seam)) is not None]
    if lacking:
        raise BackendUnavailable(
            f"the plugin `reap` does not fit vLLM {version()}, which lacks "
            f"{'; '.join(lacking)}; {REMEDY}, or start vLLM without `reap` in VLLM_PLUGINS"
        )


def missing(seam: Seam) -> str | None:
    """What of `seam` this vLLM lacks, or None.

    Example:
        >>> missing(Seam("fractions", "Fraction", ("numerator", "height")))
        'height of fractions.Fraction'
    """
    try:
        found: object = importlib.import_module(seam.module)
    except ImportError as error:
        return f"{seam.module} ({error})"
    parts = seam.path.split(".")
    if parts[0] == "torch":  # an operator, which the module registers
        found = importlib.import_module(parts.pop(0))
    for part in parts:
        found = getattr(found, part, None)
        if found is None:
            return f"{seam.module}.{seam.path}"
    lacking = [name for name in seam.needs if name not in _names(found)]
    return f"{', '.join(lacking)} of {seam.module}.{seam.path}" if lacking else None


def _names(found: object) -> set[str]:
    """Parameters of a function; attributes, fields and parameters of a class."""
    assert callable(found)
    names = set(inspect.signature(found).parameters)
    if isinstance(found, type):
        names |= set(dir(found))
        for base in found.__mro__:
            names |= set(vars(base).get("__annotations__", ()))
    return names
