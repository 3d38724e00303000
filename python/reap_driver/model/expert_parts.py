"""Which tensor of an experts module holds which part of its experts, and writing new values there.

Adapters give the matrices of every kind of module as views. Here the views are of tensors that
stand in for the module's own, so that writing through them gives tensors in the module's layout,
whatever that is: stacked, transposed, gate and up interleaved, or one module per expert.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reap_driver.model.adapters import KernelAdapter
from reap_driver.model.discover import MoELayer, adapter_of
from reap_kernels import Activation, ExpertWeights
from reap_kernels.errors import PlanError, UnsupportedModel
from reap_kernels.types import Matrices

DOWN = "down"
PARTS = ("up", "gate", "up_bias", "gate_bias", DOWN)  # attributes of `ExpertWeights`
_ANY = Activation("opaque", fn=lambda rows: rows)  # views do not depend on it


@dataclass(frozen=True)
class NewExperts:
    """What the experts of a layer become.

    Attributes:
        kept: ids of the experts that stay, ascending.
        neurons: of each of them, the neurons that stay, ascending; None if all do.
    """

    kept: tuple[int, ...]
    neurons: tuple[tuple[int, ...], ...] | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of kept experts that change."""
        return (DOWN,) if self.neurons is None else PARTS


def matrices_in(layer: MoELayer) -> ExpertWeights:
    """The matrices of a layer's experts where they are now, as views; without their activation.

    Raises:
        UnsupportedModel: the module does not say which matrix is which.
    """
    return _adapter(layer).weights(layer.module, _ANY)


def holders(layer: MoELayer) -> dict[str, str]:
    """Tensor of the model -> which of `PARTS` it holds, for the tensors of a layer that hold one.

    Raises:
        UnsupportedModel: the module does not say which matrix is which, or does not hold a part in
            tensors of its own.
    """
    weights = matrices_in(layer)
    tensors = {_storage(tensor): name for name, tensor in layer.module.named_parameters()}
    found: dict[str, str] = {}
    for part in PARTS:
        for view in _views(getattr(weights, part)):
            name = tensors.get(_storage(view))
            if name is None:
                raise UnsupportedModel(
                    f"{layer.name}: {type(layer.module).__name__} holds `{part}` of its experts in "
                    "no tensor of its own, so new values cannot be written; apply plans that "
                    "remove whole experts only."
                )
            found[f"{layer.name}.{name}"] = part
    return found


def down_views(layer: MoELayer, experts: Sequence[int] | None = None) -> list[Tensor]:
    """Down projections [H, I] of a layer's experts, as views of the model's own tensors, which may
    be written.

    Args:
        layer: of a model in memory.
        experts: ids; None for all.

    Raises:
        UnsupportedModel: they are computed from other tensors.
    """
    down = matrices_in(layer).down
    views = [down[expert] for expert in (range(layer.num_experts) if experts is None else experts)]
    _check_own(layer, views, "down projections")
    return views


def part_views(layer: MoELayer) -> tuple[ExpertWeights, dict[str, list[Tensor]]]:
    """All tensors of a layer's experts, as views of the model's own tensors, which may be written.

    Returns:
        What they are views of, and by attribute of `ExpertWeights` a view for each expert.

    Raises:
        UnsupportedModel: some are computed from other tensors.
    """
    weights = matrices_in(layer)
    found = {part: _views(getattr(weights, part)) for part in (*PARTS, "down_bias")}
    for part, views in found.items():
        _check_own(layer, views, f"`{part}`")
    return weights, {part: views for part, views in found.items() if views}


def _check_own(layer: MoELayer, views: Sequence[Tensor], what: str) -> None:
    own = {tensor.untyped_storage().data_ptr() for tensor in layer.module.parameters()}
    if any(view.untyped_storage().data_ptr() not in own for view in views):
        raise UnsupportedModel(
            f"{layer.name}: its {what} are computed from other tensors, so they cannot "
            "be replaced; load the model with plain weights"
        )


@torch.no_grad()
def fill(
    layer: MoELayer,
    part: str,
    new: Mapping[str, Tensor],
    change: NewExperts,
    source: tuple[MoELayer, Mapping[str, Tensor]] | Tensor,
) -> None:
    """Writes one part of a layer's experts into tensors that take the place of the layer's own.

    Args:
        layer: of the smaller model.
        part: one of `PARTS`.
        new: tensor of the model -> zeros of its shape; written in place.
        change: which experts and neurons stay.
        source: the layer of the original model and the tensors that hold the part there, of which
            rows are taken; or for `DOWN` the new values, [E', H, I'].

    Raises:
        PlanError: the new values have another shape than the layer, or one that is not finite.
    """
    targets = _views(getattr(_standing_in(layer, new), part))
    if isinstance(source, Tensor):
        values = _checked(layer, source, (len(targets), *targets[0].shape), targets[0].dtype)
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)
        return
    old, tensors = source
    weights = _standing_in(old, tensors)
    views = _views(getattr(weights, part))
    assert change.neurons is not None  # otherwise nothing but DOWN changes
    for target, expert, neurons in zip(targets, change.kept, change.neurons, strict=True):
        target.copy_(views[expert][_rows(weights, part, neurons)])


def _rows(weights: ExpertWeights, part: str, neurons: Sequence[int]) -> Tensor:
    """The rows of a part that neurons have in an expert's matrix or bias, in its order."""
    rows = neuron_rows(weights, part)[list(neurons)]
    return (rows if weights.interleaved else rows.mT).flatten()


def neuron_rows(weights: ExpertWeights, part: str) -> Tensor:
    """The rows of each neuron in an expert's matrix or bias of one of `PARTS` but `DOWN`.

    Returns:
        int64 [I, 1], or [I, 2] where `up` is fused: the row of the gate, and that of up.
    """
    ids = torch.arange(weights.intermediate_size)
    fused = part.startswith("up") and weights.gate is None
    if not fused or _views(weights.up)[0].shape[0] == weights.intermediate_size:
        return ids[:, None]
    if weights.interleaved:
        return torch.stack((2 * ids, 2 * ids + 1), dim=1)
    return torch.stack((ids, weights.intermediate_size + ids), dim=1)


def _checked(layer: MoELayer, values: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """New values in the dtype of the checkpoint."""
    if tuple(values.shape) != shape:
        raise PlanError(
            f"{layer.name}: new down projections of shape {list(values.shape)} are given, the "
            f"checkpoint has {list(shape)} (experts, hidden size, neurons); make them for this plan"
        )
    stored = values.to("cpu", dtype)
    if not bool(stored.isfinite().all()):
        raise PlanError(
            f"{layer.name}: new down projections have values that are not finite in {dtype}; solve "
            "them with a larger ridge"
        )
    return stored


def _standing_in(layer: MoELayer, tensors: Mapping[str, Tensor]) -> ExpertWeights:
    """A layer's weights with these tensors in place of the module's own, which stay as they are."""
    [dtype] = {tensor.dtype for tensor in tensors.values()}
    module = copy.deepcopy(layer.module).to(dtype)  # on the meta device
    for name, tensor in tensors.items():
        path, _, leaf = name.removeprefix(f"{layer.name}.").rpartition(".")
        parameter = nn.Parameter(tensor, requires_grad=False)
        module.get_submodule(path)._parameters[leaf] = parameter
    return _adapter(layer).weights(module, _ANY)


def _adapter(layer: MoELayer) -> KernelAdapter:
    adapter = adapter_of(layer)
    if not isinstance(adapter, KernelAdapter):
        raise UnsupportedModel(
            f"{layer.name}: the code of this model does not say which matrix of an expert is its "
            "down projection, so new values cannot be written; apply plans that remove whole "
            "experts only."
        )
    return adapter


def _views(matrices: Matrices | None) -> list[Tensor]:
    """One view per expert; none where there is no such part."""
    return [] if matrices is None else list(matrices)


def _storage(tensor: Tensor) -> int:
    """Identifies what a tensor is a view of, also on the meta device."""
    return tensor.untyped_storage()._cdata
