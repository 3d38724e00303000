"""Observes a model and sums vectors of its experts beside the statistics."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.base.arguments import typed
from reap_driver.merging.vectors import LayerVectors, logit_products, output_sums
from reap_driver.model.adapters import ExpertCall, KernelAdapter
from reap_driver.model.discover import MoELayer, adapter_of
from reap_driver.model.expert_dims import expert_dims, router_weights
from reap_driver.model.router_products import RouterProducts
from reap_driver.observation.layer_recorder import LayerRecorder
from reap_driver.observation.observer import Observer
from reap_kernels.errors import UnsupportedModel, UsageError

OUTPUTS, LOGITS = "output_sum", "logit_products"


class VectorObserver(Observer):
    """The context that `observe_vectors()` returns: an observer that sums vectors too.

    Attributes:
        outputs, logits: which are summed.

    Example:
        >>> with rd.observe_vectors(model, outputs=False) as observer:
        ...     observer(input_ids=ids)
        >>> observer.vectors["model.layers.0.mlp.experts"].logit_similarity.shape
        torch.Size([32, 32])
    """

    def __init__(
        self, model: PreTrainedModel, backend: str | None, *, outputs: bool, logits: bool
    ) -> None:
        super().__init__(model, backend)
        self.outputs, self.logits = outputs, logits
        for layer in self.layers:
            _check(layer)
        self._vectors = {layer.name: _Recorder(self, layer) for layer in self.layers}
        self._recorders = dict(self._vectors)
        routers = _routers(self.model, self.layers) if logits else {}
        self._logits = _RouterLogits(routers, self._vectors)

    def __enter__(self) -> "VectorObserver":
        super().__enter__()
        if self.logits:
            self._exit.enter_context(self._logits)
        return self

    @property
    def vectors(self) -> dict[str, LayerVectors]:
        """{layer: its vectors so far}, on the CPU, of layers that tokens reached.

        Raises:
            DataError: an expert's output was NaN or Inf.
            UnsupportedModel: a layer ran without a matrix product with its router's weight.
        """
        self.check_finite()
        reached = {name: one for name, one in self._vectors.items() if one.reached}
        return {name: one.vectors() for name, one in reached.items()}


class _Recorder(LayerRecorder):
    """Statistics and vectors of one layer. Those of a forward are kept apart until the next one
    begins, so that a forward that fails leaves nothing.
    """

    _observation: VectorObserver

    def __init__(self, observation: VectorObserver, layer: MoELayer) -> None:
        super().__init__(observation, layer)
        self._sums: dict[str, Tensor] = {}
        self._new: dict[str, Tensor] = {}
        self._number = 0  # of the forward that `_new` is of

    def computed(self, call: ExpertCall, out: Tensor) -> Tensor:
        if not self._observation.outputs:
            return out
        if call.tokens is not None:
            raise UnsupportedModel(
                f"{self.name}: each expert of a token is given an input of its own, so its output "
                "for tokens of other experts is not defined; use outputs=False"
            )
        rows, experts = self.operands(call.hidden)
        counted = rows if call.mask is None else rows[call.mask]
        self._add(OUTPUTS, output_sums(counted, experts, self.backend))
        return out

    def routed_by(self, logits: Tensor) -> None:
        """Receives what the router's product gave, [..., E and perhaps more]."""
        rows = logits.detach().flatten(0, -2)[:, : self._layer.num_experts]
        mask = self.token_mask(len(rows), rows.device)
        self._add(LOGITS, logit_products(rows if mask is None else rows[mask]))

    def undo(self, forward: int) -> None:
        super().undo(forward)
        if self._number == forward:
            self._new = {}

    def vectors(self) -> LayerVectors:
        """The sums so far."""
        stats = self.local(len(self._observation.groups)).total()
        sums = {name: tensor.cpu() for name, tensor in self._together().items()}
        if self._observation.logits and LOGITS not in sums:
            raise UnsupportedModel(
                f"{self.name}: ran without a matrix product with its router, so its logits are not "
                "seen; load the model with plain weights, without hub kernels (use_kernels) and "
                "without torch.compile, or use logits=False"
            )
        return LayerVectors(int(stats.tokens), stats.count[0], **sums)

    def _add(self, name: str, sums: Tensor) -> None:
        if self._number != self._observation.forwards:
            self._sums, self._new = self._together(), {}
            self._number = self._observation.forwards
        self._new[name] = sums + self._new[name] if name in self._new else sums

    def _together(self) -> dict[str, Tensor]:
        """The sums of all forwards that are complete, and of the last one."""
        both = dict(self._sums)
        for name, sums in self._new.items():
            both[name] = sums + both[name].to(sums.device) if name in both else sums
        return both


class _RouterLogits(RouterProducts[MoELayer]):
    """Gives recorders the logits of their layers' routers.

    Args:
        routers: name of each layer -> the weight of its router, and the layer.
        recorders: of all layers.
    """

    def __init__(
        self,
        routers: Mapping[str, tuple[Tensor, MoELayer]],
        recorders: Mapping[str, _Recorder],
    ) -> None:
        super().__init__(list(routers.values()))
        self._lengths = {name: len(weight) for name, (weight, _) in routers.items()}
        self._recorders = recorders

    def product(self, out: Tensor, router: MoELayer) -> Tensor:
        """The product as it is, once it is recorded."""
        if out.shape[-1] == self._lengths[router.name]:  # else a sum over experts
            self._recorders[router.name].routed_by(out)
        return out


def _routers(model: PreTrainedModel, layers: list[MoELayer]) -> dict[str, tuple[Tensor, MoELayer]]:
    """The weight of each layer's router, with the layer.

    Raises:
        UnsupportedModel: a layer has no router, or several.
    """
    dims = expert_dims(model, {layer.name: layer.num_experts for layer in layers})
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    found = {}
    for layer in layers:
        names = list(router_weights(layer.name, dims, state))
        if len(names) != 1 or state[names[0]].shape[0] < layer.num_experts:
            raise UnsupportedModel(
                f"{layer.name}: {len(names)} matrices in its block have a row per expert, so its "
                "router's logits are not known; use logits=False"
            )
        found[layer.name] = state[names[0]], layer
    return found


def _check(layer: MoELayer) -> None:
    """Raises UnsupportedModel unless all experts of a layer can be computed for any token."""
    if layer.local is not None:
        raise UnsupportedModel(
            f"{layer.name} is spread over ranks by expert, where no vectors are summed; load the "
            "model without expert parallelism"
        )
    if not isinstance(adapter_of(layer), KernelAdapter):
        raise UnsupportedModel(
            f"{layer.name} computes its experts inside its block, where they cannot be computed "
            "for other tokens, nor merged; use a model class that transformers ships"
        )


@typed
def observe_vectors(
    model: PreTrainedModel,
    *,
    outputs: bool = True,
    logits: bool = True,
    backend: str | None = None,
) -> VectorObserver:
    """Collects what merging experts needs, beside the statistics of `observe`, in all forwards of
    `model` inside the context.

    Args:
        model: see `observe`; with its experts in the memory of this process.
        outputs: sum the outputs of every expert over all tokens, which HC-SMoE needs. That computes
            every expert for every token, E / k times the experts' work for k of E experts a token.
            Memory: E * H float64 per layer.
        logits: sum products of router logits, which M-SMoE needs. Memory: E * E float64 per layer.
        backend: see `observe`.

    Returns:
        The observer: call it with a batch to run the model, read `vectors` for the vectors and
        `stats` for the statistics.

    Raises:
        UsageError: neither is asked for, or `model` is not a model.
        UnsupportedModel: see `find_moe_layers`; or the experts or their router cannot be seen.

    Example:
        >>> with rd.observe_vectors(model) as obs:
        ...     obs(input_ids=ids)  # int64 [batch, seq]
        >>> obs.vectors["model.layers.0.mlp.experts"].mean_outputs.shape
        torch.Size([32, 160])
    """
    if not (outputs or logits):
        raise UsageError(
            "observe_vectors is asked for neither outputs nor logits; ask for one, or use observe"
        )
    return VectorObserver(model, backend, outputs=outputs, logits=logits)
