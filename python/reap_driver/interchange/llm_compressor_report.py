"""Reports of llm-compressor's REAP pruning, what its `report_path` writes: the experts kept of each
MoE block.
"""

from collections.abc import Iterable
from pathlib import Path

from reap_driver.interchange.content import ModelFacts, Source
from reap_driver.interchange.json_files import read_json, unfit, write_json
from reap_driver.planning.plan import Plan
from reap_driver.planning.planner import plan_of_kept
from reap_kernels.provenance import MAX_EXPERTS
from reap_kernels.schema import Int, ListOf, MapOf

WHAT = "report of llm-compressor's REAP"
_KIND = MapOf(ListOf(Int(0, MAX_EXPERTS - 1), shortest=1), 1)


def read(path: Path, model: ModelFacts) -> Plan:
    """The plan that a report is of this model; blocks that it does not name keep all experts.

    Args:
        path: of the report.
        model: the one that was pruned, as it was before: a report has no number of experts.

    Raises:
        PlanError: it is no report, or not of this model.
    """
    layers = _blocks(model.layers)
    kept: dict[str, list[int]] = {}
    for block, ids in read_json(path, WHAT, _KIND).items():
        if block not in layers:
            raise unfit(path, f"{WHAT} on this model", f"the model has no MoE block {block}")
        if len(set(ids)) < len(ids):
            raise unfit(path, WHAT, f"block {block} names an expert twice")
        kept[layers[block]] = ids
    note = f"imported from the {WHAT}, {path.name}"
    return plan_of_kept(kept, model.record, criterion="imported", notes=[note])


def write(path: Path, source: Source) -> list[str]:
    """Writes the report of a plan.

    Args:
        path: of the report.
        source: with a plan of whole experts.

    Returns:
        What to know of it.

    Raises:
        PlanError: the plan is not of whole experts.
    """
    plan = source.experts_plan(WHAT)
    blocks = _blocks(name for name in plan.layers if name in source.model.layers)
    write_json(path, {block: list(plan.layers[name].kept) for block, name in blocks.items()})
    return []


def _blocks(layers: Iterable[str]) -> dict[str, str]:
    """{name of the MoE block: name of the experts in it}: llm-compressor names blocks."""
    return {name.rpartition(".")[0]: name for name in layers}
