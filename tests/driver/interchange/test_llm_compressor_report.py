"""Reports of llm-compressor's REAP: both ways, and every way one can be wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from reap_driver.interchange import llm_compressor_report
from reap_kernels.errors import PlanError
from tests.driver.interchange import facts

BLOCK = "model.layers.1.mlp"


def test_there_and_back(tmp_path: Path) -> None:
    source = facts.source()
    path = tmp_path / "kept.json"
    assert llm_compressor_report.write(path, source) == []
    again = llm_compressor_report.read(path, facts.model())
    assert source.plan is not None
    assert again.kept == source.plan.kept
    assert again.criterion == "imported"
    assert again.notes[0] == "imported from the report of llm-compressor's REAP, kept.json"
    again.save(tmp_path / "plan.json")


def test_content(tmp_path: Path) -> None:
    llm_compressor_report.write(tmp_path / "kept.json", facts.source())
    assert json.loads((tmp_path / "kept.json").read_text()) == {
        "model.layers.1.mlp": [0, 2, 3, 5],
        "model.layers.2.mlp": [1, 2, 3, 4],
        "model.layers.5.mlp": [0, 1, 4, 5],
    }


def test_blocks_that_were_ignored_keep_all(tmp_path: Path) -> None:
    (tmp_path / "p").write_text(json.dumps({BLOCK: [0, 1, 2]}))
    kept = llm_compressor_report.read(tmp_path / "p", facts.model()).kept
    assert [list(ids) for ids in kept.values()] == [[0, 1, 2], [*range(6)], [*range(6)]]


WRONG: dict[str, tuple[Any, str]] = {
    "a list": ([], "the content is \\[\\]; expected an object"),
    "nothing": ({}, "is no report of llm-compressor's REAP"),
    "no expert": ({BLOCK: []}, "field 'model.layers.1.mlp' has 0 entries"),
    "a text": ({BLOCK: ["2"]}, r"field 'model.layers.1.mlp\[0\]' is '2'"),
    "twice": ({BLOCK: [1, 2, 2]}, f"block {BLOCK} names an expert twice"),
    "experts": ({f"{BLOCK}.experts": [1, 2]}, f"the model has no MoE block {BLOCK}.experts"),
    "another expert": ({BLOCK: [0, 6]}, f"layer {BLOCK}.experts: expert 6 is none of its 6"),
    "too few": ({BLOCK: [3]}, "the router chooses 2 experts"),
    "all": ({BLOCK: [*range(6)]}, "nothing is removed"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_report_on_the_model_is_refused(tmp_path: Path, wrong: str) -> None:
    content, message = WRONG[wrong]
    (tmp_path / "p").write_text(json.dumps(content))
    with pytest.raises(PlanError, match=message):
        llm_compressor_report.read(tmp_path / "p", facts.model())
