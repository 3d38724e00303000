"""Observes a pruned model, and keeps what its experts were given, for their re-fit."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.compensation.rows import ExpertRows
from reap_driver.model.adapters import ExpertCall
from reap_driver.observation.gram_sums import check_gram
from reap_driver.observation.layer_recorder import LayerRecorder
from reap_driver.observation.observer import Observer
from reap_kernels import ExpertWeights, LayerGram
from reap_kernels.errors import UnsupportedModel

GramOf = Callable[[str, torch.device], LayerGram | None]


def no_sums(_: str, __: torch.device) -> None:
    """The sums of a batch that adds to none."""


class CapturingObserver(Observer):
    """An observer that keeps the last call of each layer's experts.

    Args:
        model: the pruned model.
        backend: of the products; None for the best one.

    Attributes:
        calls: layer -> what its experts were given in this forward.
        sums: gives the sums of a layer, on a device, that the current batch adds to; None for none.
        added: what is added to the output of every token, float32 [T, H]; None for nothing.

    Raises:
        UnsupportedModel: see `find_moe_layers`; or what enters the down projections is not seen, or
            is no wider or narrower than the residual stream.
    """

    def __init__(self, model: PreTrainedModel, backend: str | None) -> None:
        super().__init__(model, backend, fuse=False)  # as the original runs
        check_gram(self.layers)
        for layer in self.layers:
            if layer.norm_space != "output":
                raise UnsupportedModel(
                    f"{layer.name}: its experts work on vectors of {layer.hidden_size} numbers, "
                    "narrower than the residual stream, so what their output lacks is not known; "
                    "use the model as it was pruned"
                )
        self.calls: dict[str, ExpertCall] = {}
        self.sums: GramOf = no_sums
        self.added: Tensor | None = None
        self._recorders = {layer.name: _Recorder(self, layer) for layer in self.layers}

    def weights(self, name: str) -> ExpertWeights:
        """The weights of a layer where they are now, as views."""
        return self._recorders[name].weights()

    def take(self) -> dict[str, ExpertCall]:
        """The calls of this forward, which are let go of."""
        taken, self.calls = self.calls, {}
        return taken


class _Recorder(LayerRecorder):
    """Statistics of one layer, of which a `CapturingObserver` keeps the calls."""

    _observation: CapturingObserver

    def gram(self, device: torch.device) -> LayerGram | None:
        return self._observation.sums(self.name, device)

    def computed(self, call: ExpertCall, out: Tensor) -> Tensor:
        observer = self._observation
        if self.name in observer.calls:
            raise UnsupportedModel(
                f"{self.name} runs twice in one forward, so what its output lacks is not known; "
                "use the model as it was pruned"
            )
        observer.calls[self.name] = call
        if observer.added is None:
            return out
        added = observer.added if call.tokens is None else observer.added[call.tokens]
        return (out.float() + added).to(out.dtype)


def rows_of(name: str, call: ExpertCall, missing: Tensor, *, held_out: bool) -> ExpertRows:
    """What the experts of a layer were given, by token.

    Args:
        name: of the layer.
        call: of its experts.
        missing: float32 [T, H], what is to be added to the layer's output.
        held_out: whether the batch is held out.

    Raises:
        UnsupportedModel: the experts were given other tokens than the layer, or each expert of a
            token an input of its own.
    """
    hidden, ids, weights = call.hidden, call.ids, call.weights
    if call.tokens is not None:
        if len(call.tokens.unique()) < len(call.tokens):
            raise UnsupportedModel(
                f"{name}: the experts of a token are given inputs that differ, of which no joint "
                "re-fit is possible; use the model as it was pruned"
            )
        hidden, ids, weights = (
            part.new_zeros(len(missing), part.shape[1]).index_copy_(0, call.tokens, part)
            for part in (hidden, ids, weights)
        )  # a token without an expert is routed with weight 0, which counts as none
    if hidden.shape != missing.shape:
        raise UnsupportedModel(
            f"{name} was given {list(hidden.shape)} (tokens, width), its decoder layer returns "
            f"{list(missing.shape)}, so what the experts lack is not known; use the model as it "
            "was pruned"
        )
    return ExpertRows(hidden, ids, weights, missing, call.mask, held_out)
