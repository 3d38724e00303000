"""A plan as a file of masks: for every MoE layer, which experts its router may choose.

Masks are for engines that cannot run layers of different sizes, and for trying a plan without
writing a checkpoint: the original model with masked routers computes the same as the pruned model,
but is not smaller.

    with rd.masked_experts(model, rd.load_masks("masks.safetensors")):
        model(**batch)

The file is a safetensors file with one bool tensor [E] per layer, True for the experts that are
kept, under the name of the experts module (`model.layers.3.mlp.experts`). To apply it in another
program, set the router's logits to -inf where the mask is False, before softmax and top-k.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reap_driver.base.arguments import typed
from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.files.checkpoint import resolve_folder
from reap_driver.model.discover import MoELayer, find_moe_layers, record_of
from reap_driver.planning.plan import Plan
from reap_driver.writer.plan_checks import check_model, check_same_layers, main_layers
from reap_kernels.documents import Format
from reap_kernels.errors import PlanError
from reap_kernels.files import replaced
from reap_kernels.provenance import MODEL
from reap_kernels.schema import ListOf, Text, short
from reap_kernels.tensor_files import read_tensors, write_tensors

FORMAT = Format(
    "reap-masks",
    2,
    "masks file",
    {"model": MODEL},
    PlanError,
    "write one with `reap-kernels apply --as-masks`",
    {"notes": ListOf(Text())},
    sealed=True,
)


def expert_masks(plan: "Plan") -> dict[str, Tensor]:
    """{layer: bool [E]}, True for the experts that are kept."""
    masks = {}
    for name, layer in plan.layers.items():
        masks[name] = torch.zeros(layer.num_experts, dtype=torch.bool)
        masks[name][list(layer.kept)] = True
    return masks


def maskable(
    plan: "Plan",
    layers: Sequence[MoELayer],
    record: Mapping[str, Any],
    where: object,
    *,
    force: bool = False,
    forcible: bool = True,
) -> tuple["Plan", list[str]]:
    """Checks that masks of a model's routers can say what a plan does.

    Args:
        plan: made for the model.
        layers: the model's MoE layers.
        record: of the model, see `reap_driver.record_of`.
        where: the model, for messages.
        force: as for `apply_plan`.
        forcible: whether who reads the message could say `force`.

    Returns:
        The plan of the layers that the model itself computes, and notes on how the model differs
        from the one that it was made for.

    Raises:
        PlanError: see `save_masks`.
    """
    plan.check()
    _check_removes_only(plan)
    plan = main_layers(plan)
    check_same_layers(plan, layers)
    return plan, check_model(plan, record, where, force=force, forcible=forcible)


def _check_removes_only(plan: "Plan") -> None:
    """Raises PlanError for a plan that changes experts that it keeps."""
    if plan.compensates:
        raise PlanError(
            f"plan: changes the experts that it keeps ({plan.shape or 'their down projections'}), "
            "which masks of a router cannot say; write its checkpoint, or use a plan that removes "
            "whole experts only"
        )


@typed
def save_masks(
    model_path: str | Path,
    plan: "Plan",
    path: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    force_model: bool = False,
) -> "Plan":
    """Checks that a plan fits a model, and writes it as masks.

    Args:
        model_path: folder of the model's checkpoint, or a hub id; no weights are read.
        plan: made for the model; layers may keep different numbers of experts.
        path: the file; it is replaced in one step.
        trust_remote_code: run model code that comes with the checkpoint.
        force_model: as for `apply_plan`.

    Returns:
        The plan, with notes on how the model differs from the one it was made for.

    Raises:
        PlanError: the plan is for another model, leaves a router too few experts, or changes
            experts that it keeps.
        CheckpointError: the configuration cannot be read.
        UnsupportedModel: the model's MoE layers are of an unknown kind.

    Example:
        >>> rd.save_masks("MODEL", plan, "masks.safetensors").ratio
        0.25
    """
    _check_removes_only(plan)  # before a model is downloaded
    folder = resolve_folder(model_path)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    full = meta_model(config)
    layers = find_moe_layers(full)
    plan, notes = maskable(plan, layers, record_of(full, layers), folder, force=force_model)
    with replaced(path) as temporary:
        content = {"model": plan.model, "notes": notes}
        write_tensors(expert_masks(plan), temporary, FORMAT, content)
    return plan.noting(notes)


@typed
def load_masks(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Reads a file that `save_masks` wrote.

    Args:
        path: the file.

    Returns:
        {layer: ids of the experts that are kept, ascending}, as `masked_experts` takes them.

    Raises:
        PlanError: the file cannot be read, or is not a file of masks.

    Example:
        >>> _ = rd.save_masks("MODEL", plan, "loaded.safetensors")
        >>> {len(kept) for kept in rd.load_masks("loaded.safetensors").values()}
        {24}
    """
    _, masks = read_tensors(path, FORMAT)
    if not masks:
        raise FORMAT.refusal(path, "has no masks")
    for name, mask in masks.items():
        if mask.dtype != torch.bool or mask.ndim != 1 or not mask.any():
            raise FORMAT.refusal(
                path,
                f"layer {short(name, 200)}: its mask is {mask.dtype} {list(mask.shape)}; expected "
                "torch.bool [E], true for one expert at least",
                ":",
            )
    return {name: tuple(mask.nonzero().flatten().tolist()) for name, mask in masks.items()}
