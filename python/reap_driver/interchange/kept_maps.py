"""Kept-experts maps of hipfire (github.com/warpfront/hipfire, crate hipfire-reap): `reap_plan.json`
with `keep.per_layer`, and the older `keep_by_layer.json`. Both have a row for every decoder layer,
also for those without experts, and as many ids in each.
"""

from collections.abc import Sequence
from pathlib import Path

from reap_driver.interchange.content import ModelFacts, Source, uniform_count
from reap_driver.interchange.json_files import read_json, unfit, write_json
from reap_driver.planning.plan import Plan
from reap_driver.planning.planner import plan_of_kept
from reap_kernels.errors import PlanError
from reap_kernels.provenance import MAX_EXPERTS
from reap_kernels.schema import Anything, Int, ListOf, Record, short

WHAT = "kept-experts map"
_COUNT = Int(1, MAX_EXPERTS)
_ROWS = ListOf(ListOf(Int(0, MAX_EXPERTS - 1), 1), 1)
_KIND = Record(
    {"keep": Record({"per_layer": _ROWS}, open=True)},
    {"num_layers": _COUNT, "original_experts": _COUNT, "quant_overrides": ListOf(Anything())},
    open=True,
)


def read(path: Path, model: ModelFacts) -> Plan:
    """The plan that a map is of this model.

    Args:
        path: of the map, `reap_plan.json`.
        model: that it is for, with its number of decoder layers.

    Raises:
        PlanError: it is no map, or not of this model.
    """
    content = read_json(path, WHAT, _KIND)
    if content.get("num_layers", model.decoder_layers) != model.decoder_layers:
        raise unfit(path, f"{WHAT} of this model", _other_layers(content["num_layers"], model))
    notes = []
    if content.get("quant_overrides"):
        notes.append(f"{path.name} also says how tensors are quantized, which the plan does not")
    rows, experts = content["keep"]["per_layer"], content.get("original_experts")
    return plan_of_rows(path, WHAT, rows, experts, model, notes)


def write(path: Path, source: Source) -> list[str]:
    """Writes the map of a plan.

    Args:
        path: of the map.
        source: with a plan of whole experts, as many in each layer, and the number of decoder
            layers.

    Returns:
        What to know of it.

    Raises:
        PlanError: the plan is not of this kind.
    """
    experts, rows = rows_of(source, WHAT)
    content = {
        "num_layers": len(rows),
        "original_experts": experts,
        "keep": {"per_layer": rows},
        "quant_overrides": [],
    }
    write_json(path, content)
    return []


def plan_of_rows(
    path: Path,
    what: str,
    rows: Sequence[Sequence[int]],
    experts: int | None,
    model: ModelFacts,
    notes: Sequence[str] = (),
) -> Plan:
    """The plan that keeps the experts of rows, one for each decoder layer.

    Args:
        path: of the file.
        what: it is, in words.
        rows: ids of each decoder layer; those of layers without experts say nothing.
        experts: of a layer, before pruning, by the file; None where it does not say.
        model: that the file is for.
        notes: of the plan.

    Raises:
        PlanError: they do not fit the model.
    """
    if len(rows) != model.decoder_layers:
        raise unfit(path, f"{what} of this model", _other_layers(len(rows), model))
    kept = {}
    for number, name in model.numbers().items():
        if experts is not None and model.experts(name) != experts:
            why = f"it is of {experts} experts, and layer {number} has {model.experts(name)}"
            raise unfit(path, f"{what} of this model", why)
        if len(set(rows[number])) < len(rows[number]):
            raise unfit(path, what, f"its layer {number} names an expert twice")
        kept[name] = rows[number]
    said = f"imported from the {what} {path.name}"
    return plan_of_kept(kept, model.record, criterion="imported", notes=[said, *notes])


def rows_of(source: Source, what: str) -> tuple[int, list[list[int]]]:
    """The number of experts of a layer before pruning, and the ids that each decoder layer keeps;
    layers without experts have the first ids, as many as the others.

    Raises:
        PlanError: layers have, or keep, different numbers of experts.
    """
    source.experts_plan(what)
    model, keep = source.model, uniform_count(source, what)
    counts = {name: model.experts(name) for name in model.layers}
    if len(set(counts.values())) > 1:
        raise PlanError(
            f"layers have different numbers of experts, {short(counts)}, and a {what} has one for "
            "all; this model's plans cannot be written as one"
        )
    assert model.decoder_layers is not None  # the table says that the format needs it
    rows = [list(range(keep)) for _ in range(model.decoder_layers)]
    for number, name in model.numbers().items():
        rows[number] = list(source.kept(name))
    return next(iter(counts.values())), rows


def _other_layers(number: int, model: ModelFacts) -> str:
    return f"it is of {number} decoder layers, and the model has {model.decoder_layers}"
