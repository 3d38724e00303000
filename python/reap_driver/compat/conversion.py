"""How transformers maps the keys of a checkpoint on disk to the tensors of a model in memory.

The only file that uses the library's conversion API (`get_model_conversion_mapping`,
`rename_source_key`, weight converters). It computes shapes only, by passing tensors on the meta
device through the library's own operations.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
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
        converter = copy.deepcopy(self._by_pattern[pattern])
        for key, target in members:
            tensor = torch.empty(shapes[key], device="meta")
            converter.add_tensor(name, key, str(target.pattern), tensor)
        try:
            made = converter.convert(name, model=self._model, config=self._model.config)
        except Exception as error:  # noqa: BLE001 - an operation may raise anything on odd shapes
            result.failed[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return
        for full_name, tensor in made.items():
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            result.shapes[full_name] = tuple(tensor.shape)


def _within_expert(operation: object) -> bool:
    """Whether an operation makes each expert's rows from that expert only, and contiguous."""
    if isinstance(operation, MergeModulelist):
        return operation.dim == 0
    if isinstance(operation, Concatenate):
        return operation.dim > 0
    return isinstance(operation, Fp8Dequantize)
