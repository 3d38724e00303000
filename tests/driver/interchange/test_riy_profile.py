"""Profiles of Reap-It-Yourself: both ways, and every way one can be wrong."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reap_driver.interchange import riy_profile
from reap_kernels.errors import PlanError
from tests.driver.interchange import facts


def server_keeps(path: Path, layer: int, experts: int) -> list[int]:
    """What the server keeps of a layer: it reads `pruned_experts` and nothing else."""
    gone = {expert for number, expert in json.loads(path.read_text())["pruned_experts"]
            if number == layer}  # fmt: skip
    return [expert for expert in range(experts) if expert not in gone]


@pytest.mark.parametrize("kept", [(), ((0, 1, 2), (3, 4, 5, 2), (0, 1, 2, 3, 4, 5))])
def test_there_and_back(tmp_path: Path, kept: tuple[tuple[int, ...], ...]) -> None:
    source = facts.source(*map(tuple, map(sorted, kept)))
    path = tmp_path / "profile.json"
    assert riy_profile.write(path, source) == []
    again = riy_profile.read(path, facts.model())
    assert source.plan is not None
    assert again.kept == source.plan.kept
    assert again.criterion == "imported"
    assert again.notes[0].startswith("imported from the Reap-It-Yourself profile profile.json")
    for number, name in zip(facts.NUMBERS, facts.NAMES, strict=True):
        assert server_keeps(path, number, facts.EXPERTS) == list(again.kept[name])
    again.save(tmp_path / "plan.json")


def test_fields(tmp_path: Path) -> None:
    riy_profile.write(tmp_path / "p", facts.source())
    content = json.loads((tmp_path / "p").read_text())
    assert content.pop("pruned_experts")[:3] == [[1, 1], [1, 4], [2, 0]]
    assert content == {"version": 1, "model": "some/model", "workload": "plan by mine"}


def test_no_folder_of_a_user_is_named(tmp_path: Path) -> None:
    source = facts.source()
    model = {**source.model.record["model"], "id": "/home/someone/tiny"}
    record = {**source.model.record, "model": model}
    riy_profile.write(tmp_path / "p", replace(source, model=replace(source.model, record=record)))
    assert json.loads((tmp_path / "p").read_text())["model"] == "tiny"


def test_an_expert_named_twice_goes_once(tmp_path: Path) -> None:
    (tmp_path / "p").write_text('{"pruned_experts": [[1, 0], [1, 0], [1, 1]]}')
    kept = riy_profile.read(tmp_path / "p", facts.model()).kept
    assert [list(ids) for ids in kept.values()] == [[2, 3, 4, 5], [*range(6)], [*range(6)]]


def test_version_2_masks_before_top_k(tmp_path: Path) -> None:
    content = {"version": 2, "routing_mode": "pre_topk_mask", "pruned_experts": [[1, 0], [5, 3]]}
    (tmp_path / "p").write_text(json.dumps(content))
    kept = riy_profile.read(tmp_path / "p", facts.model()).kept
    assert [len(ids) for ids in kept.values()] == [5, 6, 5]


WRONG: dict[str, tuple[Any, str]] = {
    "a list": ([], "the content is \\[\\]; expected an object"),
    "no pairs": ({}, "field 'pruned_experts' is missing"),
    "three": ({"pruned_experts": [[1, 2, 3]]}, r"pruned_experts\[0\]' has 3 entries"),
    "a text": ({"pruned_experts": [[1, "2"]]}, r"pruned_experts\[0\]\[1\]' is '2'"),
    "version 3": ({"version": 3, "pruned_experts": [[1, 2]]}, "'version' is 3; .* 1 to 2"),
    "no mode": ({"version": 2, "pruned_experts": [[1, 2]]}, "version 2 without its routing_mode"),
    "dropping": (
        {"version": 2, "routing_mode": "post_topk_drop", "pruned_experts": [[1, 2]]},
        "is post_topk_drop, which drops experts after the router has chosen",
    ),
    "a mode": ({"routing_mode": "never", "pruned_experts": []}, "one of pre_topk_mask, post"),
    "a dense layer": ({"pruned_experts": [[0, 2]]}, "its layer 0 has no experts"),
    "another expert": ({"pruned_experts": [[5, 6]]}, "layer 5 has 6 experts, none of them 6"),
    "nothing": ({"pruned_experts": []}, "nothing is removed"),
    "too many": ({"pruned_experts": [[1, e] for e in range(5)]}, "the router chooses 2 experts"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_profile_of_the_model_is_refused(tmp_path: Path, wrong: str) -> None:
    content, message = WRONG[wrong]
    (tmp_path / "p").write_text(json.dumps(content))
    with pytest.raises(PlanError, match=message):
        riy_profile.read(tmp_path / "p", facts.model())


def test_routing_groups_stay_equal(tmp_path: Path) -> None:
    grouped = facts.model(n_group=3, topk_group=2)
    (tmp_path / "p").write_text('{"pruned_experts": [[1, 0], [1, 1], [1, 2]]}')
    with pytest.raises(PlanError, match=r"layer model\.layers\.1\.mlp\.experts"):
        riy_profile.read(tmp_path / "p", grouped)
