"""Statistics of ranks as one file that goes on where an offline observation ends."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import reap_driver as rd
import reap_kernels as rk
from reap_driver.integrations.vllm.engine.stats_bytes import bytes_of
from reap_driver.integrations.vllm.server.refusals import Refused
from reap_driver.integrations.vllm.server.served_model import ServedModel
from reap_driver.integrations.vllm.server.statistics import live_statistics
from reap_driver.integrations.vllm.server.status import merged_status
from reap_kernels.errors import DataError, UnsupportedModel
from tests.driver.integrations.vllm.fake_engine import (
    EXPERTS,
    OURS,
    THEIRS,
    Rank,
    counted,
    qwen,
    served,
)
from tests.driver.zoo.build import randomize


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def model(folder: Path) -> ServedModel:
    return served(folder)


def rank(stats: rk.SaliencyStats, **place: Any) -> dict[str, Any]:
    whole = {"share": "whole", "tp": 1, "pp": 1, "dp": 1}
    whole |= {"tp_rank": 0, "pp_rank": 0, "dp_rank": 0, "ep_rank": 0}
    return {**whole, **place, "file": bytes_of(stats)}


def status(**other: Any) -> dict[str, Any]:
    return {**merged_status([Rank(mode="replace").status()]), **other}


def live(ranks: list[dict[str, Any]], model: ServedModel, **other: Any) -> rk.SaliencyStats:
    return live_statistics(ranks, status(**other), model, "0.32.0")


def same(first: rk.SaliencyStats, second: rk.SaliencyStats) -> None:
    for one, other in zip(first.layers.values(), second.layers.values(), strict=True):
        for name, tensor in one.fields().items():
            assert torch.equal(tensor, other.fields()[name]), name


def test_live_and_offline_statistics_merge(
    folder: Path, model: ServedModel, tmp_path: Path
) -> None:
    """And the merged ones make a plan that applies to the model."""
    weights = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    randomize(weights, torch.Generator().manual_seed(0))
    with rd.observe(weights) as observer, observer.group("code"):
        observer(input_ids=torch.arange(60).reshape(2, 30))
    offline = observer.stats
    renamed = dict(zip(THEIRS, offline.layers.values(), strict=True))
    found = live([rank(rk.SaliencyStats(renamed, ["code"]))], model)
    same(found, offline)
    for both in (offline.merge(found), found.merge(offline)):
        assert both.groups == ["code"]
        assert both.layers[OURS[0]].tokens.tolist() == [120]
        both.save(tmp_path / "both")
    loaded = rk.SaliencyStats.load(tmp_path / "both")
    sources = [entry.get("source") for entry in loaded.provenance["data"]]
    assert sources == ["vLLM 0.32.0 live traffic"]
    plan = rd.plan(loaded, 0.25).plan
    assert {len(kept) for kept in plan.kept.values()} == {6}


def test_provenance_says_where_they_are_from(model: ServedModel) -> None:
    stats = live(
        [rank(counted({"all": 3, "code": 5}))], model, every=4, masked={THEIRS[0]: [1]}, source="m"
    )
    found = stats.provenance
    assert found["gate"] == "model"
    assert found["backend"] == "vllm"
    assert found["software"]["vllm"] == "0.32.0"
    assert found["model"]["id"] == model.name
    assert list(found["layers"]) == list(OURS)
    data = [
        {key: entry[key] for key in ("group", "tokens", "mode", "every")} for entry in found["data"]
    ]
    assert data == [
        {"group": "all", "tokens": 3, "mode": "replace", "every": 4},
        {"group": "code", "tokens": 5, "mode": "replace", "every": 4},
    ]
    stopped = live([rank(counted({"all": 3}))], model, mode="off", counted_in=["shadow", "replace"])
    assert stopped.provenance["data"][0]["mode"] == "shadow and replace"
    cached, left, every, masked = found["notes"]
    assert "in its prefix cache" in cached
    assert left == "tokens that vLLM computed and that are not counted: 3 drafted"
    assert every == "one step in 4 was observed: 7 of 9"
    assert masked == "experts are masked: m"


def test_groups_without_tokens_are_left_out(model: ServedModel) -> None:
    stats = live([rank(counted({"all": 0, "code": 5, "chat": 0, "math": 2}))], model)
    assert stats.groups == ["code", "math"]
    assert stats.layers[OURS[1]].tokens.tolist() == [5, 2]
    assert [entry["group"] for entry in stats.provenance["data"]] == ["code", "math"]


def test_nothing_was_counted(model: ServedModel) -> None:
    with pytest.raises(Refused, match="no token was counted yet") as found:
        live([rank(counted({"all": 0, "code": 0}))], model)
    assert found.value.status == 409


def test_tensor_parallel_ranks_count_once(model: ServedModel) -> None:
    whole = counted({"all": 40})
    ranks = [{**rank(whole, tp=2, tp_rank=1), "file": b""}, rank(whole, tp=2)]
    same(live(ranks, model), whole)


def test_expert_parallel_ranks_add_rows_not_tokens(model: ServedModel) -> None:
    halves = [range(4), range(4, EXPERTS)]
    ranks = [
        rank(counted({"all": 40}, experts=half), share="part", tp=2, tp_rank=n, ep_rank=n)
        for n, half in enumerate(halves)
    ]
    same(live(ranks, model), counted({"all": 40}))


def test_pipeline_ranks_have_other_layers(model: ServedModel) -> None:
    parts = [counted({"all": 40}, THEIRS[2:], seed=2), counted({"all": 40}, THEIRS[:2], seed=3)]
    ranks = [rank(part, pp=2, pp_rank=1 - n) for n, part in enumerate(parts)]
    stats = live(ranks, model)
    assert list(stats.layers) == list(OURS)
    assert torch.equal(stats.layers[OURS[2]].norm_sum, parts[0].layers[THEIRS[2]].norm_sum)


def test_ranks_that_do_not_fit(model: ServedModel) -> None:
    shares = [counted({"all": n}, experts=half) for n, half in ((40, range(4)), (39, range(4, 8)))]
    ranks = [
        rank(share, share="part", tp=2, tp_rank=n, ep_rank=n) for n, share in enumerate(shares)
    ]
    with pytest.raises(DataError, match=r"\[40\] and \[39\] tokens"):
        live(ranks, model)


def test_layers_that_no_token_reached(model: ServedModel) -> None:
    stats = counted({"all": 8})
    stats.layers[THEIRS[1]] = rk.LayerStats(EXPERTS)
    found = live([rank(stats)], model)
    assert list(found.layers) == [OURS[0], OURS[2]]
    assert found.provenance["unobserved"] == [OURS[1]]


def test_outputs_that_are_not_finite(model: ServedModel) -> None:
    stats = counted({"all": 8})
    stats.layers[THEIRS[1]].nonfinite[0, 3] += 2
    with pytest.raises(DataError, match=f"{OURS[1]}.* 2 expert outputs were NaN or Inf"):
        live([rank(stats)], model)


def test_a_scale_that_only_vllm_counts(model: ServedModel) -> None:
    """Where transformers multiplies the sum of experts after the router, weights lack it."""
    scaled = [replace(layer, scale=2.5) for layer in model.layers]
    facts = {name: {**said, "scale": 2.5} for name, said in model.facts.items()}
    whole, changed = counted({"all": 8}), replace(model, layers=scaled, facts=facts)
    found = live([rank(whole)], changed).layers[OURS[0]]
    mine = whole.layers[THEIRS[0]]
    assert torch.equal(found.router_weight_sum, mine.router_weight_sum / 2.5)
    assert torch.equal(found.weighted_norm_sum, mine.weighted_norm_sum / 2.5)
    assert torch.equal(found.weighted_norm_sq_sum, mine.weighted_norm_sq_sum / 6.25)
    assert torch.equal(found.norm_sum, mine.norm_sum)
    same(live([rank(whole)], replace(model, layers=scaled)), whole)  # vLLM does not, either
    facts = {name: {**said, "scale": 2.0} for name, said in model.facts.items()}
    with pytest.raises(UnsupportedModel, match=r"sum by 2, transformers by 2\.5"):
        live([rank(whole)], replace(changed, facts=facts))


def test_a_file_is_read_again(model: ServedModel, tmp_path: Path) -> None:
    stats = live([rank(counted({"all": 8, "code": 3}))], model)
    (tmp_path / "s").write_bytes(bytes_of(stats))
    same(rk.SaliencyStats.load(tmp_path / "s"), stats)
