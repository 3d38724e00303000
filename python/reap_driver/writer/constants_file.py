"""Constants that stand for removed experts, as a file for engines that can add them.

A removed expert's output is replaced by the constant nearest to its outputs, and the router is left
whole, as in MoNE (arXiv 2507.00390). The file is a safetensors file with one float32 tensor [E, H]
per layer under the name of the experts module. No released engine loads it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reap_driver.base.arguments import typed
from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.compensation.constants import expert_constants
from reap_driver.files.checkpoint import resolve_folder
from reap_driver.files.gram_folder import GramFolder
from reap_driver.load.experts import read_experts
from reap_driver.model.discover import MoELayer, find_moe_layers, record_of
from reap_driver.planning.plan import Plan
from reap_driver.writer.plan_checks import check_model, check_same_layers, main_layers
from reap_kernels import LayerGram
from reap_kernels.documents import Format
from reap_kernels.errors import DataError, PlanError
from reap_kernels.files import replaced
from reap_kernels.model_match import differences
from reap_kernels.provenance import MAX_EXPERTS, MODEL
from reap_kernels.schema import Int, ListOf, MapOf, short
from reap_kernels.tensor_files import read_tensors, write_tensors

FORMAT = Format(
    "reap-constants",
    1,
    "constants file",
    {"model": MODEL, "experts": MapOf(ListOf(Int(0, MAX_EXPERTS - 1)), 1)},
    DataError,
    "write one with `reap_driver.export_constants`",
    sealed=True,
)
Grams = GramFolder | Mapping[str, LayerGram] | str | os.PathLike[str]


@typed
def export_constants(
    model_path: str | Path,
    grams: Grams,
    path: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Tensor]:
    """Writes the constants that can stand for experts, and returns them.

    The constant of expert j is c_j = sum g^2 f_j / sum g^2 over the tokens x that the model routed
    to it, g being the router weight and f_j(x) the expert's output: the one by which
    sum g^2 ||f_j(x) - c_j||^2 is least. As f_j = W_j h_j + b_j, it follows from the sums
    `LayerGram.first` and `.weight`, and no further pass over data is needed.

    An engine that uses them keeps the router whole. Where a token is routed to a removed expert,
    it adds g c_j in place of g f_j(x), at the place and with the weight g with which it would have
    added the expert's output; in models that apply g to the expert's input (Llama 4) it adds c_j
    alone. No released engine does that; a checkpoint of `apply_plan` has smaller routers,
    to which the constants do not belong.

    Args:
        model_path: folder or hub id of the model that was observed. Its experts are read with one
            decoder layer in memory at a time.
        grams: folder of Gram matrices, or `Observer.grams`; of this model.
        path: the file; it is replaced in one step.
        plan: of the model; constants are then written of the experts that it removes alone, in the
            layers where it removes any. None: of all experts.
        trust_remote_code: run model code that comes with the checkpoint.

    Returns:
        {layer: float32 [E, H]}, as the file has them; 0 for experts that no token was routed to,
        and for those that the plan keeps.

    Raises:
        DataError: the sums are of another model, or lack a layer of the plan.
        PlanError: the plan is for another model, or removes no expert.
        CheckpointError, UnsupportedModel: the model cannot be read; see `load_model`.

    Example:
        >>> with rd.observe(model, gram=True) as obs:
        ...     _ = obs(input_ids=ids)
        >>> found = rd.export_constants("MODEL", obs.grams, "constants.safetensors", plan=plan)
        >>> found["model.layers.0.mlp.experts"].shape
        torch.Size([32, 160])
    """
    sums = GramFolder.open(grams) if isinstance(grams, str | os.PathLike) else grams
    folder = resolve_folder(model_path)
    full = meta_model(load_config(folder, trust_remote_code=trust_remote_code))
    layers = {layer.name: layer for layer in find_moe_layers(full)}
    record = record_of(full, list(layers.values()))
    experts = _chosen(sums, plan, layers, record, folder)
    constants: dict[str, Tensor] = {}
    for name, weights in read_experts(folder, experts, trust_remote_code=trust_remote_code):
        own = sums.get(name) if isinstance(sums, GramFolder) else sums[name]
        found = expert_constants(list(weights.down), own, weights.down_bias).float()
        stays = torch.ones(len(found), dtype=torch.bool)
        stays[experts[name]] = False
        constants[name] = found.cpu().masked_fill_(stays[:, None], 0.0)
    content = {"model": record["model"], "experts": {name: experts[name] for name in constants}}
    with replaced(path) as temporary:
        write_tensors(constants, temporary, FORMAT, content)
    return constants


@typed
def load_constants(path: str | os.PathLike[str]) -> dict[str, dict[int, Tensor]]:
    """Reads a file that `export_constants` wrote.

    Args:
        path: the file.

    Returns:
        {layer: {expert that the constant stands for: float32 [H]}}.

    Raises:
        DataError: the file cannot be read, or is not a file of constants.

    Example:
        >>> with rd.observe(model, gram=True) as obs:
        ...     _ = obs(input_ids=ids)
        >>> _ = rd.export_constants("MODEL", obs.grams, "all.safetensors")
        >>> len(rd.load_constants("all.safetensors")["model.layers.0.mlp.experts"])
        32
    """
    head, tensors = read_tensors(path, FORMAT)
    if tensors.keys() != head["experts"].keys():
        raise FORMAT.refusal(path, "has other layers than its head names")
    for name, ids in head["experts"].items():
        known = tensors[name]
        if known.dtype != torch.float32 or known.ndim != 2 or max(ids, default=0) >= len(known):
            raise FORMAT.refusal(
                path,
                f"layer {short(name, 200)}: its constants are {known.dtype} {list(known.shape)} of "
                f"experts {short(ids)}; expected torch.float32 [E, H] of experts below E",
                ":",
            )
    return {name: {e: tensors[name][e] for e in ids} for name, ids in head["experts"].items()}


def _chosen(
    sums: GramFolder | Mapping[str, LayerGram],
    plan: Plan | None,
    layers: Mapping[str, MoELayer],
    record: Mapping[str, Any],
    folder: Path,
) -> dict[str, list[int]]:
    """Layer -> ids of the experts whose constants are asked for.

    Raises:
        DataError, PlanError: see `export_constants`.
    """
    known = _checked_sizes(sums, layers, record, folder)
    if plan is None:
        return {name: list(range(experts)) for name, (experts, _) in known.items()}
    plan = main_layers(plan)
    check_same_layers(plan, list(layers.values()))
    check_model(plan, record, folder)
    removed = {name: list(layer.removed) for name, layer in plan.layers.items() if layer.removed}
    if not removed:
        raise PlanError("plan: removes no expert, so there is none for a constant to stand for")
    missing = [name for name in removed if name not in known]
    if missing:
        raise DataError(
            f"grams: have no sums of layer {missing[0]!r}, of which the plan removes experts; "
            "observe all layers of this model with `gram=True`"
        )
    return removed


def _checked_sizes(
    sums: GramFolder | Mapping[str, LayerGram],
    layers: Mapping[str, MoELayer],
    record: Mapping[str, Any],
    folder: Path,
) -> dict[str, tuple[int, int]]:
    """Layer -> E and I of its sums, which are those of the model.

    Raises:
        DataError: they are not.
    """
    remedy = "give the Gram matrices of this model"
    if isinstance(sums, GramFolder):
        sizes = {name: known.sizes for name, known in sums.layers.items()}
        found = differences(sums.provenance, record)
        if found.deciding or found.unnamed:
            why = ", ".join(found.deciding) or found.text
            raise DataError(f"grams {sums.folder}: are not of {folder}: {why}; {remedy}")
    else:
        sizes = {name: (own.num_experts, own.intermediate_size) for name, own in sums.items()}
    for name, (experts, width) in sizes.items():
        layer = layers.get(name)
        if layer is None or (experts, width) != (layer.num_experts, layer.intermediate_size):
            raise DataError(
                f"grams: have sums of {experts} experts of {width} neurons for layer {name!r}, "
                f"which {folder} does not have; {remedy}"
            )
    return sizes
