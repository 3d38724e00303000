"""Puts a plan into the original model in memory, so that it computes what the pruned checkpoint
computes: routers masked, and the down projections of kept experts replaced. Puts the matrices of a
re-fit into the pruned model.

A neuron that the plan removes gets a column of zeros, so it adds nothing, as if it were not there.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.base.arguments import typed
from reap_driver.evaluation.router_masks import RouterMask, RouterMasks
from reap_driver.load.streamed_model import StreamedModel
from reap_driver.model.adapters.adapter import KernelAdapter
from reap_driver.model.discover import MoELayer, adapter_of, find_moe_layers
from reap_driver.model.expert_parts import down_views
from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.writer.plan_matrices import matrices_of
from reap_kernels.errors import PlanError, UnsupportedModel


class PlannedModel:
    """A plan for one model in memory, ready to be put into it many times.

    Holds the plan's matrices in the dtype and on the devices of the model.

    Args:
        masks: router masks of the model, whose tensors must not be replaced while this is used.
        plan: of the model.
        matrices: {layer: [E', H, I'] down projections of the kept experts}, or their folder; None
            for a plan that keeps experts as they are.

    Raises:
        PlanError: plan or matrices do not fit the model.
        UnsupportedModel: the experts' weights are not in this process's memory.
    """

    def __init__(
        self,
        masks: RouterMasks,
        plan: Plan,
        matrices: Mapping[str, Tensor] | str | Path | None = None,
    ) -> None:
        self.plan = plan
        self._masks = masks
        found = matrices_of(plan, matrices) or {}
        self._experts = [
            _Experts(masks.layers[name], layer, found[name])
            for name, layer in plan.layers.items()
            if name in found and name in masks.layers  # the masks refuse unknown layers
        ]

    @property
    def model(self) -> PreTrainedModel:
        """The original."""
        return self._masks.model

    @contextlib.contextmanager
    def active(self) -> Iterator[RouterMask]:
        """See `compensated`."""
        with contextlib.ExitStack() as stack:
            mask = stack.enter_context(self._masks.keeping(self.plan.kept))
            for experts in self._experts:
                stack.enter_context(experts.replaced())
            yield mask


class RefittedModel:
    """A pruned model in memory and new down projections, which can be put into it many times.

    Args:
        model: the pruned model.
        matrices: {layer: [E', H, I'] down projections of all its experts}.

    Raises:
        PlanError: the matrices do not fit the model.
        UnsupportedModel: the experts' weights are not in this process's memory.
    """

    def __init__(self, model: PreTrainedModel, matrices: Mapping[str, Tensor]) -> None:
        self.model = model
        layers = _layers(model, matrices)
        self._experts = [_all_experts(layer, matrices[name]) for name, layer in layers.items()]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the model has the new down projections."""
        with contextlib.ExitStack() as stack:
            for experts in self._experts:
                stack.enter_context(experts.replaced())
            yield


def refitted_layers(
    streamed: StreamedModel, matrices: Mapping[str, Tensor]
) -> Callable[[int], None]:
    """Puts new down projections into a layer of a streamed model that was just loaded.

    Args:
        streamed: the pruned model; see `StreamedModel.loaded`.
        matrices: {layer: [E', H, I'] down projections of all its experts}.

    Raises:
        PlanError: the model has no such layer.
    """
    layers = _layers(streamed.model, matrices)

    def put(index: int) -> None:
        inside = f"{streamed.layers[index][0]}."
        for name, layer in layers.items():
            if name.startswith(inside):
                _all_experts(layer, matrices[name]).write()

    return put


@typed
@contextlib.contextmanager
def compensated(
    model: PreTrainedModel,
    plan: Plan,
    matrices: Mapping[str, Tensor] | str | Path | None = None,
) -> Iterator[RouterMask]:
    """Inside the context, a model computes what the checkpoint of a plan computes.

    Its routers choose among the kept experts only, as in `masked_experts`, and the down projections
    of these are replaced by the plan's matrices, with zeros for the neurons that the plan removes.
    On exit, also by an exception, the model is restored bit by bit. Contexts can be nested.

    Memory: inside, the replaced down projections are kept aside where they are, E' H I numbers per
    layer, which is about a third of the kept experts' weights; and the matrices, E' H I' numbers.

    Args:
        model: a loaded MoE model, with its experts in memory. Nothing else may use it meanwhile.
        plan: of the model.
        matrices: {layer: [E', H, I'] floating point, output x input, per kept expert}, or the
            folder beside the plan's file; None for a plan that keeps experts as they are.

    Yields:
        The mask of the routers, as `masked_experts` does.

    Raises:
        PlanError: plan or matrices do not fit the model, or matrices are missing.
        UnsupportedModel: experts are offloaded, spread over processes, or of a kind whose matrices
            are not known; or routers cannot be masked.

    Example:
        >>> name = "model.layers.0.mlp.experts"
        >>> down = model.get_submodule(name).down_proj.detach()  # [32, 160, 48]
        >>> half = tuple(range(0, 48, 2))
        >>> layer = rd.LayerPlan.keeping(32, tuple(range(16)), 48, (half,) * 16)
        >>> narrow = rd.Plan({}, "mine", "uniform", 0.75, {name: layer}, "")
        >>> with torch.no_grad(), rd.compensated(model, narrow, {name: down[:16, :, ::2]}):
        ...     logits = model(input_ids=ids).logits  # [batch, seq, vocabulary]
    """
    with PlannedModel(RouterMasks(model), plan, matrices).active() as mask:
        yield mask


class _Experts:
    """The kept experts of one layer with their new down projections."""

    def __init__(self, layer: MoELayer, plan: LayerPlan, down: Tensor) -> None:
        self._layer, self._kept = layer, plan.kept
        check_resident(layer)
        if not isinstance(adapter_of(layer), KernelAdapter):
            raise UnsupportedModel(
                f"{layer.name}: its experts run inside their block, and which of their matrices is "
                "the down projection is not known; use a model class that transformers ships"
            )
        if plan.width not in (None, layer.intermediate_size):
            raise PlanError(
                f"plan: has experts of {plan.width} neurons in {layer.name!r}, the model's have "
                f"{layer.intermediate_size}; use the plan that was made for this model"
            )
        neurons = plan.neurons or (tuple(range(layer.intermediate_size)),) * len(plan.kept)
        shape = (len(plan.kept), layer.hidden_size, len(neurons[0]))
        if tuple(down.shape) != shape:
            raise PlanError(
                f"matrices: those of layer {layer.name!r} are {list(down.shape)}, in this model "
                f"they are {list(shape)} (experts kept, hidden size, neurons kept)"
            )
        like = self._views()[0]
        self._down = down.to(like.device, like.dtype)
        self._columns = torch.tensor(neurons, device=like.device)

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        """Inside, the kept experts have the new down projections."""
        saved: list[tuple[Tensor, Tensor]] = []
        try:
            with torch.no_grad():
                for view, columns, new in zip(
                    self._views(), self._columns, self._down, strict=True
                ):
                    saved.append((view, view.clone()))
                    view.zero_().index_copy_(1, columns, new)
            yield
        finally:
            with torch.no_grad():
                for view, before in saved:
                    view.copy_(before)

    def write(self) -> None:
        """Gives the kept experts the new down projections, for good."""
        with torch.no_grad():
            for view, columns, new in zip(self._views(), self._columns, self._down, strict=True):
                view.zero_().index_copy_(1, columns, new)

    def _views(self) -> Sequence[Tensor]:
        return down_views(self._layer, self._kept)


def _layers(model: PreTrainedModel, names: Iterable[str]) -> dict[str, MoELayer]:
    """The MoE layers of a model that matrices are for.

    Raises:
        PlanError: the model has no layer of a name.
    """
    found = {layer.name: layer for layer in find_moe_layers(model)}
    unknown = next((name for name in names if name not in found), None)
    if unknown is not None:
        raise PlanError(
            f"matrices: {unknown!r} is no MoE layer of the model; use those that were made for it"
        )
    return {name: found[name] for name in names}


def _all_experts(layer: MoELayer, down: Tensor) -> _Experts:
    """All experts of a layer, with new down projections of all their neurons."""
    every = tuple(range(layer.num_experts))
    return _Experts(layer, LayerPlan.keeping(layer.num_experts, every), down)


def check_resident(layer: MoELayer) -> None:
    """Raises UnsupportedModel unless all experts of a layer are in the memory of this process."""
    if layer.local is not None:
        raise UnsupportedModel(
            f"{layer.name}: its experts are spread over processes, and their weights are replaced "
            "in one; load the model without expert parallelism"
        )
    if any(tensor.is_meta for tensor in layer.module.parameters()):
        raise UnsupportedModel(
            f"{layer.name}: is offloaded (on the meta device between calls), so its experts' "
            "weights cannot be replaced; use a machine that holds the model, or write the "
            "checkpoint and load that"
        )
