"""What torch.compile must know of the hooks: a layer that it does not trace, and a cache key.

vLLM calls its MoE layers as one opaque operator everywhere but on the CPU, where torch.compile
traces through them: hooks would be frozen in the state that they had then, without an error.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch

import reap_kernels as rk

KEY = "reap_kernels"
SOURCES = Path(__file__).parent  # of the hooks: what a graph holds follows from them


def make_opaque(runner: Any) -> None:
    """Makes torch.compile call a layer as it is. To be called before the model is compiled."""
    operators = torch.ops.vllm
    alone = runner.shared_experts is None
    runner._forward_entry = operators.moe_forward if alone else operators.moe_forward_shared


def mark() -> dict[str, str]:
    """What distinguishes compiled code with these hooks from vLLM's own and other versions'."""
    return {KEY: f"{rk.__version__}-{_digest(SOURCES)}"}


@functools.cache
def _digest(folder: Path) -> str:
    """12 hexadecimal digits over the names and texts of the sources in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


class _Marked:
    """An additional configuration of another plugin, which has a hash of its own, with our mark."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def compute_hash(self) -> str:
        return f"{self._inner.compute_hash()}-{mark()[KEY]}"


def enter_cache_key(vllm_config: Any) -> None:
    """Adds the plugin to what compiled code is cached by, of Inductor and ahead of time.

    To be called before the model is built. A second call changes nothing.

    Args:
        vllm_config: of the worker; its `additional_config` is part of `compute_hash()`.
    """
    found = vllm_config.additional_config
    if isinstance(found, dict):
        vllm_config.additional_config = {**found, **mark()}
    elif not isinstance(found, _Marked):
        vllm_config.additional_config = _Marked(found)
