"""The model with all and with the kept experts, both on meta: what to edit in config.json, and what
that changes.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from reap_driver.compat.conversion import KeyMap
from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.model.expert_layout import ExpertLayout, Shape, derive_layout
from reap_driver.model.stacks import Stack, find_stacks, with_counts
from reap_kernels.errors import CheckpointError


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
    """Build both models and compare them. The smaller one is built from the edited config.json
    itself.

    Layers that keep all their experts would not differ. Where there are some, experts are found
    beside a model with twice as many in every layer.

    Args:
        folder: the source.
        model: the source's model, on meta.
        raw: its config.json as written.
        stacks: of `stacks_of_files`.
        counts: every MoE layer -> its experts before and after.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        CheckpointError: config.json does not say the number of experts of a layer that is cut.
        UnsupportedModel: see `derive_layout`.
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
    complete = model.config.to_dict()
    edited = with_counts(raw, complete, stacks, before, after)
    old, new = KeyMap(model), _keys(folder, edited, trust_remote_code)
    other, compared = after, new.shapes
    if any(after[name] == before[name] for name in before):
        other = {name: 2 * count for name, count in before.items()}
        doubled = with_counts(raw, complete, stacks, before, other)
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

    def shapes_of(edited: Mapping[str, Any]) -> Mapping[str, Shape]:
        return _keys(folder, edited, trust_remote_code).shapes

    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return find_stacks(raw, model.config.to_dict(), experts, shapes, shapes_of)


def _keys(folder: Path, edited: Mapping[str, Any], trust: bool) -> KeyMap:
    """Build the model of an edited config.json, the way the output's will be read.

    The model code that comes with a checkpoint is found through the folder of its config.
    """
    with tempfile.TemporaryDirectory(prefix="reap_config_") as name:
        (Path(name) / "config.json").write_text(json.dumps(edited), encoding="utf-8")
        for code in folder.glob("*.py") if trust else ():
            shutil.copy(code, name)
        return KeyMap(meta_model(load_config(name, trust_remote_code=trust)))
