"""What an adapter knows about one kind of experts module, and what it may ask of the recorder."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from reap_driver.compat.experts_interface import Forward
from reap_driver.model.adapters.expert_parallel import ExpertSlice, slice_of
from reap_kernels import Activation, ExpertWeights, LayerStats
from reap_kernels.errors import UnsupportedModel

# An nn.Module whose attributes differ by kind: adapters know which they are.
ExpertsModule = Any

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Sizes:
    """E, H and I of one experts module, as its weights have them."""

    num_experts: int
    hidden_size: int
    intermediate_size: int


class Recorder(Protocol):
    """Statistics of one layer, during one observation; made by `observe.py`, used by adapters."""

    def observe(self, hidden: Tensor, ids: Tensor, weights: Tensor, eager: Forward) -> Tensor:
        """Routed output [T, H] of a call, recorded; the first call is compared with `eager`."""
        ...

    def routed(self, ids: Tensor, weights: Tensor) -> None:
        """Told the routing of every call, ids and weights [T, k], where the block says it."""
        ...

    def operands(self, hidden: Tensor) -> tuple[Tensor, ExpertWeights]:
        """The rows [T, H] and the module's weights as they lie now (fetched at every call, since
        offloading moves them), in the dtype that the model computes in: autocast's inside it.
        """
        ...

    def watch(self, hidden: Tensor, mask: Tensor | None) -> None:
        """Told the rows [T, H] of every call and which of them count, [T] bool or None for all."""
        ...

    def token_mask(self, tokens: int, device: torch.device) -> Tensor | None:
        """[tokens] bool, those that count; None for all."""
        ...

    def open(self, device: torch.device) -> tuple[LayerStats, int]:
        """The layer's statistics and the current group's index."""
        ...

    def compare(self, own: Tensor, eager: Tensor) -> None:
        """Refuse unless our rows equal the module's own within the dtype's tolerance."""
        ...

    def sample(self, tokens: int, mask: Tensor | None) -> Tensor | None:
        """Rows to compare on the first call with counted tokens; None once compared."""
        ...

    @property
    def backend(self) -> str | None:
        """Backend that was asked for."""
        ...

    @property
    def name(self) -> str:
        """Name of the layer."""
        ...

    @property
    def top_k(self) -> int:
        """Experts a token is routed to."""
        ...


class Adapter(ABC):
    """One kind of experts module: recognise it, describe its weights, bind a recorder to it."""

    name: str

    @abstractmethod
    def serves(self, module: ExpertsModule, block: ExpertsModule) -> bool:
        """Whether `module`, a child of `block`, is of this kind."""

    @abstractmethod
    def sizes(self, module: ExpertsModule) -> Sizes:
        """E, H, I; works on meta tensors."""

    @abstractmethod
    def bind(
        self, module: ExpertsModule, block: ExpertsModule, recorder: Recorder
    ) -> AbstractContextManager[None]:
        """Inside the context, calls of the module go through `recorder`; undone on exit."""

    def check(self, name: str, module: ExpertsModule) -> None:
        """Raises UnsupportedModel if the module cannot be observed correctly."""
        check_tensors(name, module)

    def local(self, module: ExpertsModule) -> ExpertSlice | None:
        """Which experts this process holds, of a module spread over several; None for all."""
        return None

    @property
    def takes_mask(self) -> bool:
        """Whether tokens can be left out of the statistics of this kind of module."""
        return True


class KernelAdapter(Adapter):
    """A kind whose experts the kernel library computes, from a description of their weights."""

    @abstractmethod
    def activation(self, module: ExpertsModule) -> Activation:
        """The function between the two products, found by probing the module's own."""

    @abstractmethod
    def weights(self, module: ExpertsModule, activation: Activation) -> ExpertWeights:
        """Views of the module's weights as they lie now."""


def check_tensors(name: str, module: ExpertsModule, local: ExpertSlice | None = None) -> None:
    """Raises UnsupportedModel unless every tensor below `module` is a plain, whole, float tensor.

    Quantised weights would be read as numbers they are not; a shard of an expert gives a part of
    its output, and a norm of a part is no part of the norm.

    Args:
        name: the module's.
        module: it.
        local: which of its experts are here, if its kind can be observed so.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for leaf, tensor in tensors:
        if _is_sharded(tensor) and local is None:
            where = getattr(tensor, "placements", "?")
            if slice_of(module) is not None:
                raise UnsupportedModel(
                    f"{name}.{leaf} is sharded by expert ({where}), and {type(module).__name__} is "
                    "not on transformers' experts interface, so it is observed whole or not at "
                    "all; load the model without expert parallelism"
                )
            raise UnsupportedModel(
                f"{name}.{leaf} is sharded ({where}): a shard of an expert gives no norm; load the "
                "model without tensor parallelism or FSDP, or spread its experts whole "
                "(DistributedConfig(enable_expert_parallel=True))"
            )
        tensor = tensor if local is None else tensor.to_local()
        kind = type(tensor)
        plain = kind in (Tensor, nn.Parameter, nn.Buffer) and tensor.dtype in _FLOATS
        if not plain:
            raise UnsupportedModel(
                f"{name}.{leaf} is a {kind.__name__} of {tensor.dtype}, not plain bf16, fp16, "
                "fp32 or fp64 numbers; load the model dequantized (reap_driver's load_model does "
                "it for FP8, MXFP4 and compressed-tensors; elsewhere pass a quantization_config "
                "with dequantize=True)"
            )


def _is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a torch.distributed DTensor, without importing distributed."""
    return any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__)


@contextlib.contextmanager
def forward_replaced(
    module: ExpertsModule, forward: Callable[..., Any], method: str = "forward"
) -> Any:
    """Replaces a method of one module instance, for kinds the experts interface does not cover.

    accelerate keeps the method it wrapped as `_old_forward` and loads weights around it, so with
    its hook in place that is the one to replace.
    """
    slot = "_old_forward" if method == "forward" and "_old_forward" in vars(module) else method
    missing = object()
    before = vars(module).get(slot, missing)
    setattr(module, slot, forward)
    try:
        yield
    finally:
        if before is missing:
            delattr(module, slot)
        else:
            setattr(module, slot, before)
