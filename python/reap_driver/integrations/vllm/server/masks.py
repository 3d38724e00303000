"""From a plan, a masks file or a profile of Reap-It-Yourself to the experts that are masked."""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reap_driver.integrations.vllm.server.refusals import Refused
from reap_driver.integrations.vllm.server.served_model import ServedModel
from reap_driver.interchange import riy_profile
from reap_driver.interchange.content import ModelFacts, Source
from reap_driver.interchange.known import known_formats
from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.planning.planner import plan_of_kept
from reap_driver.writer.mask_file import FORMAT, load_masks, maskable
from reap_kernels.errors import ReapError
from reap_kernels.tensor_files import read_tensors

_TAKEN = (
    "a plan (plan.json), a masks file (`reap-kernels apply --as-masks`) or a Reap-It-Yourself "
    "profile"
)

_WHERE = "in the body"  # behind the name of a format, in messages


@dataclass(frozen=True)
class Mask:
    """Experts that are to be masked.

    Attributes:
        removed: {layer: ids}, by vLLM's names, of layers that lose any; ascending.
        source: what it is from, in a line.
    """

    removed: Mapping[str, Sequence[int]]
    source: str


def mask_of(content: bytes, model: ServedModel) -> Mask:
    """The mask that a file asks for, checked against the model.

    Args:
        content: of the file: what it is, is told by it.
        model: that is served.

    Raises:
        Refused: 400; it is no file that masks can be made of, or one of another model; its layers,
            experts or groups do not fit; or a layer cannot be masked. The message has the reason.
    """
    with tempfile.TemporaryDirectory(prefix="reap-") as folder:
        path = Path(folder) / "body"
        path.write_bytes(content)
        try:
            kind, plan = _read(path, model)
            plan, _ = maskable(plan, model.layers, model.record, model.name, forcible=False)
        except ReapError as error:
            text = str(error).replace(f"{folder}/body", _WHERE)
            raise Refused(400, text) from error
    removed = {name: layer.removed for name, layer in plan.layers.items() if layer.removed}
    if not removed:
        raise Refused(400, "it removes no expert; DELETE /reap/mask clears a mask")
    for name, why in model.refusals("mask_refusal").items():
        if name in removed:
            raise Refused(400, f"layer {name}: its router cannot be masked: {why}")
    digest = hashlib.sha256(content).hexdigest()[:12]
    experts = sum(layer.num_experts for layer in model.layers)
    lost = sum(map(len, removed.values()))
    source = f"{kind}, {lost} of {experts} experts in {len(removed)} layers, sha256 {digest}"
    return Mask({model.theirs[name]: list(ids) for name, ids in removed.items()}, source)


def profile_of(removed: Mapping[str, Sequence[int]], source: str, model: ServedModel) -> str:
    """A mask as a profile of Reap-It-Yourself, version 1.

    Args:
        removed: {layer: ids}, by the driver's names; one expert at least.
        source: of the mask, recorded as the profile's workload.
        model: that is served.

    Raises:
        PlanError: the layers of this model cannot be numbered.
    """
    kept = {
        layer.name: sorted(set(range(layer.num_experts)) - set(removed[layer.name]))
        for layer in model.layers
        if layer.name in removed
    }
    plan = plan_of_kept(kept, model.record, criterion="mask")
    with tempfile.TemporaryDirectory(prefix="reap-") as folder:
        path = Path(folder) / "profile.json"
        # A profile's workload is what a plan was calibrated on.
        plan = replace(plan, data=[{"group": source}])
        riy_profile.write(path, Source(ModelFacts(model.record), plan=plan))
        return path.read_text(encoding="utf-8")


def _read(path: Path, model: ServedModel) -> tuple[str, Plan]:
    """What a file is, and the plan that it holds.

    Raises:
        Refused: it is nothing that masks can be made of.
        ReapError: it cannot be read, or does not fit the model.
    """
    kinds = known_formats(path)
    if kinds == ["plan"]:
        plan = Plan.parse(path.read_bytes(), _WHERE)
        return f"plan by {plan.criterion}", plan
    if kinds == ["riy"]:
        facts = ModelFacts(model.record)
        return "Reap-It-Yourself profile", riy_profile.parse(path.read_bytes(), "the body", facts)
    if kinds == ["stats"]:  # any file of tensors
        return "masks file", _plan_of_masks(path)
    what = f"it is a file of the format {' or '.join(kinds)}" if kinds else _unknown(path)
    raise Refused(400, f"the body is nothing that masks can be made of: {what}; send {_TAKEN}")


def _unknown(path: Path) -> str:
    """What a file without a known format is, in words."""
    content = path.read_bytes()
    if not content:
        return "it is empty"
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return "it is neither JSON nor a safetensors file"
    if not isinstance(found, dict):
        return "it is JSON, but no object"
    return "it is JSON without the names of any of them"


def _plan_of_masks(path: Path) -> Plan:
    """The plan that a masks file holds, with the model that the file was made for.

    Raises:
        PlanError: it is no masks file.
    """
    kept = load_masks(path)
    head, masks = read_tensors(path, FORMAT)
    layers = {name: LayerPlan.keeping(len(masks[name]), ids) for name, ids in kept.items()}
    lost = sum(len(layer.removed) for layer in layers.values())
    share = lost / sum(layer.num_experts for layer in layers.values())
    if not lost:
        raise Refused(400, "the masks file removes no expert; DELETE /reap/mask clears a mask")
    return Plan(
        model=head["model"],
        criterion="masks",
        allocation="imported",
        ratio=share,
        layers=layers,
        scores_digest="",
    )
