"""One MoE layer of vLLM outside of a server, for benchmarks: random weights, its own kernel."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from importlib import util
from typing import Any

import torch

from reap_kernels.testing import Case

INSTALL = (
    "vLLM is not installed here; build its environment with `make test-interop ENVS=vllm` and run "
    "`out/interop/vllm/bin/python -m bench vllm_cpu`, or run `pip install reap-kernels[vllm]`"
)
NAME = "model.layers.0.mlp.experts"


def installed() -> bool:
    """Whether vLLM can be imported."""
    return util.find_spec("vllm") is not None


@contextlib.contextmanager
def world(device: torch.device, most_tokens: int) -> Iterator[Any]:
    """vLLM's configuration and groups of one process; yields the configuration.

    Args:
        device: of the layers that are made inside.
        most_tokens: of a call of theirs.
    """
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # leaves the threads as they are
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    config = VllmConfig(device_config=DeviceConfig(device.type))
    config.scheduler_config.max_num_batched_tokens = most_tokens
    backend = "gloo"
    if device.type == "cuda":
        from vllm.v1.worker.workspace import init_workspace_manager

        backend = "nccl"
        init_workspace_manager(device)
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, backend)
        ensure_model_parallel_initialized(1, 1)
        try:
            yield config
        finally:
            cleanup_dist_env_and_memory()


def make(case: Case, dtype: torch.dtype, device: torch.device, name: str = NAME) -> Any:
    """A `MoERunner` with random weights, prepared for its kernel; to be called in `world`."""
    from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            runner = FusedMoEFactory(
                num_experts=case.experts,
                top_k=case.top_k,
                hidden_size=case.hidden,
                intermediate_size=case.intermediate,
                params_dtype=dtype,
                prefix=name,
            )
    finally:
        torch.set_default_dtype(before)
    for parameter in runner.parameters():
        parameter.data.normal_(0, 0.05)
    experts = runner.routed_experts
    experts.quant_method.process_weights_after_loading(experts)
    return runner


@contextlib.contextmanager
def running(config: Any) -> Iterator[None]:
    """Inside, layers may be called: vLLM's context of a forward pass."""
    from vllm.forward_context import set_forward_context

    with set_forward_context(None, config):
        yield
