"""What config.json says of multi-token-prediction (MTP) layers in a pruned checkpoint.

Engines build MTP layers with the experts of the other layers, by the same field. A few read a field
of its own for them, and only there MTP layers may keep all their experts while the others lose
some.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reap_driver.base.mtp import MtpChoice
from reap_driver.compat.config_edit import (
    MTP_COUNT_FIELDS,
    Site,
    clear_mtp,
    mtp_count_sites,
    with_values,
)
from reap_driver.model.stacks import Stack, stack_near
from reap_driver.writer.mtp import MtpLayer
from reap_kernels.errors import UnsupportedModel

# Model type -> (the field that counts the experts of its MTP layers, what is known to read it).
OWN_COUNTS: Mapping[str, tuple[str, str]] = {
    "qwen4_exp": ("mtp_num_experts", "oMLX"),
    "qwen4_exp_text": ("mtp_num_experts", "oMLX"),
}


def with_mtp(
    config: dict[str, Any],
    choice: MtpChoice,
    layers: Mapping[str, MtpLayer],
    stacks: Sequence[Stack],
    counts: Mapping[str, tuple[int, int]],
    source: Path,
) -> tuple[dict[str, Any], list[str]]:
    """A pruned configuration with what it says of MTP layers, and notes on these layers.

    Args:
        config: with the numbers of experts that the main layers keep.
        choice: what happens to MTP layers.
        layers: those with experts that are written.
        stacks: of the main layers.
        counts: every main layer -> its experts before and after.
        source: the checkpoint that is pruned.

    Raises:
        UnsupportedModel: MTP layers are to keep all their experts, other layers lose some, and one
            field counts both.
    """
    if choice == "drop":  # also without MTP tensors: MiniMax-M2 announces layers that it lacks
        clear_mtp(config)
        return config, []
    notes = _observed_notes(layers)
    values: dict[Site, Any] = {}
    for name, layer in layers.items():
        stack = stack_near(name, stacks)
        sites = mtp_count_sites(config)
        if choice == "prune":
            own = {site: len(layer.kept) for site, n in sites.items() if n == layer.before}
            values |= own
        elif not sites and any(counts[main][0] != counts[main][1] for main in stack.layers):
            site, reader = _own_count(config, name, layer, stack, counts, source)
            values[site] = layer.before
            notes.append(
                f"{name}, a multi-token-prediction layer, keeps all {layer.before} experts: "
                f"{'.'.join(site)} of config.json counts them, which {reader} reads; other engines "
                f"read {stack.field} for all layers and cannot load this layer."
            )
    return with_values(config, values), list(dict.fromkeys(notes))


def _own_count(
    config: Mapping[str, Any],
    name: str,
    layer: MtpLayer,
    stack: Stack,
    counts: Mapping[str, tuple[int, int]],
    source: Path,
) -> tuple[Site, str]:
    """(the field to write, what reads it) for an MTP layer that keeps more experts than others."""
    parents = [site[:-1] for site in stack.sites]
    types = {str(config.get("model_type"))}
    known = next((OWN_COUNTS[kind] for kind in sorted(types) if kind in OWN_COUNTS), None)
    if known is not None and parents:
        return (*parents[0], known[0]), known[1]
    left = min(counts[main][1] for main in stack.layers)
    raise UnsupportedModel(
        f"{name}: this multi-token-prediction layer cannot keep all {layer.before} experts while "
        f"the other layers keep {left}: engines read {stack.field} of config.json for both, and "
        f"none is known to read another field for a model of type {config.get('model_type')!r} "
        f"(only for {', '.join(sorted(OWN_COUNTS))}, and where config.json has "
        f"{' or '.join(MTP_COUNT_FIELDS)}); give `mtp='prune'`, or `mtp='drop'` and let the engine "
        f"draft with the unpruned layer of the original: {source} as `model` of vLLM's "
        "speculative configuration or as SGLang's --speculative-draft-model-path."
    )


def _observed_notes(layers: Mapping[str, MtpLayer]) -> list[str]:
    """Sentences on MTP layers whose experts were chosen by the scores of another layer."""
    by: dict[str, list[str]] = {}
    for name, layer in layers.items():
        if layer.like is not None:
            by.setdefault(layer.like, []).append(name)
    return [
        f"{', '.join(names)} (multi-token prediction): not observed; the experts with the ids that "
        f"{like} keeps stay, by that layer's scores."
        for like, names in by.items()
    ]
