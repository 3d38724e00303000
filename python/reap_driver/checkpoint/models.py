"""The model with all and with the kept experts, both on meta: what to edit in config.json, and what
that changes.
"""

import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from reap_driver.checkpoint.config_edit import Site, count_sites, with_counts
from reap_driver.checkpoint.derive import ExpertLayout, Shape, derive_layout, unowned
from reap_driver.compat.conversion import KeyMap
from reap_driver.compat.models import load_config, meta_model
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
    counts: Mapping[str, tuple[int, int]],
    *,
    trust_remote_code: bool,
) -> PrunedModel:
    """Build both models and compare them. The smaller one is built from the edited config.json
    itself.

    Where layers keep different numbers, some may keep all, and those would not differ. Where the
    experts are is then seen beside a model with twice as many in every layer.

    Args:
        folder: the source.
        model: the source's model, on meta.
        raw: its config.json as written.
        counts: MoE layer -> its experts before and after.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        CheckpointError: config.json does not say the number of experts the plan counts.
        PlanError, UnsupportedModel: see `derive_layout`.
    """
    before = {name: pair[0] for name, pair in counts.items()}
    after = {name: pair[1] for name, pair in counts.items()}
    uniform = len(set(counts.values())) == 1
    other = after if uniform else {name: 2 * count for name, count in before.items()}
    old, largest = KeyMap(model), max(before.values())
    known = count_sites(model.config.to_dict(), largest)

    @functools.cache
    def build(sites: tuple[Site, ...], pruned: bool) -> tuple[dict[str, Any], KeyMap]:
        parents = {site[:-1] for site in sites}
        fields = [site for site in known if site[:-1] in parents]
        edited = with_counts(raw, list(sites), after if pruned else other, fields)
        return edited, _smaller_keys(folder, edited, trust_remote_code)

    sites = count_sites(raw, largest) or known
    if not sites:
        raise CheckpointError(
            f"{folder / 'config.json'}: no field says {largest}, the number of experts in the "
            "plan; the plan belongs to another model."
        )
    sites = own_sites(sites, old.shapes, before, lambda part: build(tuple(part), uniform)[1].shapes)
    compared = build(tuple(sites), uniform)[1].shapes
    layout = derive_layout(old.shapes, compared, {n: (before[n], other[n]) for n in before})
    if not layout.layers:
        raise UnsupportedModel(f"{folder}: no tensor depends on the number of experts.")
    edited, new = build(tuple(sites), True)
    return PrunedModel(old, new, edited, layout)


def own_sites(
    sites: list[Site],
    old: Mapping[str, Shape],
    layers: Collection[str],
    shapes_of: Callable[[list[Site]], Mapping[str, Shape]],
) -> list[Site]:
    """Those of the fields that count the planned layers' experts: a second stack of experts (a
    talker, a tower) has a count of its own.

    Args:
        sites: fields that hold the count before.
        old: shapes before.
        layers: the planned layers.
        shapes_of: builds the model with another count at some fields.
    """
    if not unowned(old, shapes_of(sites), layers):
        return sites
    own: list[Site] = []
    for _, group in groupby(sorted(sites), key=lambda site: site[:-1]):
        part = list(group)
        if not unowned(old, shapes_of(part), layers):
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
