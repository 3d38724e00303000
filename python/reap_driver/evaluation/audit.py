"""Checks that a pruned checkpoint holds what its plan says: every kept expert, in the plan's order,
with the neurons that it keeps.

Both checkpoints are loaded as models, one decoder layer of each at a time. So this checks the
tensors that the pruned model computes with, and shares no code with the writer.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reap_driver.base.arguments import typed
from reap_driver.compat.decoder_layers import owner_of
from reap_driver.evaluation.audit_experts import SolvedExperts
from reap_driver.files.checkpoint import RECORD, resolve_folder
from reap_driver.load.streamed_model import StreamedModel, open_streamed
from reap_driver.model.adapters import KernelAdapter
from reap_driver.model.discover import MoELayer, adapter_of, find_moe_layers
from reap_driver.model.expert_dims import expert_dims
from reap_driver.model.expert_layout import ExpertDim
from reap_driver.model.routing_table import ID_TABLES
from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.writer.replace import RECORD_FILE
from reap_kernels.errors import PlanError
from reap_kernels.files import is_file


@dataclass(frozen=True)
class Audit:
    """What a comparison of a pruned checkpoint with its original found.

    Attributes:
        problems: one sentence per difference that the plan does not account for.
        solved: layers whose down projections were solved again, so that they are other numbers than
            the original's on purpose.
    """

    problems: list[str]
    solved: list[str]


@typed
def check_permutation(
    original: str | Path,
    pruned: str | Path,
    plan: Plan,
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

    Where the plan removes neurons, gate and up projections must equal the original's in the rows of
    those that stay. Down projections that were solved again, for such a plan or by a re-fit that
    left its record `reap/refit.json`, must have the plan's shape and finite values; their values
    are not compared. Shared experts may have become wider by neurons that are zero.

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
    return audit(original, pruned, plan, sample=sample, trust=trust_remote_code).problems


def audit(
    original: str | Path, pruned: str | Path, plan: Plan, *, sample: int | None, trust: bool
) -> Audit:
    """What `check_permutation` finds, and what was changed on purpose."""
    refitted = is_file(resolve_folder(pruned) / RECORD / RECORD_FILE)
    with (
        open_streamed(original, trust_remote_code=trust) as old,
        open_streamed(pruned, trust_remote_code=trust) as new,
    ):
        return differences_of(old, new, plan, sample, refitted=refitted)


def differences_of(
    old: StreamedModel,
    new: StreamedModel,
    plan: Plan,
    sample: int | None = None,
    *,
    refitted: bool = False,
) -> Audit:
    """What `audit` returns, for checkpoints that are open.

    Args:
        old, new: the original and the pruned model.
        plan, sample: see `check_permutation`.
        refitted: whether down projections were solved again after the plan was applied.
    """
    olds = {layer.name: layer for layer in find_moe_layers(old.model)}
    experts = {name: layer.num_experts for name, layer in olds.items()}
    layers = plan.covering(experts).layers
    dims = _dims(old, experts, layers)
    solved = _solved(olds, new, layers) if plan.compensates or refitted else {}
    pair = _Pair(old, new, layers, dims, solved)
    problems = list(pair.outside())
    if [name for name, _ in old.layers] != [name for name, _ in new.layers]:
        where = [streamed.model.config.name_or_path for streamed in (new, old)]
        return Audit([*problems, f"{where[0]}: has other decoder layers than {where[1]}"], [])
    found = [pair.decoder_layer(index) for index in _spread(len(old.layers), sample)]
    return Audit(
        [*problems, *(text for one in found for text in one.problems)],
        [name for one in found for name in one.solved],
    )


def _solved(
    olds: Mapping[str, MoELayer], new: StreamedModel, layers: Mapping[str, LayerPlan]
) -> dict[str, SolvedExperts]:
    """The layers whose down projections may have been solved again."""
    return {
        layer.name: SolvedExperts(olds[layer.name], layer, layers[layer.name])
        for layer in find_moe_layers(new.model)
        if layer.name in olds and isinstance(adapter_of(layer), KernelAdapter)
    }


def _dims(
    old: StreamedModel, counts: Mapping[str, int], plan: Mapping[str, LayerPlan]
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
    plan: Mapping[str, LayerPlan]
    dims: Mapping[str, ExpertDim]
    solved: Mapping[str, SolvedExperts]

    def outside(self) -> Iterator[str]:
        """Differences in tensors outside the decoder layers."""
        layers = {name for name, _ in self.old.layers}
        old, new = (
            {n: t for n, t in m.model.state_dict().items() if owner_of(n, layers) is None}
            for m in (self.old, self.new)
        )
        yield from self._problems(old, new, set())

    def decoder_layer(self, index: int) -> Audit:
        """Differences in one decoder layer, which is loaded for this and released."""
        tensors: list[dict[str, Tensor]] = []
        for streamed in (self.old, self.new):  # one after the other, to load one at a time
            streamed.ready(index)
            name, module = streamed.layers[index]
            tensors.append({f"{name}.{key}": value for key, value in module.state_dict().items()})
        inside = f"{self.old.layers[index][0]}."
        parts = {name: part for name, part in self.solved.items() if name.startswith(inside)}
        solved = {name: part for name, part in parts.items() if part.solved}
        problems = [text for part in solved.values() for text in part.problems()]
        compared = {tensor for part in solved.values() for tensor in part.tensors}
        problems += self._problems(tensors[0], tensors[1], compared)
        del tensors
        for streamed in (self.old, self.new):
            streamed.release(index)
        return Audit(problems, list(solved))

    def _problems(
        self, old: Mapping[str, Tensor], new: Mapping[str, Tensor], compared: Set[str]
    ) -> Iterator[str]:
        """Differences between the tensors of the same part of both models, but for those that were
        compared elsewhere.
        """
        expected = {self._renamed(name) for name in old} - {None}
        for name in sorted(expected ^ new.keys(), key=str):
            yield f"{name}: is {'missing' if name in expected else 'not in the original'}"
        for name, tensor in old.items():
            other = new.get(self._renamed(name) or "")
            if other is None or name in compared:
                continue
            if name in self.dims:
                yield from self._cut(name, tensor, other)
            elif name.rpartition(".")[2] in ID_TABLES:
                yield from self._relabelled(name, tensor, other)
            elif not (_same(tensor, other) or self._widened(name, tensor, other)):
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

    def _widened(self, name: str, old: Tensor, new: Tensor) -> bool:
        """Whether it is a matrix of a shared expert that only got neurons that are zero."""
        beside = any(
            name.startswith(layer.rpartition(".")[0] + ".") and plan.neurons is not None
            for layer, plan in self.plan.items()
        )
        if not beside or old.dim() != 2 or new.dim() != 2:
            return False
        if sum(a != b for a, b in zip(old.shape, new.shape, strict=True)) != 1:
            return False
        first = new[: len(old), : old.shape[1]]  # all that there is where it is not wider
        return _same(first, old) and int(new.count_nonzero()) == int(old.count_nonzero())

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
