"""Masks from plans, masks files and profiles, checked against the model that is served."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import reap_driver as rd
from reap_driver.integrations.vllm.engine.stats_bytes import bytes_of
from reap_driver.integrations.vllm.server.masks import mask_of, profile_of
from reap_driver.integrations.vllm.server.refusals import Refused
from reap_driver.integrations.vllm.server.served_model import ServedModel, paired
from reap_driver.planning.planner import plan_of_kept
from reap_kernels.errors import UnsupportedModel
from tests.driver.integrations.vllm.fake_engine import (
    EXPERTS,
    OURS,
    THEIRS,
    counted,
    glm,
    qwen,
    served,
)

GONE = {OURS[0]: (1, 5), OURS[2]: (0, 3, 7)}  # unequal layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def model(folder: Path) -> ServedModel:
    return served(folder)


def plan_without(gone: Mapping[str, Sequence[int]], model: ServedModel) -> rd.Plan:
    kept = {name: sorted(set(range(EXPERTS)) - set(ids)) for name, ids in gone.items()}
    return plan_of_kept(kept, model.record, criterion="mine")


def content(plan: rd.Plan, folder: Path) -> bytes:
    plan.save(folder / "plan.json")
    return (folder / "plan.json").read_bytes()


EXPECTED = {THEIRS[0]: [1, 5], THEIRS[2]: [0, 3, 7]}


def test_a_plan(model: ServedModel, tmp_path: Path) -> None:
    mask = mask_of(content(plan_without(GONE, model), tmp_path), model)
    assert mask.removed == EXPECTED
    assert re.fullmatch("plan by mine, 5 of 24 experts in 2 layers, sha256 .{12}", mask.source)


def test_a_masks_file(model: ServedModel, folder: Path, tmp_path: Path) -> None:
    rd.save_masks(folder, plan_without(GONE, model), tmp_path / "masks")
    mask = mask_of((tmp_path / "masks").read_bytes(), model)
    assert mask.removed == EXPECTED
    assert mask.source.startswith("masks file, 5 of 24")


def test_a_profile(model: ServedModel) -> None:
    pairs = [[1, 1], [3, 7], [1, 5], [3, 0], [3, 3]]
    for head in ({"version": 1}, {}, {"version": 2, "routing_mode": "pre_topk_mask"}):
        mask = mask_of(json.dumps({**head, "pruned_experts": pairs}).encode(), model)
        assert mask.removed == EXPECTED
        assert mask.source.startswith("Reap-It-Yourself profile, 5 of 24")


def test_a_mask_is_exported_as_it_came(model: ServedModel) -> None:
    text = profile_of(GONE, "mine", model)
    assert json.loads(text)["workload"] == "mine"
    assert mask_of(text.encode(), model).removed == EXPECTED


def profile(*pairs: Sequence[Any], **other: Any) -> bytes:
    return json.dumps({"pruned_experts": pairs, **other}).encode()


def removing(layer: str, *ids: int) -> dict[str, Any]:
    kept = [e for e in range(EXPERTS) if e not in ids]
    return {"num_experts": EXPERTS, "kept": kept, "removed": list(ids), "name": layer}


WRONG: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it is empty; send a plan"),
    "no JSON": (b"hello", "it is neither JSON nor a safetensors file"),
    "a list": (b"[[1, 2]]", "it is JSON, but no object"),
    "unknown": (b'{"removed": {}}', "it is JSON without the names of any of them"),
    "deep": (b"[" * 100_000, "nothing that masks can be made of"),
    "damaged": (b"\x10\0\0\0\0\0\0\0{" + b"\0" * 40, "masks file in the body cannot be read"),
    "a layer": (
        profile([0, 2]),
        "the body: is no Reap-It-Yourself profile of this",
    ),
    "a far layer": (profile([99, 2]), "its layer 99 has no experts"),
    "an expert": (profile([1, 8]), "layer 1 has 8 experts, none of them 8"),
    "negative": (profile([1, -1]), "'pruned_experts[0][1]' is -1; expected a whole number"),
    "a text": (profile([1, "2"]), "'pruned_experts[0][1]' is '2'"),
    "too many": (profile(*([1, e] for e in range(7))), "the router chooses 2 experts"),
    "none": (profile(), "nothing is removed"),
    "dropping": (profile([1, 2], routing_mode="post_topk_drop"), "drops experts after"),
    "a kept map": (b'{"num_layers": 4, "keep": {}}', "a file of the format hipfire"),
    "a newer plan": (b'{"format": "reap-plan", "version": 99}', "plan in the body has version 99"),
    "half a plan": (b'{"format": "reap-plan", "version": 1}', "field 'model' is missing"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_masked_is_refused(model: ServedModel, wrong: str) -> None:
    body, message = WRONG[wrong]
    with pytest.raises(Refused, match=re.escape(message)) as found:
        mask_of(body, model)
    assert found.value.status == 400
    said = str(found.value)
    assert "reap-" not in said.replace("reap-kernels", ""), "the name of a folder"
    assert not re.search("another file|from_|force_model", said), "a remedy that requests lack"


def test_statistics_are_no_mask(model: ServedModel) -> None:
    with pytest.raises(Refused, match="is not a masks file"):
        mask_of(bytes_of(counted({"all": 4})), model)


def test_plans_that_masks_cannot_say(model: ServedModel, tmp_path: Path) -> None:
    plan = plan_without(GONE, model)
    refitted = replace(plan, matrices={"digest": "sha256:0"})
    with pytest.raises(Refused, match="changes the experts that it keeps") as found:
        mask_of(content(refitted, tmp_path), model)
    assert found.value.status == 400


def test_plans_of_other_models(model: ServedModel, tmp_path: Path) -> None:
    other = served(glm(tmp_path), n_group=2)
    foreign = plan_without(dict.fromkeys(OURS, (0, 4)), other)
    with pytest.raises(Refused, match=r"'glm4_moe' there and 'qwen3_moe' here.* of this model.$"):
        mask_of(content(foreign, tmp_path), model)
    renamed = replace(foreign, layers={"model.layers.9.mlp.experts": foreign.layers[OURS[0]]})
    with pytest.raises(Refused, match=r"'model\.layers\.9\.mlp\.experts'"):
        mask_of(content(renamed, tmp_path), model)


def test_groups_stay_equal(tmp_path: Path) -> None:
    model = served(glm(tmp_path), n_group=2)
    even = plan_without({OURS[0]: (0, 4)}, model)
    assert mask_of(content(even, tmp_path), model).removed == {THEIRS[0]: [0, 4]}
    edited = json.loads((tmp_path / "plan.json").read_text())
    for gone, message in (((0, 1), "must be equal"), ((0, 1, 2, 4, 5, 6), "in each routing group")):
        layer = {k: v for k, v in removing(OURS[0], *gone).items() if k != "name"}
        edited["layers"] = {OURS[0]: layer}
        with pytest.raises(Refused, match=message) as found:
            mask_of(json.dumps(edited).encode(), model)
        assert found.value.status == 400


def test_too_few_experts_in_a_plan(model: ServedModel, tmp_path: Path) -> None:
    edited = json.loads(content(plan_without(GONE, model), tmp_path))
    layer = {k: v for k, v in removing(OURS[0], *range(7)).items() if k != "name"}
    edited["layers"] = {OURS[0]: layer}
    with pytest.raises(Refused, match=r"keeps 1 experts in .*, but a token is routed to 2"):
        mask_of(json.dumps(edited).encode(), model)


def test_routers_that_cannot_be_masked(folder: Path, tmp_path: Path) -> None:
    model = served(folder, mask_refusal="its router is given no logits")
    with pytest.raises(Refused, match=f"{OURS[0]}: .* cannot be masked: its router is given no"):
        mask_of(content(plan_without(GONE, model), tmp_path), model)


def test_layers_are_paired_by_name_or_number() -> None:
    theirs = [f"language_model.{name}" for name in OURS]
    assert paired(OURS, list(reversed(theirs))) == dict(zip(OURS, theirs, strict=True))
    assert paired(["layers.1.a", "layers.1.b"], ["layers.1.b", "layers.1.a"]) == {
        "layers.1.a": "layers.1.a",
        "layers.1.b": "layers.1.b",
    }


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (THEIRS[:2], f"layer {OURS[2]}: which of vLLM's MoE layers it is .* (none may be)"),
        (
            (*THEIRS, "model.layers.4.mlp.routed"),
            "layers.4.mlp.routed: vLLM runs it as a MoE layer",
        ),
        ((*THEIRS, "model.layers.3.other"), "(model.layers.3.mlp.routed, model.layers.3.other may"),
    ],
)
def test_layers_of_one_side_are_refused(theirs: Sequence[str], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=re.escape(message).replace(r"\.\*", ".*")):
        paired(OURS, theirs)


@pytest.mark.parametrize("fact", ["num_experts", "top_k", "n_group", "hidden_size"])
def test_models_that_vllm_runs_otherwise_are_refused(folder: Path, fact: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"{OURS[0]}: {fact} is 4 in vLLM and"):
        served(folder, **{fact: 4})
