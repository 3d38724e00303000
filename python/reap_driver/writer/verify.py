"""Checks by shape: what transformers would load from a set of disk tensors, against what the model
expects.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from reap_driver.compat.conversion import KeyMap, LoadedShapes
from reap_driver.files.quantization import PACKED, Quantization
from reap_driver.files.safetensors_file import TensorEntry
from reap_driver.writer.stream import OutTensor
from reap_kernels.errors import CheckpointError, UnsupportedModel


@dataclass(frozen=True)
class Checked:
    """What checking the source established."""

    loaded: frozenset[str]  # model tensors the checkpoint provides
    packed: frozenset[str]  # of those, the ones whose shapes cannot be compared
    unknown: frozenset[str]  # disk keys the model has no tensor for


def check_source(
    tensors: Mapping[str, TensorEntry], keys: KeyMap, config_file: str, quantization: Quantization
) -> Checked:
    """Compare every tensor of the source with the shape its config gives it.

    Raises:
        CheckpointError: naming file, key, both shapes.
        UnsupportedModel: the same, of a quantized checkpoint: its layout is not known.
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
    """The written tensors load into the smaller model: nothing missing, unexpected or of another
    shape.

    Args:
        tensors: what was written.
        keys: key rules of the smaller model.
        before: what the source provides to the larger model.
        renamed: name in the source -> name in the output, for every tensor kept.

    Raises:
        CheckpointError: the output would not load; it is a defect of this program, so the output is
            discarded.
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
