"""Whether a pruned checkpoint holds what its plan says: every kept expert, in the plan's order.

Both checkpoints are loaded as models are, one decoder layer of each at a time, so this checks what
the pruned model will compute with, by none of the rules it was written by.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reap_driver.base.arguments import typed
from reap_driver.compat.decoder_layers import owner_of
from reap_driver.load.streamed_model import StreamedModel, open_streamed
from reap_driver.model.discover import find_moe_layers
from reap_driver.model.expert_dims import expert_dims
from reap_driver.model.expert_layout import ExpertDim
from reap_driver.model.routing_table import ID_TABLES
from reap_driver.plan.plan import LayerPlan, Plan
from reap_kernels.errors import PlanError


@typed
def check_permutation(
    original: str | Path,
    pruned: str | Path,
    plan: "Plan",
    *,
    sample: int | None = None,
    trust_remote_code: bool = False,
) -> list[str]:
    """Compare a pruned checkpoint with its original, bit by bit.

    Every row of a router, every entry of its biases and every tensor of an expert must be the
    original's, in the order of the plan's kept ids; rows behind the experts (identity experts,
    shared ones) and all other tensors must be the same. Tables of expert ids by token must name
    kept experts by their new numbers. Quantised weights are compared as the numbers they stand for.
    Tensors that the models do not load (multi-token-prediction layers) are not looked at.

    Args:
        original: folder or hub id; of it and of the other, memory holds one decoder layer.
        pruned: folder or hub id.
        plan: what was applied.
        sample: how many decoder layers to look at, spread evenly; None for all.
        trust_remote_code: run model code that comes with the checkpoints.

    Returns:
        What differs, a sentence each; empty if nothing does.

    Raises:
        PlanError: the plan was not made for the original.
        CheckpointError, UnsupportedModel: a checkpoint cannot be loaded.
    """
    trust = trust_remote_code
    with (
        open_streamed(original, trust_remote_code=trust) as old,
        open_streamed(pruned, trust_remote_code=trust) as new,
    ):
        experts = {layer.name: layer.num_experts for layer in find_moe_layers(old.model)}
        layers = plan.covering(experts).layers
        pair = _Pair(old, new, layers, _dims(old, experts, layers))
        problems = list(pair.outside())
        if [name for name, _ in old.layers] != [name for name, _ in new.layers]:
            return [*problems, f"{pruned}: has other decoder layers than {original}"]
        for index in _spread(len(old.layers), sample):
            problems += pair.decoder_layer(index)
    return problems


def _dims(
    old: StreamedModel, counts: Mapping[str, int], plan: Mapping[str, "LayerPlan"]
) -> dict[str, ExpertDim]:
    """Where the original holds experts, once the plan is known to be its own."""
    for name, count in counts.items():
        planned = plan[name].num_experts
        if planned != count:
            raise PlanError(
                f"plan: counts {planned} experts in {name!r}, the original has {count}; use the "
                "plan that was made for this model"
            )
    return expert_dims(old.model, counts)


def _spread(total: int, sample: int | None) -> Sequence[int]:
    """All of `total` indices, or some, evenly from the first to the last."""
    if sample is None or sample >= total:
        return range(total)
    return sorted({round(i * (total - 1) / max(1, sample - 1)) for i in range(sample)})


@dataclass(frozen=True)
class _Pair:
    """Two models, and where the larger one holds experts."""

    old: StreamedModel
    new: StreamedModel
    plan: Mapping[str, "LayerPlan"]
    dims: Mapping[str, ExpertDim]

    def outside(self) -> Iterator[str]:
        """Problems of what is in no decoder layer."""
        layers = {name for name, _ in self.old.layers}
        old, new = (
            {n: t for n, t in m.model.state_dict().items() if owner_of(n, layers) is None}
            for m in (self.old, self.new)
        )
        yield from self._problems(old, new)

    def decoder_layer(self, index: int) -> list[str]:
        """Problems of one decoder layer, which is loaded for that."""
        tensors = []
        for streamed in (self.old, self.new):  # one after the other: the library loads one at once
            streamed.ready(index)
            name, module = streamed.layers[index]
            tensors.append({f"{name}.{key}": value for key, value in module.state_dict().items()})
        problems = list(self._problems(*tensors))
        del tensors
        for streamed in (self.old, self.new):
            streamed.release(index)
        return problems

    def _problems(self, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Iterator[str]:
        """What differs between the tensors of the same part of both models."""
        expected = {self._renamed(name) for name in old} - {None}
        for name in sorted(expected ^ new.keys(), key=str):
            yield f"{name}: is {'missing' if name in expected else 'of no tensor of the original'}"
        for name, tensor in old.items():
            other = new.get(self._renamed(name) or "")
            if other is None:
                continue
            if name in self.dims:
                yield from self._cut(name, tensor, other)
            elif name.rpartition(".")[2] in ID_TABLES:
                yield from self._relabelled(name, tensor, other)
            elif not _same(tensor, other):
                yield f"{name}: differs from the original"

    def _renamed(self, name: str) -> str | None:
        """What a tensor is called in the pruned model; None for a removed expert's."""
        layer = owner_of(name, self.plan)
        number, _, leaf = name[len(layer) + 1 :].partition(".") if layer else ("", "", "")
        if layer is None or not number.isdigit():  # not of one expert in a list
            return name
        kept = self.plan[layer].kept
        return f"{layer}.{kept.index(int(number))}.{leaf}" if int(number) in kept else None

    def _cut(self, name: str, old: Tensor, new: Tensor) -> Iterator[str]:
        """Problems of a tensor that holds all experts of a layer."""
        where, kept = self.dims[name], self.plan[self.dims[name].layer].kept
        shape = list(old.shape)
        shape[where.dim] = where.length(len(kept))
        if list(new.shape) != shape:
            yield f"{name}: has shape {list(new.shape)}, the plan leaves {shape}"
            return
        rows = [(old_id * where.block, rank * where.block) for rank, old_id in enumerate(kept)]
        parts = [(*pair, where.block, f"expert {e}") for pair, e in zip(rows, kept, strict=True)]
        tail = (where.experts * where.block, len(kept) * where.block, where.tail, "what follows")
        for first, other, length, what in (*parts, tail):
            if not _same(
                old.narrow(where.dim, first, length), new.narrow(where.dim, other, length)
            ):
                yield f"{name}: {what} (row {first}) is not what row {other} holds now"

    def _relabelled(self, name: str, old: Tensor, new: Tensor) -> Iterator[str]:
        """Problems of a table [rows, k] of expert ids."""
        layer = next(e for e in self.plan if name.startswith(e.rpartition(".")[0] + "."))
        kept = torch.tensor(self.plan[layer].kept)
        if old.shape != new.shape or not bool(((new >= 0) & (new < len(kept))).all()):
            yield f"{name}: names experts outside [0, {len(kept)}), or has another shape"
            return
        stays = torch.isin(old.cpu(), kept)
        if not torch.equal(kept[new.cpu().long()][stays], old.cpu().long()[stays]):
            yield f"{name}: names other experts than the plan's new numbers"


def _same(left: Tensor, right: Tensor) -> bool:
    """Equal dtype, shape and bits."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    pair = (side.detach().contiguous().view(-1).view(torch.uint8) for side in (left, right))
    return torch.equal(*pair)
