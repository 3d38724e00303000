"""The model with all and with the kept experts, both on meta: what to edit in config.json, and
whether tensors load into them by their shapes.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from reap_driver.compat.conversion import KeyMap, LoadedShapes
from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.files.quantization import PACKED, Quantization
from reap_driver.files.safetensors_file import TensorEntry
from reap_driver.model.expert_layout import ExpertLayout, Shape, derive_layout
from reap_driver.model.stacks import Stack, find_stacks, with_counts
from reap_driver.writer.shards import OutTensor
from reap_kernels.errors import CheckpointError, UnsupportedModel


@dataclass(frozen=True)
class PrunedModel:
    """Key rules of both models, the edited configuration, and the tensors that hold experts."""

    old: KeyMap
    new: KeyMap
    raw_config: dict[str, Any]  # config.json with the new counts
    layout: ExpertLayout


def derive_model(
    folder: Path,
    model: PreTrainedModel,
    raw: Mapping[str, Any],
    stacks: Sequence[Stack],
    counts: Mapping[str, tuple[int, int]],
    *,
    trust_remote_code: bool,
) -> PrunedModel:
    """Builds both models and compares them. The smaller one is built from the edited config.json.

    Layers that keep all their experts would not differ. If there are any, the tensors that hold
    experts are found by comparison with a model that has twice as many in every layer.

    Args:
        folder: the source.
        model: the source's model, on meta.
        raw: its config.json as written.
        stacks: of `stacks_of_files`.
        counts: every MoE layer -> its experts before and after.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        CheckpointError: config.json lacks the number of experts of a layer that loses some.
        UnsupportedModel: see `derive_layout`.
    """
    before = {name: pair[0] for name, pair in counts.items()}
    after = {name: pair[1] for name, pair in counts.items()}
    edited = edited_config(folder, model, raw, stacks, counts)
    old, new = KeyMap(model), _keys(folder, edited, trust_remote_code)
    other, compared = after, new.shapes
    if any(after[name] == before[name] for name in before):
        other = {name: 2 * count for name, count in before.items()}
        doubled = with_counts(raw, model.config.to_dict(), stacks, before, other)
        compared = _keys(folder, doubled, trust_remote_code).shapes
    layout = derive_layout(old.shapes, compared, {n: (before[n], other[n]) for n in before})
    return PrunedModel(old, new, edited, layout)


def stacks_of_files(
    folder: Path,
    model: PreTrainedModel,
    raw: Mapping[str, Any],
    experts: Mapping[str, int],
    *,
    trust_remote_code: bool,
) -> list[Stack]:
    """The stacks of a checkpoint, with their fields as its config.json names them.

    Args:
        folder: the checkpoint.
        model: its model, on meta.
        raw: its config.json as written.
        experts: name of every MoE layer -> its number of experts.
        trust_remote_code: run model code that comes with the checkpoint.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes_of = shapes_for(folder, trust_remote_code=trust_remote_code)
    return find_stacks(raw, model.config.to_dict(), experts, shapes, shapes_of)


def shapes_for(
    folder: Path, *, trust_remote_code: bool
) -> Callable[[Mapping[str, Any]], Mapping[str, Shape]]:
    """A function from an edited config.json to the tensors of its model, name -> shape."""

    def shapes_of(edited: Mapping[str, Any]) -> Mapping[str, Shape]:
        return _keys(folder, edited, trust_remote_code).shapes

    return shapes_of


def edited_config(
    folder: Path,
    model: PreTrainedModel,
    raw: Mapping[str, Any],
    stacks: Sequence[Stack],
    counts: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    """config.json with the new counts.

    Args: see `derive_model`; the folder need not hold weights.

    Raises:
        CheckpointError: config.json lacks the number of experts of a layer that loses some.
    """
    before = {name: pair[0] for name, pair in counts.items()}
    after = {name: pair[1] for name, pair in counts.items()}
    for stack in stacks:
        cut = [name for name in stack.layers if after[name] != before[name]]
        if cut and not stack.sites:
            raise CheckpointError(
                f"{folder / 'config.json'}: no field says {before[cut[0]]}, the number of experts "
                f"of {cut[0]}, so it cannot be changed; use the config.json of this checkpoint."
            )
    return with_counts(raw, model.config.to_dict(), stacks, before, after)


def _keys(folder: Path, edited: Mapping[str, Any], trust: bool) -> KeyMap:
    """Key rules of the model of an edited config.json."""
    return KeyMap(built(folder, edited, trust_remote_code=trust))


def built(folder: Path, edited: Mapping[str, Any], *, trust_remote_code: bool) -> PreTrainedModel:
    """Builds the model of an edited config.json, in the way in which the output will be loaded.

    The model code that comes with a checkpoint is found through the folder of its config.
    """
    with tempfile.TemporaryDirectory(prefix="reap_config_") as name:
        (Path(name) / "config.json").write_text(json.dumps(edited), encoding="utf-8")
        for code in folder.glob("*.py") if trust_remote_code else ():
            shutil.copy(code, name)
        return meta_model(load_config(name, trust_remote_code=trust_remote_code))


@dataclass(frozen=True)
class Checked:
    """Result of checking the source."""

    loaded: frozenset[str]  # model tensors the checkpoint provides
    packed: frozenset[str]  # of those, the ones whose shapes cannot be compared
    unknown: frozenset[str]  # disk keys the model has no tensor for


def check_source(
    tensors: Mapping[str, TensorEntry], keys: KeyMap, config_file: str, quantization: Quantization
) -> Checked:
    """Compares every tensor of the source with the shape that config.json gives it.

    Raises:
        CheckpointError: a shape differs; names file, key and both shapes.
        UnsupportedModel: the same in a quantized checkpoint, whose layout is then unknown.
    """
    loaded = keys.loaded_shapes({key: entry.shape for key, entry in tensors.items()})
    packed = set()
    for name, problem in _problems(loaded, keys).items():
        sources = [tensors[key] for key in loaded.sources[name]]
        if any(entry.dtype in PACKED for entry in sources):
            packed.add(name)
            continue
        key = loaded.sources[name][0]
        if quantization.is_behind(sources):
            raise UnsupportedModel(
                f"{tensors[key].file}: tensor {key!r}, {tensors[key].dtype} "
                f"{list(tensors[key].shape)}, does not fit {config_file}: {problem}. This layout "
                f"is not read ({quantization}); apply the plan to the checkpoint it was quantized "
                "from."
            )
        raise CheckpointError(
            f"{tensors[key].file}: tensor {key!r} {list(tensors[key].shape)} does not fit "
            f"{config_file}: {problem}; "
            "use config.json and weights of one checkpoint."
        )
    return Checked(frozenset(loaded.sources), frozenset(packed), frozenset(loaded.unknown))


def check_output(
    tensors: list[OutTensor], keys: KeyMap, before: Checked, renamed: Mapping[str, str]
) -> None:
    """Checks that the written tensors load into the smaller model: none is missing, unexpected or
    of another shape.

    Args:
        tensors: what was written.
        keys: key rules of the smaller model.
        before: what the source provides to the larger model.
        renamed: name in the source -> name in the output, for every tensor kept.

    Raises:
        CheckpointError: the output would not load, which is a defect of this program.
    """
    loaded = keys.loaded_shapes({tensor.name: tensor.shape for tensor in tensors})
    problems = {
        name: problem
        for name, problem in _problems(loaded, keys).items()
        if name not in before.packed
    }
    missing = sorted((before.loaded & keys.shapes.keys()) - loaded.sources.keys())
    unexpected = sorted(
        set(loaded.unknown) - {renamed[key] for key in before.unknown if key in renamed}
    )
    found = [f"{name}: {problem}" for name, problem in sorted(problems.items())]
    found += [f"{name}: missing" for name in missing] + [
        f"{name}: unexpected" for name in unexpected
    ]
    if found:
        raise CheckpointError(
            f"verification: the pruned checkpoint would not load ({len(found)} tensors, first "
            f"{found[0]}); "
            "it was discarded. Please report this with the model's config.json."
        )


def _problems(loaded: LoadedShapes, keys: KeyMap) -> dict[str, str]:
    """Model tensors that would not load, and why."""
    expected = keys.shapes
    problems = dict(loaded.failed)
    for name, shape in loaded.shapes.items():
        if name in expected and shape != expected[name]:
            problems[name] = f"{name} becomes {list(shape)}, the model has {list(expected[name])}"
    return problems
