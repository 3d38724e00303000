"""Kept-experts maps by layer, the newer and the older: both ways, and what is refused."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from reap_driver.interchange import kept_maps, older_kept_maps
from reap_kernels.errors import PlanError
from tests.driver.interchange import facts

MAPS = {"newer": kept_maps, "older": older_kept_maps}


def server_rows(content: dict[str, Any], layers: int, experts: int) -> list[list[int]]:
    """The rows that hipfire takes of a file, with its checks."""
    newer = isinstance(content["keep"], dict)
    rows = content["keep"]["per_layer"] if newer else content["keep"]
    if newer:
        assert content["num_layers"] == len(rows)
    assert len(rows) == layers
    assert content["original_experts"] == experts
    kept = len(rows[0]) if newer else content["kept_per_layer"]
    for row in rows:
        assert len(row) == kept > 0
        assert len(set(row)) == kept
        assert all(0 <= expert < experts for expert in row)
    return rows


@pytest.mark.parametrize("code", MAPS.values(), ids=MAPS)
def test_there_and_back(tmp_path: Path, code: ModuleType) -> None:
    source, path = facts.source(), tmp_path / "map.json"
    assert code.write(path, source) == []
    rows = server_rows(json.loads(path.read_text()), facts.DECODER_LAYERS, facts.EXPERTS)
    again = code.read(path, facts.model())
    assert source.plan is not None
    assert again.kept == source.plan.kept
    assert [tuple(rows[number]) for number in facts.NUMBERS] == list(again.kept.values())
    assert again.notes == [f"imported from the {code.WHAT} map.json"]


@pytest.mark.parametrize("code", MAPS.values(), ids=MAPS)
def test_plans_that_no_map_can_say(tmp_path: Path, code: ModuleType) -> None:
    uneven = facts.source((0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3))
    with pytest.raises(PlanError, match=r"different numbers of experts.* has one for all"):
        code.write(tmp_path / "m", uneven)
    assert not (tmp_path / "m").exists()


def newer(**changes: Any) -> dict[str, Any]:
    return {"num_layers": 6, "original_experts": 6, "keep": {"per_layer": [[0, 1]] * 6}, **changes}


def older(**changes: Any) -> dict[str, Any]:
    return {"kept_per_layer": 2, "original_experts": 6, "keep": [[0, 1]] * 6, **changes}


ALL = [list(range(6))] * 6
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no map": ({}, "field 'keep' is missing"),
    "layers": (newer(num_layers=5), "it is of 5 decoder layers, and the model has 6"),
    "rows": (newer(keep={"per_layer": [[0, 1]] * 3}), "it is of 3 decoder layers"),
    "experts": (newer(original_experts=8), "it is of 8 experts, and layer 1 has 6"),
    "twice": (newer(keep={"per_layer": [[1, 1]] * 6}), "its layer 1 names an expert twice"),
    "beyond": (newer(keep={"per_layer": [[0, 6]] * 6}), "expert 6 is none of its 6"),
    "empty": (newer(keep={"per_layer": [[]] * 6}), r"per_layer\[0\]' has 0 entries"),
    "all": (newer(keep={"per_layer": ALL}), "nothing is removed"),
    "few": (newer(keep={"per_layer": [[0]] * 6}), "leaves 1, but the router chooses 2"),
    "older no map": ({}, "field 'kept_per_layer' is missing"),
    "older count": (older(kept_per_layer=3), "its layer 0 keeps 2 experts, not 3"),
    "older rows": (older(keep=[[0, 1]] * 7), "it is of 7 decoder layers"),
    "older nothing": (older(kept_per_layer=0), "'kept_per_layer' is 0"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_map_of_the_model_is_refused(tmp_path: Path, wrong: str) -> None:
    content, message = WRONG[wrong]
    code = older_kept_maps if wrong.startswith("older") else kept_maps
    (tmp_path / "m").write_text(json.dumps(content))
    with pytest.raises(PlanError, match=message):
        code.read(tmp_path / "m", facts.model())


def test_what_a_plan_does_not_say_is_noted(tmp_path: Path) -> None:
    content = newer(quant_overrides=[{"layer": 1, "role": "attention", "tier": "q8"}])
    del content["num_layers"], content["original_experts"]  # which they may leave out
    (tmp_path / "m").write_text(json.dumps(content))
    notes = kept_maps.read(tmp_path / "m", facts.model()).notes
    assert notes[1] == "m also says how tensors are quantized, which the plan does not"
