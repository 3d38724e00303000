"""One MoE layer of vLLM outside of a server, for benchmarks: random weights, its own kernel, and
our plugin's hooks around it.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from importlib import util
from typing import Any

import torch
from torch import Tensor

from bench.gpu.verify import CheckFailed
from reap_kernels.testing import Case

INSTALL = (
    "vLLM is not installed here; build its environment with `make test-interop ENVS=vllm` and run "
    "`out/interop/vllm/bin/python -m bench vllm_cpu`, or run `pip install reap-kernels[vllm]`"
)
# Kinds of calls: without hooks, and in the two modes of observing; others are named by who calls.
ALONE, OBSERVED = ("alone", "again"), ("replace", "shadow")


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


def make(case: Case, dtype: torch.dtype, device: torch.device, name: str) -> Any:
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


class Hooked:
    """A layer with hooks, and a pass of one request; to be made and called in `running`.

    Args:
        case: sizes, and tokens of the pass.
        dtype: of weights and inputs.
        device: where the layer is.
        name: of the layer; each in a process has its own.
        inputs: different ones, which calls take in turn.
    """

    def __init__(
        self, case: Case, dtype: torch.dtype, device: torch.device, name: str, inputs: int = 1
    ) -> None:
        from reap_driver.integrations.vllm.engine.layer import HookedLayer
        from reap_driver.integrations.vllm.engine.step import Step

        self.case, self.device = case, device
        self.runner = make(case, dtype, device, name)
        self._plain = self.runner._forward_entry
        self.step = Step(max_tokens=case.tokens, device=device)
        self.layer = HookedLayer(name, self.runner, self.step)
        rng = torch.Generator(device).manual_seed(0)

        def normal(columns: int) -> Tensor:
            return torch.randn(case.tokens, columns, generator=rng, device=device).to(dtype)

        self.inputs = [(normal(case.hidden), normal(case.experts)) for _ in range(inputs)]
        # A quarter of the experts, where enough are left.
        self.mask = list(range(0, case.experts, 4)) if case.experts >= 2 * case.top_k else [0]

    def call(self, number: int = 0) -> Tensor:
        """One call of the layer, with the `number`-th input."""
        hidden, logits = self.inputs[number % len(self.inputs)]
        found: Tensor = self.runner(hidden.clone(), logits)
        return found

    def enter(self, kind: str) -> None:
        """Makes the next calls of this kind: one of `ALONE` or `OBSERVED`, `off`, `opaque` (off,
        through the operator that hides the layer from torch.compile) or `masked`.
        """
        from reap_driver.integrations.vllm.engine.compiled import make_opaque
        from reap_driver.integrations.vllm.engine.step import Batch

        self.step.leave()
        self.step.stop()
        self.layer.remove()
        self.runner._forward_entry = self._plain
        if kind in ALONE:
            return
        self.layer.install()
        if kind == "opaque":
            make_opaque(self.runner)
        self.layer.set_mask(self.mask if kind == "masked" else [])
        if kind in OBSERVED:
            self.step.start(kind)
            self.layer.reset()
            self.layer.begin(1)
        self.step.enter()
        tokens = self.case.tokens
        self.step.fill(Batch(["1"], [tokens], [0], torch.arange(tokens, device=self.device)))

    def checked(self, kinds: Sequence[str]) -> float:
        """The largest difference of an observed output, relative to the largest output.

        Args:
            kinds: to be timed, the first without hooks.

        Raises:
            CheckFailed: a kind does not do what it says: hooks that are off, or the mode `shadow`,
                change a bit, a mask changes none, or rows were not counted.
        """
        outputs, said = {}, {}
        routed = self.case.tokens * self.case.top_k
        for kind in kinds:
            self.enter(kind)
            outputs[kind] = self.call().float()
            stats, error = self.layer.stats, self.layer.error
            counted = 0 if stats is None else int(stats.count.sum())
            if kind in OBSERVED and counted != routed:
                said[kind] = error or f"{counted} rows of {routed} were counted"
        want = outputs[kinds[0]]
        for kind in kinds:
            same = torch.equal(outputs[kind], want)
            if kind == "masked" and same:
                raise CheckFailed("masked: the output is that without a mask")
            if kind not in ("masked", "replace") and not same:
                raise CheckFailed(f"{kind}: the output has other bits than without hooks")
            if kind in said:
                raise CheckFailed(f"{kind}: {said[kind]}")
        return float((outputs["replace"] - want).abs().max() / want.abs().max())
