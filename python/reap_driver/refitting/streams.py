"""Runs a model over batches one decoder layer at a time; its layers are in memory or loaded one by
one.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reap_driver.load.streamed_model import text_layers_first
from reap_driver.model.unwrap import unwrap_model
from reap_driver.observation.batch_state import BatchState
from reap_driver.observation.layer_runner import LayerRunner
from reap_driver.observation.observer import Observer
from reap_driver.observation.state_store import StateStore
from reap_kernels.errors import UnsupportedModel


class LayeredModel(Protocol):
    """A model whose decoder layers run one at a time: a `StreamedModel` or a `ResidentModel`."""

    model: PreTrainedModel
    device: torch.device

    @property
    def text_layers(self) -> list[tuple[str, nn.Module]]:
        """Qualified names and modules of the decoder layers that a forward runs."""
        ...

    def prefetch(self, layer: int) -> None:
        """Starts to load a layer."""
        ...

    def ready(self, layer: int, timeout: float | None = None) -> bool:
        """Waits up to `timeout` seconds for a layer's weights; returns whether they are loaded."""
        ...

    def release(self, layer: int) -> None:
        """Frees a layer's weights."""
        ...


class ResidentModel:
    """A model in memory, whose layers need no loading.

    Args:
        model: in evaluation mode.

    Raises:
        UnsupportedModel: it has no list of decoder layers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = unwrap_model(model)
        self.device: torch.device = self.model.device
        self.text_layers = text_layers_first(self.model)

    def prefetch(self, layer: int) -> None:
        """Does nothing."""

    def ready(self, layer: int, timeout: float | None = None) -> bool:
        """Always."""
        return True

    def release(self, layer: int) -> None:
        """Does nothing."""


@dataclass(frozen=True)
class Stream:
    """One of the two models, and the states of its batches between two layers.

    Attributes:
        layers: the model.
        observer: calls it.
        store: the states.
        runner: runs a layer.
    """

    layers: LayeredModel
    observer: Observer
    store: StateStore
    runner: LayerRunner

    @classmethod
    def of(cls, layers: LayeredModel, observer: Observer, store: StateStore) -> "Stream":
        """The stream of a model."""
        return cls(layers, observer, store, LayerRunner(layers.text_layers))

    @contextlib.contextmanager
    def bound(self) -> Iterator[None]:
        """Inside, `run` may be called."""
        with self.observer, self.runner.bound():
            yield

    def run(
        self, layer: int, inputs: Mapping[str, Tensor], state: BatchState | None
    ) -> BatchState | None:
        """Runs one layer on a batch; see `LayerRunner.run`."""
        return self.runner.run(layer, lambda: self.observer(**inputs), state)


def hidden_of(state: BatchState, name: str) -> Tensor:
    """The hidden states [batch, seq, H] in the output of a layer.

    Raises:
        UnsupportedModel: the layer's output is something else.
    """
    tensor = state.tensors[_place(state, name)]
    if tensor.dim() != 3 or not tensor.is_floating_point():
        raise UnsupportedModel(
            f"{name} returns {list(tensor.shape)} of {tensor.dtype}, not one residual stream "
            "[batch, seq, hidden], so what its experts lack is not known; use the model as it was "
            "pruned"
        )
    return tensor


def with_hidden(state: BatchState, hidden: Tensor, name: str) -> BatchState:
    """A state with other hidden states."""
    tensors = list(state.tensors)
    tensors[_place(state, name)] = hidden
    return replace(state, tensors=tensors)


def _place(state: BatchState, name: str) -> int:
    """Which tensor of a state is the first that its layer returned."""
    part = state.skeleton["output"]
    while True:
        [(kind, value)] = part.items()
        if kind == "tensor":
            return int(value)
        if kind not in ("list", "tuple") or not value:
            raise UnsupportedModel(
                f"{name} returns a {kind}, not hidden states first; use the model as it was pruned"
            )
        part = value[0]
