"""The model with all and with the kept experts, both on meta: what to edit in config.json, and what
that changes.
"""

import json
import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from reap_driver.checkpoint.config_edit import Site, count_sites, with_count
from reap_driver.checkpoint.derive import ExpertLayout, Shape, derive_layout, unowned
from reap_driver.compat.conversion import KeyMap
from reap_driver.compat.models import load_config, meta_model
from reap_kernels.errors import CheckpointError, UnsupportedModel


@dataclass(frozen=True)
class PrunedModel:
    """Key rules of both models, the edited configuration, and the tensors that hold experts."""

    old: KeyMap
    new: KeyMap
    raw_config: dict[str, Any]  # config.json with the new count
    layout: ExpertLayout


def derive_model(
    folder: Path,
    model: PreTrainedModel,
    raw: Mapping[str, Any],
    layers: Collection[str],
    counts: tuple[int, int],
    *,
    trust_remote_code: bool,
) -> PrunedModel:
    """Build both models and compare them. The smaller one is built from the edited config.json
    itself.

    Args:
        folder: the source.
        model: the source's model, on meta.
        raw: its config.json as written.
        layers: its MoE layers.
        counts: experts of a layer before and after.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        CheckpointError: config.json does not say the number of experts the plan counts.
        PlanError, UnsupportedModel: see `derive_layout`.
    """
    before, after = counts
    old = KeyMap(model)
    names = list(layers)

    def build(sites: list[Site]) -> tuple[dict[str, Any], KeyMap]:
        edited = with_count(raw, sites, after)
        return edited, _smaller_keys(folder, edited, trust_remote_code)

    sites = count_sites(raw, before) or count_sites(model.config.to_dict(), before)
    if not sites:
        raise CheckpointError(
            f"{folder / 'config.json'}: no field says {before}, the number of experts in the plan; "
            "the plan belongs to another model."
        )
    edited, new = build(sites)
    if unowned(old.shapes, new.shapes, names, after):
        edited, new = build(_own_sites(sites, old.shapes, names, after, build))
    layout = derive_layout(old.shapes, new.shapes, before=before, after=after, layers=names)
    if not layout.layers:
        raise UnsupportedModel(f"{folder}: no tensor depends on the number of experts.")
    return PrunedModel(old, new, edited, layout)


def _own_sites(
    sites: list[Site], old: Mapping[str, Shape], layers: list[str], after: int, build: Any
) -> list[Site]:
    """Fields of the planned layers: a second stack of experts (a talker, a tower) has a count of
    its own.
    """
    own: list[Site] = []
    for _, group in groupby(sorted(sites), key=lambda site: site[:-1]):
        part = list(group)
        _, new = build(part)
        if not unowned(old, new.shapes, layers, after):
            own += part
    return own


def _smaller_keys(folder: Path, edited: Mapping[str, Any], trust: bool) -> KeyMap:
    """Build the smaller model from an edited config.json, the way the output's will be read.

    The model code that comes with a checkpoint is found through the folder of its config.
    """
    with tempfile.TemporaryDirectory(prefix="reap_config_") as name:
        (Path(name) / "config.json").write_text(json.dumps(edited), encoding="utf-8")
        for code in folder.glob("*.py") if trust else ():
            shutil.copy(code, name)
        return KeyMap(meta_model(load_config(name, trust_remote_code=trust)))
