"""Checks that a pruned checkpoint holds what its plan says: every kept expert, in the plan's order.

Both checkpoints are loaded as models, one decoder layer of each at a time. So this checks the
tensors that the pruned model computes with, and shares no code with the writer.
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
from reap_driver.planning.plan import LayerPlan, Plan
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
    """Compares a pruned checkpoint with its original, bit by bit.

    Every row of a router, every entry of its biases and every tensor of an expert must equal the
    original's, in the order of the plan's kept ids. Rows behind those of the experts (identity or
    shared experts) and all other tensors must be unchanged. Tables of expert ids per token must
    name kept experts by their new ids. Quantized weights are compared dequantized. Tensors that the
    models do not load (multi-token-prediction layers) are not compared.

    Memory holds one decoder layer of each checkpoint at a time.

    Args:
        original: folder or hub id of the original checkpoint.
        pruned: folder or hub id of the pruned checkpoint.
        plan: the plan that was applied.
        sample: how many decoder layers to compare, spread evenly; None compares all.
        trust_remote_code: run model code that comes with the checkpoints.

    Returns:
        One sentence per difference; empty if there is none.

    Raises:
        PlanError: the plan was not made for the original.
        CheckpointError: a checkpoint cannot be read.
        UnsupportedModel: a checkpoint cannot be loaded as a model this version knows.

    Example:
        >>> report = rd.apply_plan("MODEL", plan, "checked")
        >>> rd.check_permutation("MODEL", "checked", plan)
    """
    trust = trust_remote_code
    with (
        open_streamed(original, trust_remote_code=trust) as old,
        open_streamed(pruned, trust_remote_code=trust) as new,
    ):
        return differences_of(old, new, plan, sample)


def differences_of(
    old: StreamedModel, new: StreamedModel, plan: "Plan", sample: int | None = None
) -> list[str]:
    """What `check_permutation` returns, for checkpoints that are open."""
    experts = {layer.name: layer.num_experts for layer in find_moe_layers(old.model)}
    layers = plan.covering(experts).layers
    pair = _Pair(old, new, layers, _dims(old, experts, layers))
    problems = list(pair.outside())
    if [name for name, _ in old.layers] != [name for name, _ in new.layers]:
        where = [streamed.model.config.name_or_path for streamed in (new, old)]
        return [*problems, f"{where[0]}: has other decoder layers than {where[1]}"]
    for index in _spread(len(old.layers), sample):
        problems += pair.decoder_layer(index)
    return problems


def _dims(
    old: StreamedModel, counts: Mapping[str, int], plan: Mapping[str, "LayerPlan"]
) -> dict[str, ExpertDim]:
    """Where the original stores its experts, after a check that the plan fits it."""
    for name, count in counts.items():
        planned = plan[name].num_experts
        if planned != count:
            raise PlanError(
                f"plan: has {planned} experts in {name!r}, but the original has {count}; use the "
                "plan that was made for this model"
            )
    return expert_dims(old.model, counts)


def _spread(total: int, sample: int | None) -> Sequence[int]:
    """Indices below `total`: all, or `sample` of them, spread evenly from first to last."""
    if sample is None or sample >= total:
        return range(total)
    return sorted({round(i * (total - 1) / max(1, sample - 1)) for i in range(sample)})


@dataclass(frozen=True)
class _Pair:
    """Both models, and where the original stores its experts."""

    old: StreamedModel
    new: StreamedModel
    plan: Mapping[str, "LayerPlan"]
    dims: Mapping[str, ExpertDim]

    def outside(self) -> Iterator[str]:
        """Differences in tensors outside the decoder layers."""
        layers = {name for name, _ in self.old.layers}
        old, new = (
            {n: t for n, t in m.model.state_dict().items() if owner_of(n, layers) is None}
            for m in (self.old, self.new)
        )
        yield from self._problems(old, new)

    def decoder_layer(self, index: int) -> list[str]:
        """Differences in one decoder layer, which is loaded for this and released."""
        tensors = []
        for streamed in (self.old, self.new):  # one after the other, to load one at a time
            streamed.ready(index)
            name, module = streamed.layers[index]
            tensors.append({f"{name}.{key}": value for key, value in module.state_dict().items()})
        problems = list(self._problems(*tensors))
        del tensors
        for streamed in (self.old, self.new):
            streamed.release(index)
        return problems

    def _problems(self, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Iterator[str]:
        """Differences between the tensors of the same part of both models."""
        expected = {self._renamed(name) for name in old} - {None}
        for name in sorted(expected ^ new.keys(), key=str):
            yield f"{name}: is {'missing' if name in expected else 'not in the original'}"
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
        """Name of a tensor in the pruned model; None for a tensor of a removed expert."""
        layer = owner_of(name, self.plan)
        number, _, leaf = name[len(layer) + 1 :].partition(".") if layer else ("", "", "")
        if layer is None or not number.isdigit():  # not a tensor of one expert in a list
            return name
        kept = self.plan[layer].kept
        return f"{layer}.{kept.index(int(number))}.{leaf}" if int(number) in kept else None

    def _cut(self, name: str, old: Tensor, new: Tensor) -> Iterator[str]:
        """Differences in a tensor that holds all experts of a layer."""
        where, kept = self.dims[name], self.plan[self.dims[name].layer].kept
        shape = list(old.shape)
        shape[where.dim] = where.length(len(kept))
        if list(new.shape) != shape:
            yield f"{name}: has shape {list(new.shape)}, but by the plan it is {shape}"
            return
        rows = [(old_id * where.block, rank * where.block) for rank, old_id in enumerate(kept)]
        parts = [(*pair, where.block, f"expert {e}") for pair, e in zip(rows, kept, strict=True)]
        tail = (where.experts * where.block, len(kept) * where.block, where.tail, "the tail")
        for first, other, length, what in (*parts, tail):
            if not _same(
                old.narrow(where.dim, first, length), new.narrow(where.dim, other, length)
            ):
                yield f"{name}: {what} (row {first}) differs from row {other} of the pruned model"

    def _relabelled(self, name: str, old: Tensor, new: Tensor) -> Iterator[str]:
        """Differences in a table [rows, k] of expert ids."""
        layer = next(e for e in self.plan if name.startswith(e.rpartition(".")[0] + "."))
        kept = torch.tensor(self.plan[layer].kept)
        if old.shape != new.shape or not bool(((new >= 0) & (new < len(kept))).all()):
            yield f"{name}: has ids outside [0, {len(kept)}), or another shape than the original"
            return
        stays = torch.isin(old.cpu(), kept)
        if not torch.equal(kept[new.cpu().long()][stays], old.cpu().long()[stays]):
            yield f"{name}: does not name the kept experts by their new ids"


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether dtype, shape and bits are equal."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    pair = (side.detach().contiguous().view(-1).view(torch.uint8) for side in (left, right))
    return torch.equal(*pair)
