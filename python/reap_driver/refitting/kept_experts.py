"""Which experts of its original a pruned model has kept, by the rows of their routers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.model.discover import MoELayer, find_moe_layers
from reap_driver.model.expert_dims import expert_dims, router_weights
from reap_driver.model.expert_layout import ExpertDim
from reap_kernels.errors import CheckpointError, UnsupportedModel


class KeptExperts:
    """Finds the experts of an original, layer by layer.

    Args:
        original, pruned: the models, whose decoder layers may be on the meta device now.

    Raises:
        CheckpointError: they differ in more than the number and width of experts.
        UnsupportedModel: see `expert_dims`.
    """

    def __init__(self, original: PreTrainedModel, pruned: PreTrainedModel) -> None:
        self._models = pruned, original
        layers, others = (
            {layer.name: layer for layer in find_moe_layers(model)} for model in self._models
        )
        for name, layer in layers.items():
            self._check(layer, others.get(name))
        self._dims = [
            expert_dims(model, {name: layer.num_experts for name, layer in found.items()})
            for model, found in zip(self._models, (layers, others), strict=True)
        ]

    def of(self, name: str) -> tuple[int, ...]:
        """Ids in the original of the experts of a layer, which is loaded in both models.

        Raises:
            CheckpointError: a row of the pruned router is none of the original's.
            UnsupportedModel: the layer's router is not found.
        """
        state, other = (model.state_dict(keep_vars=True) for model in self._models)
        routers = list(router_weights(name, self._dims[0], state))
        if not routers:
            raise UnsupportedModel(
                f"{name}: no matrix in its block has one row per expert, so which experts were "
                "kept is not known; use the model as it was pruned"
            )
        dtypes = [state[router].dtype for router in routers]
        left: dict[bytes, list[int]] = {}
        for expert, row in enumerate(_rows(routers, self._dims[1], other, dtypes)):
            left.setdefault(row, []).append(expert)
        kept = []
        for expert, row in enumerate(_rows(routers, self._dims[0], state, dtypes)):
            if not left.get(row):
                raise self.refusal(f"row {expert} of its {routers[0]} is no row there")
            kept.append(left[row].pop(0))
        return tuple(kept)

    def refusal(self, why: str) -> CheckpointError:
        """The error that the one model is no cut of the other."""
        pruned, original = (
            str(model.config.name_or_path or type(model).__name__) for model in self._models
        )
        return CheckpointError(
            f"{pruned} is not a cut of {original}: {why}; give the original that it was made from, "
            "whose routers were not changed since"
        )

    def _check(self, layer: MoELayer, other: MoELayer | None) -> None:
        """Raises CheckpointError unless a layer may be a cut of one of the original."""
        if other is None:
            raise self.refusal(f"only the one has experts in {layer.name}")
        for size in ("num_experts", "hidden_size", "intermediate_size"):
            own, most = getattr(layer, size), getattr(other, size)
            if own > most or (size == "hidden_size" and own != most):
                raise self.refusal(f"{layer.name} has a {size} of {own}, there it is {most}")


def _rows(
    routers: Sequence[str],
    dims: Mapping[str, ExpertDim],
    state: Mapping[str, Tensor],
    dtypes: Sequence[torch.dtype],
) -> list[bytes]:
    """The bits of what the routers have of each expert."""
    rows: list[bytes] = []
    for router, dtype in zip(routers, dtypes, strict=True):
        dim = dims[router]
        found = state[router].detach().movedim(dim.dim, 0)[: dim.experts].to("cpu", dtype)
        parts = [row.contiguous().view(torch.uint8).numpy().tobytes() for row in found]
        rows = [a + b for a, b in zip(rows, parts, strict=True)] if rows else parts
    return rows
