"""How transformers maps the keys of a checkpoint on disk to the tensors of a model in memory.

The only file that uses the library's conversion API (`get_model_conversion_mapping`,
`rename_source_key`, weight converters). Shapes are found by passing tensors on the meta device
through the library's own operations; values of single groups of tensors go through the same
operations, in both directions.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from reap_kernels.errors import UnsupportedModel

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """Where the tensor of a disk key goes.

    Attributes:
        names: the model tensors that its converter makes; several if the converter splits.
        pattern: the source pattern of the converter; None if the key is only renamed.
        per_expert: whether the tensor is of one expert and is merged into a stacked tensor.
    """

    names: tuple[str, ...]
    pattern: str | None = None
    per_expert: bool = False

    @property
    def name(self) -> str:
        """The first model tensor, usually the only one."""
        return self.names[0]


@dataclass(frozen=True)
class Group:
    """Tensors that one conversion makes from each other.

    Attributes:
        names: tensors of the model.
        keys: disk key -> source pattern of the converter (None if the key is only renamed); the
            patterns in the converter's order, the keys of each in the order of their experts.
    """

    names: tuple[str, ...]
    keys: Mapping[str, str | None]


@dataclass
class LoadedShapes:
    """What a set of disk tensors becomes in memory.

    Attributes:
        shapes: model tensor -> its shape after conversion.
        sources: model tensor -> the disk keys that it is made of.
        failed: model tensor -> why its conversion failed.
        unknown: disk keys for which the model has no tensor.
    """

    shapes: dict[str, Shape] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


class KeyMap:
    """The library's rules for renaming and converting keys, for one model on any device."""

    def __init__(self, model: PreTrainedModel, mapping: Sequence[object] | None = None) -> None:
        """`mapping`: the rules that `model` is being loaded by. The default is those of its class,
        which leave quantized tensors as they are.
        """
        self._model = model
        self._state = model.state_dict()
        mapping = get_model_conversion_mapping(model) if mapping is None else mapping
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {
            pattern: converter
            for converter in self._converters
            for pattern in converter.source_patterns
        }

    @property
    def shapes(self) -> dict[str, Shape]:
        """Name -> shape of every tensor of the model's state dict."""
        return {name: tuple(tensor.shape) for name, tensor in self._state.items()}

    def locate(self, disk_key: str) -> Target:
        """Renames a disk key as loading does. The model may lack tensors of the resulting names."""
        prefix = self._model.base_model_prefix
        name, pattern = rename_source_key(
            disk_key, self._renamings, self._converters, prefix, self._state
        )
        if name not in self._state and disk_key in self._state:
            name, pattern = rename_source_key(disk_key, [], [], prefix, self._state)
        if pattern is None:
            return Target((name,))
        targets = self._by_pattern[pattern].target_patterns
        names = tuple(name.replace(targets[0], other) for other in targets)
        return Target(names, pattern, "*" in pattern)

    def known(self, target: Target) -> bool:
        """Whether the model has the target's tensor."""
        return target.name in self._state

    def is_number(self, name: str) -> bool:
        """Whether a model tensor has floating-point values in memory, however it is stored; False
        for integers (ids, counts) and booleans.
        """
        return self._state[name].is_floating_point()

    def expert_lists(self, targets: Mapping[str, Target]) -> list[list[str]]:
        """The disk keys of one stacked model tensor, as one list per source pattern with one key
        per expert. Empty unless a subset of experts can be converted by itself and gives their
        rows.

        Args:
            targets: disk key -> where it goes, for the keys of the tensor.
        """
        lists: dict[str, list[str]] = {}
        for key, target in targets.items():
            if target.pattern is None or len(target.names) > 1:
                return []
            lists.setdefault(target.pattern, []).append(key)
        operations = self._by_pattern[next(iter(lists))].operations
        stacked = any(isinstance(op, MergeModulelist) for op in operations)
        if not stacked or not all(map(_within_expert, operations)):
            return []
        found = list(lists.values())
        return found if all(len(part) == len(found[0]) for part in found) else []

    def groups(self, keys: Iterable[str], modules: Iterable[str]) -> list[Group]:
        """The groups of disk tensors that tensors of some modules are made of.

        Args:
            keys: every disk key.
            modules: qualified names of modules.
        """
        inside = tuple(f"{module}." for module in modules)
        found: dict[tuple[str, ...], dict[str, str | None]] = {}
        for key in sorted(keys, key=dot_natural_key):
            target = self.locate(key)
            if self.known(target) and any(name.startswith(inside) for name in target.names):
                found.setdefault(target.names, {})[key] = target.pattern
        return [Group(names, self._ordered(keys)) for names, keys in found.items()]

    def _ordered(self, keys: Mapping[str, str | None]) -> dict[str, str | None]:
        """Keys of one group, by the order of their patterns."""
        first = next(iter(keys.values()))
        if first is None:
            return dict(keys)
        order = self._by_pattern[first].source_patterns
        return dict(sorted(keys.items(), key=lambda item: order.index(str(item[1]))))

    def to_model(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What loading makes of the disk tensors of a group: model tensor -> its values.

        Raises:
            UnsupportedModel: the library cannot convert them.
        """
        [(key, pattern), *_] = group.keys.items()
        if pattern is None:
            return {group.names[0]: tensors[key]}
        members = [(key, str(pattern), tensors[key]) for key, pattern in group.keys.items()]
        try:
            made = self._run(self._by_pattern[pattern], group.names[0], members)
        except Exception as error:  # an operation may raise anything on odd shapes
            raise UnsupportedModel(
                f"{group.names[0]}: cannot be made from {key} and {len(members) - 1} others "
                f"({_first_line(error)}); use config.json and weights of one checkpoint."
            ) from error
        return {name: made[name] for name in group.names}

    def to_disk(self, group: Group, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the disk tensors of a group hold if the model tensors made of them have these
        values: the library's conversion reversed. Outputs that are not on the meta device were
        converted back, and gave the values to the bit.

        The names are those of the group. The library's own reversal, `revert_weight_conversion`,
        finds the same tensors, but for some models other names than published checkpoints have.

        Raises:
            UnsupportedModel: the conversion cannot be reversed.
        """
        [(key, pattern), *_] = group.keys.items()
        if pattern is None:
            return {key: values[group.names[0]]}
        made: list[Tensor] = []
        try:
            reverse = self._by_pattern[pattern].reverse_transform()
            members = [(name, *reverse.rename_source_key(name)) for name in group.names]
            inputs = [(name, str(source), values[name]) for name, _, source in members]
            made = list(self._run(reverse, members[0][1], inputs).values())
            problem = f"it gives {len(made)} tensors in place of {len(group.keys)}"
        except Exception as error:  # noqa: BLE001 - as in `to_model`
            problem = _first_line(error)
        if len(made) == len(group.keys):
            found = dict(zip(group.keys, made, strict=True))
            again = self.to_model(group, found)
            wrong = [name for name in group.names if not _equal(again[name], values[name])]
            if not wrong:
                return found
            problem = f"converting it again gives another {wrong[0]}"
        raise UnsupportedModel(
            f"{group.names[0]}: its conversion from {key} and {len(group.keys) - 1} others cannot "
            f"be reversed ({problem}), so new values cannot be written; apply plans that remove "
            "whole experts only."
        )

    def _run(
        self,
        converter: WeightConverter,
        name: str,
        members: Iterable[tuple[str, str, Tensor]],
    ) -> dict[str, Tensor]:
        """What a converter makes of (name, pattern, tensor), in the order that it makes it."""
        used = copy.deepcopy(converter)
        for key, pattern, tensor in members:
            used.add_tensor(name, key, pattern, tensor)
        made = used.convert(name, model=self._model, config=self._model.config)
        return {key: t[0] if isinstance(t, list) else t for key, t in made.items()}

    def loaded_shapes(self, shapes: Mapping[str, Shape]) -> LoadedShapes:
        """What loading makes of disk tensors of these shapes: runs the library's conversions on
        meta tensors, in the order that loading uses.
        """
        result = LoadedShapes()
        groups: dict[str, list[tuple[str, Target]]] = defaultdict(list)
        for key in sorted(shapes, key=dot_natural_key):
            target = self.locate(key)
            if self.known(target):
                groups[target.name].append((key, target))
            else:
                result.unknown.append(key)
        for name, members in groups.items():
            keys = [key for key, _ in members]
            for made in members[0][1].names:
                result.sources[made] = keys
            pattern = members[0][1].pattern
            if pattern is None:
                result.shapes[name] = tuple(shapes[keys[-1]])
            else:
                self._convert(name, pattern, members, shapes, result)
        return result

    def _convert(
        self,
        name: str,
        pattern: str,
        members: Iterable[tuple[str, Target]],
        shapes: Mapping[str, Shape],
        result: LoadedShapes,
    ) -> None:
        """Runs one converter on meta tensors. A failure is recorded in `result`, not raised."""
        empty = [
            (key, str(target.pattern), torch.empty(shapes[key], device="meta"))
            for key, target in members
        ]
        try:
            made = self._run(self._by_pattern[pattern], name, empty)
        except Exception as error:  # noqa: BLE001 - an operation may raise anything on odd shapes
            result.failed[name] = _first_line(error)
            return
        result.shapes |= {full_name: tuple(tensor.shape) for full_name, tensor in made.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _equal(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits; on the meta device without bits."""
    if (left.shape, left.dtype, left.device) != (right.shape, right.dtype, right.device):
        return False
    if left.is_meta:
        return True
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[left.dtype.itemsize]
    return torch.equal(left.contiguous().view(kind), right.contiguous().view(kind))


def _within_expert(operation: object) -> bool:
    """Whether an operation makes each expert's rows from that expert only, and contiguous."""
    if isinstance(operation, MergeModulelist):
        return operation.dim == 0
    if isinstance(operation, Concatenate):
        return operation.dim > 0
    return isinstance(operation, Fp8Dequantize)
