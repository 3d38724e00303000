"""Masks experts in any router, without knowing its formula, so that the model routes as if they did
not exist. Search over plans uses this, and tests compare pruned checkpoints with it.

A router's scores come from one matrix product with its weight (`model.router_products`), and
selection biases have one entry per expert. So the entries of removed experts in every such product,
and in the selection biases, are set to a very low number: softmax and sigmoid then give exactly 0,
and top-k never selects them. -inf would give 0 * inf in some routers.
"""

import contextlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reap_driver.base.arguments import typed
from reap_driver.compat.text_model import text_model, text_prefix
from reap_driver.model.discover import MoELayer, block_of, find_moe_layers
from reap_driver.model.expert_dims import expert_dims, router_weights
from reap_driver.model.expert_layout import ExpertDim
from reap_driver.model.router_products import RouterProducts
from reap_driver.model.routing_table import ID_TABLES, relabel
from reap_driver.model.unwrap import unwrap_model
from reap_driver.writer.plan_checks import check_groups
from reap_kernels.errors import PlanError, UnsupportedModel
from reap_kernels.schema import short


@dataclass(frozen=True)
class _Router:
    """A router's weight: products with it have `length` entries, of which `removed` are masked."""

    name: str
    layer: str
    length: int
    removed: Tensor


class RouterMask(RouterProducts[_Router]):
    """Masks the entries of removed experts in every product with a router's weight.

    Attributes:
        removed: name of a router's weight -> int64 ids of removed experts, on the weight's device.
        unused: names of router weights that were in no product yet.
    """

    def __init__(self, routers: Sequence[tuple[Tensor, _Router]]) -> None:
        super().__init__(routers)
        self.removed = {router.name: router.removed for _, router in routers}
        self.unused = set(self.removed)

    def product(self, out: Tensor, router: _Router) -> Tensor:
        """A product with a router's weight, with the entries of removed experts masked."""
        if out.shape[-1] != router.length:  # a sum over experts, not one entry per expert
            return out
        self.unused.discard(router.name)
        return out.index_fill(-1, router.removed, _low(out.dtype))

    @contextlib.contextmanager
    def checked(self, what: str, module: nn.Module, routers: list[str]) -> Iterator[None]:
        """Inside the context, a forward of `module` that used none of `routers` is refused."""

        def check(*_: Any) -> None:
            if routers and self.unused.issuperset(routers):
                raise UnsupportedModel(
                    f"{what}: ran without a matrix product with its router {routers[0]}, so its "
                    "experts cannot be masked; load the model with plain weights, without hub "
                    "kernels (use_kernels) and without torch.compile"
                )

        handle = module.register_forward_hook(check)
        try:
            yield
        finally:
            handle.remove()


class RouterMasks:
    """Masks one model's routers for many sets of experts; the routers are found once.

    Args:
        model: a loaded MoE model. Its tensors must not be replaced while this is used.

    Attributes:
        model: the model.
        layers: its MoE layers, by name.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model = unwrap_model(model)
        self.layers = {layer.name: layer for layer in find_moe_layers(model)}
        experts = {name: layer.num_experts for name, layer in self.layers.items()}
        self._dims = expert_dims(model, experts)
        self._state = model.state_dict(keep_vars=True)
        self._known: dict[str, _Routing] = {}

    @contextlib.contextmanager
    def keeping(self, kept: Mapping[str, Sequence[int]]) -> Iterator[RouterMask]:
        """See `masked_experts`."""
        layers = self.layers
        removed = {name: ids for name in kept if (ids := _removed(layers, name, kept[name]))}
        routing = {name: self._routing(name) for name in removed}
        routers = [pair for name in removed for pair in routing[name].without(removed[name])]
        mask = RouterMask(routers)
        with contextlib.ExitStack() as stack:
            for name, ids in removed.items():
                for tensor, value in routing[name].selection(ids, layers[name].num_experts):
                    stack.enter_context(_overwritten(tensor, value))
                own = [weight.name for weight in routing[name].weights]
                block = block_of(self.model, layers[name])
                stack.enter_context(mask.checked(name, block, own))
            name, reader = type(self.model).__name__, text_model(self.model)
            prefix = text_prefix(self.model)
            read = [router for router in mask.removed if router.startswith(prefix)]
            stack.enter_context(mask.checked(name, reader, read))
            yield stack.enter_context(mask)

    def _routing(self, name: str) -> "_Routing":
        """The tensors that decide the routing of a layer."""
        if name not in self._known:
            self._known[name] = _find_routing(self.layers[name], self._dims, self._state)
        return self._known[name]


@typed
@contextlib.contextmanager
def masked_experts(
    model: PreTrainedModel, kept: Mapping[str, Sequence[int]]
) -> Iterator[RouterMask]:
    """Inside the context, the model routes as if only the kept experts existed.

    The other experts receive no token, so they cost no time and are not counted by `observe`.
    On exit the model is restored bit by bit. Layers may keep different numbers of experts; layers
    that are not named keep all. Contexts can be nested, and can be inside or around `observe`.
    For many sets of experts, `RouterMasks` does the same and finds the routers only once.

    Args:
        model: a loaded MoE model. Inside the context its selection biases and tables of expert ids
            are overwritten, so nothing else may use the model meanwhile.
        kept: name of an experts module, as in plans and statistics -> ids of the kept experts.

    Yields:
        The mask; its `unused` names router weights that no forward has used yet.

    Raises:
        PlanError: an unknown layer, an id that does not exist or is named twice, or fewer ids than
            the router selects per token.
        UnsupportedModel: a layer whose router is not found, or (while the model runs) a router that
            is used in no matrix product.

    Example:
        >>> with torch.no_grad(), rd.masked_experts(model, plan.kept):
        ...     logits = model(input_ids=ids).logits  # [batch, seq, vocabulary]
    """
    with RouterMasks(model).keeping(kept) as mask:
        yield mask


def _removed(layers: Mapping[str, MoELayer], name: str, kept: Sequence[int]) -> list[int]:
    """The ids of a layer that are not kept, ascending."""
    if name not in layers:
        raise PlanError(
            f"kept: layer {name!r} is none of the model's {len(layers)} MoE layers (first "
            f"{next(iter(layers))!r}); use the names that find_moe_layers gives"
        )
    layer, ids = layers[name], _ids(name, kept)
    bad = next((e for e in ids if not 0 <= e < layer.num_experts), None)
    if bad is not None:
        raise PlanError(
            f"kept: layer {name!r} names expert {bad}, outside [0, {layer.num_experts}); name "
            "experts of this model"
        )
    twice = next((e for e in ids if ids.count(e) > 1), None)
    if twice is not None:
        raise PlanError(f"kept: layer {name!r} names expert {twice} twice; name each once")
    if len(ids) < layer.top_k:
        raise PlanError(
            f"kept: layer {name!r} keeps {len(ids)} experts, but a token is routed to "
            f"{layer.top_k}; keep at least {layer.top_k}"
        )
    if layer.n_group > 1:
        check_groups(layer, ids)
    return sorted(set(range(layer.num_experts)) - set(ids))


def _ids(name: str, kept: Any) -> list[int]:
    """Ids of experts as Python integers, also from a tensor, whose elements are not hashable by
    value.

    Raises:
        PlanError: they are not integers.
    """
    try:
        if isinstance(kept, str) or any(isinstance(expert, bool) for expert in kept):
            raise TypeError
        return [operator.index(expert) for expert in kept]
    except TypeError as error:
        raise PlanError(
            f"kept: layer {name!r} has {short(kept)}, which are not expert ids; give a list of "
            "integers"
        ) from error


@dataclass(frozen=True)
class _Weight:
    """A router's weight: a matrix outside the experts with one row per expert."""

    name: str
    tensor: Tensor
    length: int


@dataclass(frozen=True)
class _Routing:
    """The tensors that decide the routing of a layer.

    Attributes:
        layer: name of the layer.
        weights: weights of its routers.
        biases: selection biases, each with its dimension of experts.
        tables: name -> tensor of expert ids.
    """

    layer: str
    weights: list[_Weight]
    biases: list[tuple[Tensor, int]]
    tables: dict[str, Tensor]

    def without(self, removed: list[int]) -> Iterator[tuple[Tensor, _Router]]:
        """The weights of the layer's routers, each with its masked experts."""
        for weight in self.weights:
            rows = torch.tensor(removed, device=weight.tensor.device)
            yield weight.tensor, _Router(weight.name, self.layer, weight.length, rows)

    def selection(self, removed: list[int], experts: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Other tensors that decide the selection, and their values without the removed experts."""
        for tensor, dim in self.biases:
            rows = torch.tensor(removed, device=tensor.device)
            yield tensor, tensor.detach().index_fill(dim, rows, _low(tensor.dtype))
        kept = torch.tensor(sorted(set(range(experts)) - set(removed)))
        for name, tensor in self.tables.items():
            table = tensor.detach().cpu().numpy()
            table = relabel(table, kept.tolist(), experts, first_row=0, where=name)
            yield tensor, kept[torch.from_numpy(table).long()]


def _find_routing(
    layer: MoELayer, dims: Mapping[str, ExpertDim], state: Mapping[str, Tensor]
) -> _Routing:
    """Finds the tensors that decide the routing of a layer.

    Raises:
        UnsupportedModel: no router weight is found, or an integer tensor may hold expert ids in an
            unknown way.
    """
    found = _Routing(layer.name, [], [], {})
    for name in router_weights(layer.name, dims, state):
        weight = state[name]
        _check_resident(name, weight)
        found.weights.append(_Weight(name, weight, weight.shape[dims[name].dim]))
    if not found.weights:
        raise UnsupportedModel(
            f"{layer.name}: no matrix in its block has one row per expert, so its router cannot be "
            "masked; prune the checkpoint instead (apply_plan)"
        )
    block = layer.name.rpartition(".")[0] + "."
    for name, tensor in state.items():
        known = dims.get(name)
        if not name.startswith(block):
            continue
        if known is not None and known.layer == layer.name and _is_bias(name, tensor, known):
            _check_resident(name, tensor)
            found.biases.append((tensor, known.dim))
        elif known is None and tensor.dtype in (torch.int32, torch.int64):
            _check_resident(name, tensor)
            if name.rpartition(".")[2] not in ID_TABLES:
                raise UnsupportedModel(
                    f"{name}: this tensor of integers ({tensor.dtype} {list(tensor.shape)}) in the "
                    f"block of {layer.name} may hold expert ids in a way that this version does "
                    "not know, so its router cannot be masked; prune the checkpoint instead "
                    "(apply_plan)"
                )
            found.tables[name] = tensor
    return found


def _is_bias(name: str, tensor: Tensor, dim: ExpertDim) -> bool:
    """Whether a tensor is a vector of biases, one per expert."""
    return dim.block == 1 and tensor.numel() == tensor.shape[dim.dim] and "bias" in name


def _check_resident(name: str, tensor: Tensor) -> None:
    """Raises UnsupportedModel for a tensor that is offloaded."""
    if tensor.is_meta:
        raise UnsupportedModel(
            f"{name}: is offloaded (on the meta device between calls), so routing cannot be "
            "masked; keep the routers on a device, by device_map"
        )


@contextlib.contextmanager
def _overwritten(tensor: Tensor, values: Tensor) -> Iterator[None]:
    """Inside the context, the tensor holds other values."""
    before = tensor.detach().clone()
    try:
        with torch.no_grad():
            tensor.copy_(values)
        yield
    finally:
        with torch.no_grad():
            tensor.copy_(before)


def _low(dtype: torch.dtype) -> float:
    """A value below every score that stays finite when a bias is added, in float16 too."""
    return max(-1e9, torch.finfo(dtype).min / 2)
