"""Decides, for every tensor of a checkpoint, what pruning does to it.

Keys that transformers loads are cut by the derived layout. Keys that it ignores go with the expert
that they belong to, whatever their names; those of routers and stacked experts are cut by the known
layouts of the quantizer that wrote them (layouts.py). A key in a MoE block that none of this
explains is refused: copying it could write a checkpoint that is wrong without an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from reap_driver.compat.conversion import KeyMap, Target
from reap_driver.files.quantization import PACKED, Quantization
from reap_driver.files.safetensors_file import TensorEntry
from reap_driver.model.expert_layout import ExpertDim, ExpertLayout
from reap_driver.model.routing_table import ID_TABLES
from reap_driver.writer import layouts
from reap_driver.writer.actions import (
    Action,
    Copy,
    Drop,
    ExpertList,
    Relabel,
    Select,
    list_prefixes,
)
from reap_driver.writer.layouts import Matrix, Stored
from reap_driver.writer.mtp import Cut, MtpKeys, MtpLayer
from reap_kernels.errors import CheckpointError, PlanError, UnsupportedModel

_INTEGERS = frozenset({"U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})


@dataclass
class KeyActions:
    """The decision for every key, and the per-expert lists found on disk."""

    actions: dict[str, Action] = field(default_factory=dict)
    lists: dict[str, ExpertList] = field(default_factory=dict)  # by prefix "...experts."
    mtp: dict[str, MtpLayer] = field(default_factory=dict)  # MTP layers with experts, if written
    mtp_keys: list[str] = field(default_factory=list)  # of all MTP layers, written or not

    @property
    def mtp_written(self) -> list[str]:
        """Keys of MTP layers that are written."""
        return [key for key in self.mtp_keys if not isinstance(self.actions[key], Drop)]

    def dropped(self, reason: str) -> list[str]:
        """Keys dropped for a reason."""
        return [k for k, a in self.actions.items() if isinstance(a, Drop) and a.reason == reason]


class KeyDecider:
    """Chooses an action for every tensor of one checkpoint.

    Args:
        tensors: every tensor of the source.
        old, new: key rules of the model with all and with the kept experts.
        layout: which model tensors hold experts, and where.
        kept: kept ids of each layer, ascending.
        quantization: what config.json says of the quantizer.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorEntry],
        old: KeyMap,
        new: KeyMap,
        layout: ExpertLayout,
        kept: Mapping[str, tuple[int, ...]],
        quantization: Quantization = Quantization(),  # noqa: B008 - immutable
    ) -> None:
        self._tensors, self._old, self._new = tensors, old, new
        self._layout, self._kept, self._quantization = layout, kept, quantization
        self._old_shapes, self._new_shapes = old.shapes, new.shapes
        self._modules = _module_paths(self._old_shapes)
        self._covered: set[str] = set()  # layout tensors found on disk
        self._cuts: dict[str, Cut] = {}  # disk key -> how experts are taken out of it

    def decide(self, mtp: MtpKeys) -> KeyActions:
        """Decides every key; MTP layers last, because their rules are learned from the main layers.

        Raises:
            CheckpointError: experts or routers are missing, or have another shape than config.json
                gives them.
            UnsupportedModel: a tensor of a MoE block is of an unknown kind.
            PlanError: the plan counts other experts than an MTP layer has.
        """
        result = KeyActions()
        pending: list[str] = []
        for key in self._tensors:
            if self._listed(key, result.lists):
                continue
            target = self._old.locate(key)
            if not self._old.known(target) and mtp.owns(key, target.name):
                pending.append(key)
            else:
                result.actions[key] = self._action(key, target)
        for prefix, experts in result.lists.items():
            result.actions.update(self._renumber(prefix, experts))
        self._check_covered()
        mtp.learn(self._cuts, result.lists, result.actions)
        decided = mtp.decide(pending, self._tensors)
        result.actions.update(decided.actions)
        result.lists.update(decided.lists)
        result.mtp, result.mtp_keys = decided.layers, pending
        return result

    def _listed(self, key: str, lists: dict[str, ExpertList]) -> bool:
        """Whether a key belongs to a per-expert list; a list is learned from its first key.

        All of `experts.<i>.<anything>` moves together: weights, scales, zero points, packed data,
        biases.
        """
        prefixes = list(list_prefixes(key))
        for prefix, index in prefixes:
            if prefix in lists:
                lists[prefix].keys[key] = index
                return True
        if not prefixes:
            return False
        place, owners = self._owners(key)
        if owners:
            prefix, index = prefixes[place]
            lists[prefix] = ExpertList(tuple(dict.fromkeys(owners)), {key: index})
        return bool(owners)

    def _owners(self, key: str) -> tuple[int, list[str]]:
        """Which number in a key, counted from the last, is an expert's, and the layers whose
        experts its list numbers; no layer if the key is in no such list.
        """
        for name in (key, _with_leaf(key, "weight")):
            target = self._old.locate(name)
            made = self._made_of_experts(target) if target.per_expert else []
            if made:
                return 0, [self._layout.tensors[tensor].layer for tensor in made]
            numbered = [prefix for prefix, _ in list_prefixes(target.name)]
            owners = [self._layout.lists[p] for p in numbered if p in self._layout.lists]
            if owners:
                return 0, owners
        # Models that hold the experts stacked: published per expert, or per projection and expert.
        for exact in (True, False):
            for place, prefix in enumerate(numbered):
                for layer in self._layout.layers:
                    if prefix == layer + "." or (not exact and prefix.startswith(layer + ".")):
                        return place, [layer]
        return 0, []

    def _made_of_experts(self, target: Target) -> list[str]:
        """Tensors of stacked experts that a key of one expert on disk is part of, or goes with."""
        if target.name in self._layout.tensors:
            return list(target.names)
        return [n for n in self._layout.tensors if target.name.startswith((n + ".", n + "_"))][:1]

    def _renumber(self, prefix: str, experts: ExpertList) -> dict[str, Action]:
        """Actions of a list of the main model."""
        inside = {n: d.tail for n, d in self._layout.tensors.items() if d.layer in experts.layers}
        own = tuple(layer + "." for layer in experts.layers)
        self._covered.update(name for name in inside if name.startswith(own))
        experts.tail = max(inside.values(), default=0)
        kept = [self._kept[layer] for layer in experts.layers]
        before = [self._layout.counts[layer] for layer in experts.layers]
        return experts.renumber(prefix, kept, before, self._folder)

    def _action(self, key: str, target: Target) -> Action:
        """Action of a key outside per-expert lists."""
        dims = [self._layout.tensors[name] for name in target.names if name in self._layout.tensors]
        if dims:
            self._covered.update(target.names)
            return self._select(key, target, dims)
        if self._old.known(target):
            return self._inside_block(key, target)
        companion = self._companion(key, target)
        if companion is not None:
            name, leaf = companion
            if leaf in layouts.VALUES:
                self._covered.add(name)
            return self._cut_stored(key, name, leaf)
        self._refuse_unexplained(key, target)
        return Copy(key)

    def _select(self, key: str, target: Target, dims: list[ExpertDim]) -> Action:
        """Rows of a tensor that the model loads."""
        entry, length = self._tensors[key], dims[0].length(dims[0].experts)
        if self._is_packed_stack(entry, target):
            return self._cut_stored(key, target.name, "weight")
        if len(target.names) == 1 and target.pattern is None:
            fits = entry.shape == self._old_shapes[target.name]
            if not fits and self._quantization.is_behind([entry]):
                return self._cut_stored(key, target.name, "weight")
            candidates = [dims[0].dim] if fits else []
        else:
            candidates = [d for d, n in enumerate(entry.shape) if n == length]
        if len(candidates) > 1:
            candidates = [d for d in candidates if self._fits(key, target, d, dims[0])]
        if len(candidates) != 1 and self._quantization.is_behind([entry]):
            raise UnsupportedModel(
                f"{key}: {entry.dtype} {list(entry.shape)} stores {target.name} "
                f"{list(self._old_shapes[target.name])} in a layout that is not read "
                f"({self._quantization}); apply the plan to the checkpoint it was quantized from."
            )
        if len(candidates) != 1:
            raise CheckpointError(
                f"{entry.file}: tensor {key!r} has shape {list(entry.shape)}, but config.json "
                "gives "
                f"{target.name} the shape {list(self._old_shapes[target.name])}; use config.json "
                "and weights of "
                "one checkpoint."
            )
        dim = candidates[0]
        if len({d.layer for d in dims}) > 1 and (dim == 0 or entry.shape[0] % len(dims)):
            raise UnsupportedModel(
                f"{key}: holds experts of {len(dims)} layers in a way that cannot be split."
            )
        rows = tuple(d.rows(self._kept[d.layer]) for d in dims)
        if len(target.names) == 1:
            self._cuts[key] = Cut(replace(dims[0], dim=dim), _cut_rows)
        return Select(key, dim, rows if len(set(rows)) > 1 else rows[:1])

    def _is_packed_stack(self, entry: TensorEntry, target: Target) -> bool:
        """Whether the tensor holds stacked experts that a quantizer packed, so its shape is
        another.
        """
        return (
            target.pattern is not None
            and len(target.names) == 1
            and len(self._old_shapes[target.name]) > 2
            and entry.dtype in PACKED
        )

    def _fits(self, key: str, target: Target, dim: int, expert: ExpertDim) -> bool:
        """Whether the tensor, shortened in this dimension, is converted by transformers to the
        shape that the smaller model has.
        """
        group = self._old.loaded_shapes({k: self._tensors[k].shape for k in self._siblings(target)})
        shapes = {}
        for k in group.sources.get(target.name, [key]):
            shape = list(self._tensors[k].shape)
            shape[dim] = expert.length(len(self._kept[expert.layer]))
            shapes[k] = tuple(shape)
        made = self._new.loaded_shapes(shapes).shapes
        return all(made.get(name) == self._new_shapes[name] for name in target.names)

    def _siblings(self, target: Target) -> list[str]:
        """Keys that are converted together with this one."""
        return [k for k in self._tensors if self._old.locate(k).name == target.name]

    def _inside_block(self, key: str, target: Target) -> Action:
        """A tensor of the model whose shape does not depend on the number of experts; its values
        may.
        """
        layer = self._layout.block_layer(target.name)
        entry = self._tensors[key]
        if layer is None or entry.dtype not in _INTEGERS or self._old.is_number(target.name):
            return Copy(key)  # also quantized weights, of a shared expert for instance
        if target.name.rpartition(".")[2] in ID_TABLES:
            return Relabel(key, self._kept[layer], self._layout.counts[layer])
        raise UnsupportedModel(
            f"{key}: integers ({entry.dtype} {list(entry.shape)}) inside a MoE block of {layer} "
            "may be expert ids; "
            "this architecture cannot be pruned by files."
        )

    def _companion(self, key: str, target: Target) -> tuple[str, str] | None:
        """The stacked experts or the router that a key unknown to the model goes with, and the rest
        of its name.

        Scales and packed data: `gate_up_proj_blocks`, `down_proj_scale_inv`, `gate.weight_scale`,
        `input_linear.qweight`.
        """
        for name in self._layout.tensors:
            if target.name.startswith(name + "."):
                return name, target.name[len(name) + 1 :]
            if target.name.startswith(name + "_"):
                weight = "weight_" if name.endswith(".weight") else ""
                return name, weight + target.name[len(name) + 1 :]
        beside = self._old.locate(_with_leaf(key, "weight")).name
        return (beside, key.rpartition(".")[2]) if beside in self._layout.tensors else None

    def _cut_stored(self, key: str, name: str, leaf: str) -> Action:
        """A tensor in which a quantizer stores experts, by its format."""
        expert = self._layout.tensors[name]
        matrix = Matrix(name, self._old_shapes[name], expert)
        decide = partial(self._cut_layout, leaf, matrix)
        self._cuts[key] = Cut(expert, decide)
        return decide(key, self._tensors[key], expert, self._kept[expert.layer])

    def _cut_layout(
        self,
        leaf: str,
        matrix: Matrix,
        key: str,
        entry: TensorEntry,
        expert: ExpertDim,
        kept: tuple[int, ...],
    ) -> Action:
        stored = Stored(key, entry, leaf, lambda other: self._tensors.get(_with_leaf(key, other)))
        return layouts.cut(stored, matrix.of(expert), kept, self._quantization)

    def _refuse_unexplained(self, key: str, target: Target) -> None:
        """Refuses a key that the model ignores if it is inside a MoE block, or looks like one of
        routed experts elsewhere.
        """
        module = target.name
        while module and module not in self._modules:
            module = module.rpartition(".")[0]
        inside = self._layout.block_layer(module + ".") is not None and any(
            name.startswith(module + ".") for name in self._layout.tensors
        )
        routed = any(prefix.endswith("experts.") for prefix, _ in list_prefixes(key))
        if inside or routed:
            raise UnsupportedModel(
                f"{key}: is inside a MoE block but matches nothing the model loads (renamed: "
                f"{target.name}), so this layout is not read ({self._quantization}): pruning "
                "cannot know whether the tensor depends on the experts; apply the plan to a "
                "checkpoint with the layout that transformers loads."
            )

    def _check_covered(self) -> None:
        """Checks that every tensor that holds experts was found on disk."""
        missing = sorted(self._layout.tensors.keys() - self._covered)
        if missing and self._quantization.is_behind(self._tensors.values()):
            raise UnsupportedModel(
                f"{self._folder}: no tensor on disk is known to store {missing[0]} "
                f"({len(missing)} such): the checkpoint is incomplete, or its layout is not read "
                f"({self._quantization}); apply the plan to the checkpoint it was quantized from."
            )
        if missing:
            raise CheckpointError(
                f"{self._folder}: no tensor on disk for {missing[0]} ({len(missing)} such); "
                "the checkpoint is incomplete or belongs to another config.json."
            )

    @property
    def _folder(self) -> Path:
        return next(iter(self._tensors.values())).file.parent


def _cut_rows(key: str, entry: TensorEntry, expert: ExpertDim, kept: tuple[int, ...]) -> Action:
    """Rows of a tensor that is stored as the model has it."""
    if expert.dim >= len(entry.shape) or entry.shape[expert.dim] != expert.length(expert.experts):
        raise PlanError(
            f"plan: counts {expert.experts} experts in {expert.layer!r}, but {key} has shape "
            f"{list(entry.shape)}; correct the entry."
        )
    return Select(key, expert.dim, (expert.rows(kept),))


def _with_leaf(key: str, leaf: str) -> str:
    """The key with its last segment replaced."""
    return f"{key.rpartition('.')[0]}.{leaf}"


def _module_paths(names: Mapping[str, object]) -> set[str]:
    """Every module that holds a tensor, directly or below."""
    paths = set()
    for name in names:
        parent = name.rpartition(".")[0]
        while parent and parent not in paths:
            paths.add(parent)
            parent = parent.rpartition(".")[0]
    return paths
