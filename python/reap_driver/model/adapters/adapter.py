"""The interface of adapters for kinds of experts modules, and of the recorder that they use."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from reap_driver.compat.experts_interface import Forward, GroupedForm
from reap_driver.model.adapters.expert_parallel import ExpertSlice, slice_of
from reap_kernels import Activation, ExpertWeights, LayerGram, LayerStats
from reap_kernels.errors import UnsupportedModel

# An nn.Module whose attributes depend on its kind; adapters know them.
ExpertsModule = Any

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Sizes:
    """Number of experts E, hidden size H and intermediate size I, from a module's weights."""

    num_experts: int
    hidden_size: int
    intermediate_size: int


@dataclass(frozen=True)
class ExpertCall:
    """What the experts of a layer were given in one call, in R rows of T tokens.

    Attributes:
        hidden: [R, H] in the dtype that the experts compute in.
        ids: int [R, k], the experts that each row is routed to.
        weights: [R, k], their router weights.
        mask: bool [T], the tokens that count; None for all.
        tokens: int64 [R], the token of each row; None where the rows are the tokens.
    """

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    mask: Tensor | None
    tokens: Tensor | None = None


class Sample(NamedTuple):
    """Tokens whose output is compared with the module's own, on the device that computes them.

    Attributes:
        rows: int64 [n], their indices among the T of a call.
        counted: int64, how many of the T count; if none does, the comparison says nothing. None
            if all count.
    """

    rows: Tensor
    counted: Tensor | None


class Recorder(Protocol):
    """Records the statistics of one layer during an observation (`observation.layer_recorder`)."""

    def observe(
        self,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        eager: Forward,
        grouped: Callable[[], GroupedForm | None] | None = None,
    ) -> Tensor:
        """The routed output [T, H] of a call, which is recorded. Compares the first call with
        `eager`, the module's own code, or where that of its kind was compared, with its grouped
        form.
        """
        ...

    def routed(self, ids: Tensor, weights: Tensor) -> None:
        """Receives the routing of every call, ids and router weights [T, k], if the block
        has it.
        """
        ...

    def operands(self, hidden: Tensor) -> tuple[Tensor, ExpertWeights]:
        """The rows [T, H] and the module's weights in the dtype that the model computes in, which
        autocast may change. The weights are read at every call, since offloading moves them.
        """
        ...

    def watch(self, hidden: Tensor, mask: Tensor | None) -> None:
        """Receives the rows [T, H] of every call and which of them count: [T] bool, or None
        for all.
        """
        ...

    def token_mask(self, tokens: int, device: torch.device) -> Tensor | None:
        """[tokens] bool, True for tokens that count; None if all do."""
        ...

    def open(self, device: torch.device) -> tuple[LayerStats, int]:
        """The layer's statistics and the current group's index."""
        ...

    def gram(self, device: torch.device) -> LayerGram | None:
        """The layer's Gram sums, to add to; None where none are asked for."""
        ...

    def computed(self, call: ExpertCall, out: Tensor) -> Tensor:
        """Receives what the experts were given and the output of every row [R, H], once it is
        compared; what it returns takes its place.
        """
        ...

    def compare(self, sample: Sample, ours: Tensor, own: Tensor) -> None:
        """Receives computed rows and the module's own. Once the forward has ended, raises
        UnsupportedModel unless they are equal to the tolerance of the dtype.
        """
        ...

    def sample(self, tokens: int, mask: Tensor | None, device: torch.device) -> Sample | None:
        """The tokens to compare in the first call with counted tokens; None afterwards."""
        ...

    @property
    def backend(self) -> str | None:
        """The requested backend; None for the default."""
        ...

    @property
    def name(self) -> str:
        """Name of the layer."""
        ...

    @property
    def top_k(self) -> int:
        """Number of experts that a token is routed to."""
        ...


class Adapter(ABC):
    """Supports one kind of experts module: recognizes it, describes its weights, binds a
    recorder.
    """

    name: str

    @abstractmethod
    def serves(self, module: ExpertsModule, block: ExpertsModule) -> bool:
        """Whether `module`, a child of `block`, is of this kind."""

    @abstractmethod
    def sizes(self, module: ExpertsModule) -> Sizes:
        """The sizes E, H and I, also for weights on the meta device."""

    @abstractmethod
    def bind(
        self, module: ExpertsModule, block: ExpertsModule, recorder: Recorder
    ) -> AbstractContextManager[None]:
        """Inside, calls of the module go through `recorder`."""

    def check(self, name: str, module: ExpertsModule) -> None:
        """Raises UnsupportedModel if the module cannot be observed correctly."""
        check_tensors(name, module)

    def local(self, module: ExpertsModule) -> ExpertSlice | None:
        """The experts in this process, if the module is spread over several; None for all."""
        return None

    @property
    def takes_mask(self) -> bool:
        """Whether a token mask can exclude tokens from the statistics of this kind of module."""
        return True

    @property
    def takes_gram(self) -> bool:
        """Whether the inputs of the down projections, of which Gram matrices are, are at hand."""
        return True


class KernelAdapter(Adapter):
    """A kind of experts that the kernel library computes, given a description of their weights."""

    @abstractmethod
    def activation(self, module: ExpertsModule) -> Activation:
        """The function between an expert's matrix products, found by probing the module's
        own function.
        """

    @abstractmethod
    def weights(self, module: ExpertsModule, activation: Activation) -> ExpertWeights:
        """Views of the module's weights where they are now."""


def check_tensors(name: str, module: ExpertsModule, local: ExpertSlice | None = None) -> None:
    """Raises UnsupportedModel unless all tensors of a module are ordinary float tensors, unsharded.

    Quantized weights have other values than those that are stored. From a shard of an expert, the
    norm of the expert's output cannot be computed.

    Args:
        name: name of the module.
        module: the module.
        local: its experts in this process, if its kind supports expert parallelism.
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
                "it for the formats in docs/formats.md; elsewhere pass a quantization_config with "
                "dequantize=True)"
            )


def _is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, without importing torch.distributed."""
    return any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__)


@contextlib.contextmanager
def forward_replaced(
    module: ExpertsModule, forward: Callable[..., Any], method: str = "forward"
) -> Any:
    """Inside, a method of one module instance is replaced, for kinds without the experts interface.

    accelerate's hook keeps the method that it wraps as `_old_forward` and loads weights before
    calling it; if the hook is present, `_old_forward` is replaced.
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
