"""The older kept-experts maps of hipfire, `keep_by_layer.json`, which it still reads; see
`kept_maps`.
"""

from pathlib import Path

from reap_driver.interchange.content import ModelFacts, Source
from reap_driver.interchange.json_files import read_json, unfit, write_json
from reap_driver.interchange.kept_maps import plan_of_rows, rows_of
from reap_driver.planning.plan import Plan
from reap_kernels.provenance import MAX_EXPERTS
from reap_kernels.schema import Int, ListOf, Record

WHAT = "older kept-experts map"
_COUNT = Int(1, MAX_EXPERTS)
_ROWS = ListOf(ListOf(Int(0, MAX_EXPERTS - 1), 1), 1)
_KIND = Record({"kept_per_layer": _COUNT, "keep": _ROWS}, {"original_experts": _COUNT}, open=True)


def read(path: Path, model: ModelFacts) -> Plan:
    """The plan that a map is of this model; see `kept_maps.read`."""
    content = read_json(path, WHAT, _KIND)
    for number, row in enumerate(content["keep"]):
        if len(row) != content["kept_per_layer"]:
            why = f"its layer {number} keeps {len(row)} experts, not {content['kept_per_layer']}"
            raise unfit(path, WHAT, why)
    return plan_of_rows(path, WHAT, content["keep"], content.get("original_experts"), model)


def write(path: Path, source: Source) -> list[str]:
    """Writes the map of a plan; see `kept_maps.write`."""
    experts, rows = rows_of(source, WHAT)
    content = {"kept_per_layer": len(rows[0]), "original_experts": experts, "keep": rows}
    write_json(path, content)
    return []
