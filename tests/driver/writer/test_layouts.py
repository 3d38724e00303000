"""Key layouts of published checkpoints that transformers' own tiny models do not write: quantized
experts, companions. Every comparison is on bytes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import model_class
from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.writer import stream
from reap_driver.writer.apply import apply_plan
from reap_kernels.errors import UnsupportedModel
from tests.driver.writer import saved
from tests.driver.writer.saved import same_bytes

Tensors = dict[str, torch.Tensor]


def prune(
    full: Path, model: PreTrainedModel, choose: saved.Chooser = saved.scattered, **options: Any
) -> tuple[Plan, Tensors, Tensors]:
    """(plan, tensors before, tensors after) of one run."""
    plan = saved.make_plan(full, model, choose)
    before = saved.read_all(full)
    apply_plan(full, plan, full.parent / "pruned", non_uniform=True, **options)
    return plan, before, saved.read_all(full.parent / "pruned")


@pytest.fixture(params=["same", "differing"])
def choose(request: pytest.FixtureRequest) -> saved.Chooser:
    """As many experts in every layer, or other numbers (all of them in some)."""
    return saved.scattered if request.param == "same" else saved.differing()


def plan_of(plan: Plan, key: str) -> LayerPlan:
    """The plan of the layer that a key on disk belongs to."""
    number = re.search(r"(?:layers|blocks)\.(\d+)\.", key)
    assert number is not None
    return next(p for name, p in plan.layers.items() if f".{number.group(1)}." in name)


def assert_listed(plan: Plan, before: Tensors, after: Tensors, leaves: list[str]) -> None:
    """`<layer>.<i>.<leaf>` holds what `<layer>.<kept[i]>.<leaf>` held, and nothing else is
    listed.
    """
    expected = set()
    for layer, entry in plan.layers.items():
        for new, old in enumerate(entry.kept):
            for leaf in leaves:
                expected.add(f"{layer}.{new}.{leaf}")
                assert same_bytes(
                    after[f"{layer}.{new}.{leaf}"], before[f"{layer}.{old}.{leaf}"]
                ), f"{layer}.{new}.{leaf}"
    listed = {key for key in after if any(key.startswith(f"{layer}.") for layer in plan.layers)}
    assert listed == expected


def assert_rest_unchanged(plan: Plan, before: Tensors, after: Tensors) -> None:
    """Everything outside the MoE blocks is byte for byte what it was."""
    blocks = tuple(layer.removesuffix("experts") for layer in plan.layers)
    rest = {key for key in before if not key.startswith(blocks)}
    assert rest == {key for key in after if not key.startswith(blocks)}
    assert all(same_bytes(before[key], after[key]) for key in rest)


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def as_fp8(tensors: Tensors) -> Tensors:
    """Fine-grained FP8: each expert's and attention matrix gets `weight_scale_inv`."""
    out: Tensors = {}
    for key, value in tensors.items():
        if key.endswith("_proj.weight"):
            out[key] = value.to(torch.float8_e4m3fn)
            out[key + "_scale_inv"] = torch.randn(
                -(-value.shape[0] // 16), -(-value.shape[1] // 16)
            )
        else:
            out[key] = value
    return out


def as_packed(leaves: dict[str, torch.dtype]) -> Callable[[Tensors], Tensors]:
    """Quantized experts without any `.weight`: random data of the given leaves instead."""

    def change(tensors: Tensors) -> Tensors:
        out: Tensors = {}
        for key, value in tensors.items():
            stem, _, leaf = key.rpartition(".")
            if ".experts." in key and leaf == "weight":
                for name, dtype in leaves.items():
                    out[f"{stem}.{name}"] = torch.randint(0, 100, (value.shape[0], 3)).to(dtype)
            else:
                out[key] = value
        return out

    return change


def test_fp8_scales_move_with_their_expert(choose: saved.Chooser, tmp_path: Path) -> None:
    model = saved.save("deepseek_v3", tmp_path / "full")
    saved.change_tensors(tmp_path / "full", as_fp8)
    plan, before, after = prune(tmp_path / "full", model, choose)
    leaves = [f"{p}.{leaf}" for p in PROJECTIONS for leaf in ("weight", "weight_scale_inv")]
    assert_listed(plan, before, after, leaves)
    assert_rest_unchanged(plan, before, after)
    shared = [key for key in before if "shared_experts" in key]
    assert any(key.endswith("weight_scale_inv") for key in shared)
    assert all(same_bytes(before[key], after[key]) for key in shared)


@pytest.mark.parametrize(
    "leaves",
    [
        {"weight_packed": torch.int32, "weight_scale": torch.bfloat16, "weight_shape": torch.int32},
        {
            "qweight": torch.int32,
            "qzeros": torch.int32,
            "scales": torch.float16,
            "g_idx": torch.int32,
        },
        {
            "weight": torch.uint8,
            "weight_scale": torch.float8_e4m3fn,
            "weight_scale_2": torch.float32,
        },
    ],
    ids=["compressed-tensors", "gptq", "nvfp4"],
)
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_packed_experts_move_whole(
    name: str, leaves: dict[str, torch.dtype], choose: saved.Chooser, tmp_path: Path
) -> None:
    model = saved.save(name, tmp_path / "full")
    saved.change_tensors(tmp_path / "full", as_packed(leaves))
    plan, before, after = prune(tmp_path / "full", model, choose)
    assert_listed(plan, before, after, [f"{p}.{leaf}" for p in PROJECTIONS for leaf in leaves])
    assert_rest_unchanged(plan, before, after)
    for layer, entry in plan.layers.items():
        gate = layer.removesuffix("experts") + "gate.weight"
        assert same_bytes(after[gate], before[gate][list(entry.kept)])


def as_mxfp4(tensors: Tensors) -> Tensors:
    """gpt-oss as published: experts as FP4 blocks and scales, biases and router as they are."""
    out: Tensors = {}
    for key, value in tensors.items():
        if key.endswith(("gate_up_proj", "down_proj")):
            experts, _, columns = value.shape
            out[f"{key}_blocks"] = torch.randint(0, 256, (experts, columns, 2, 16)).to(torch.uint8)
            out[f"{key}_scales"] = torch.randint(0, 256, (experts, columns, 2)).to(torch.uint8)
        else:
            out[key] = value.to(torch.bfloat16)
    return out


def test_mxfp4_blocks_scales_and_biases_are_cut_alike(
    choose: saved.Chooser, tmp_path: Path
) -> None:
    model = saved.save("gpt_oss", tmp_path / "full")
    saved.change_tensors(tmp_path / "full", as_mxfp4)
    plan, before, after = prune(tmp_path / "full", model, choose)
    assert before.keys() == after.keys()
    for layer, entry in plan.layers.items():
        block = layer.removesuffix("experts")
        cut = [
            f"{layer}.{p}_{s}"
            for p in ("gate_up_proj", "down_proj")
            for s in ("blocks", "scales", "bias")
        ]
        for key in [*cut, f"{block}router.weight", f"{block}router.bias"]:
            assert same_bytes(after[key], before[key][list(entry.kept)]), key
    assert_rest_unchanged(plan, before, after)


def test_stacked_fp8_scales_are_cut_alike(choose: saved.Chooser, tmp_path: Path) -> None:
    """Step-3.5 stores gate and up separately, stacked, each with its scale."""
    model = saved.save("step3p7", tmp_path / "full")

    def change(tensors: Tensors) -> Tensors:
        out = dict(tensors)
        for key, value in tensors.items():
            if ".moe." in key and "_proj" in key:
                out[key] = value.to(torch.float8_e4m3fn)
                out[f"{key}_scale_inv"] = torch.randn(value.shape[0], 2, 3)
        return out

    saved.change_tensors(tmp_path / "full", change)
    plan, before, after = prune(tmp_path / "full", model, choose)
    assert before.keys() == after.keys()
    checked = 0
    for key, value in before.items():
        if ".moe." not in key:
            assert same_bytes(after[key], value)
            continue
        layer = next(
            entry for name, entry in plan.layers.items() if name.split(".")[2] == key.split(".")[2]
        )
        assert same_bytes(after[key], value[list(layer.kept)]), key
        checked += 1
    assert checked == len(plan.layers) * 8  # three projections with scales, router weight and bias


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "ernie4_5_vl_moe"])
def test_expert_dimension_is_found_when_sizes_agree(name: str, tmp_path: Path) -> None:
    """With as many experts as hidden units, lengths cannot tell the dimensions apart; the library's
    own conversion can."""
    fields = {"num_local_experts": 32} if name == "qwen3_vl_moe" else {"moe_num_experts": 32}
    model = saved.save(name, tmp_path / "full", **fields)
    plan, _, _ = prune(tmp_path / "full", model)
    config = load_config(tmp_path / "pruned")
    loaded, info = model_class(config).from_pretrained(
        tmp_path / "pruned", output_loading_info=True
    )
    assert not any(info.values()), info
    old, new = model.state_dict(), loaded.state_dict()
    for layer, entry in plan.layers.items():
        gate = layer.removesuffix("experts") + "gate.weight"
        assert torch.equal(new[gate], old[gate][list(entry.kept)])
        for leaf in ("gate_up_proj", "down_proj"):
            assert torch.equal(new[f"{layer}.{leaf}"], old[f"{layer}.{leaf}"][list(entry.kept)])


@pytest.mark.parametrize("name", ["ernie4_5_vl_moe", "deepseek_v4", "dbrx", "longcat_flash"])
def test_result_does_not_depend_on_buffers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of inner dimensions and id tables pass through a buffer; its size changes nothing, nor
    does copying without the kernel's help."""
    model = saved.save(name, tmp_path / "full")
    plan = saved.make_plan(tmp_path / "full", model)
    apply_plan(tmp_path / "full", plan, tmp_path / "a")
    monkeypatch.setattr(stream, "BUFFER_BYTES", 64)
    apply_plan(tmp_path / "full", plan, tmp_path / "b")
    monkeypatch.setattr(stream, "_MIN_RANGE_BYTES", 1)
    monkeypatch.delattr("os.copy_file_range")
    apply_plan(tmp_path / "full", plan, tmp_path / "c")
    first = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == first
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == first


def test_tables_by_token_keep_kept_experts(tmp_path: Path) -> None:
    """DeepSeek-V4's first layers route by token id: kept ids stay, removed ones become kept
    ones.
    """
    model = saved.save("deepseek_v4", tmp_path / "full")
    plan, before, after = prune(tmp_path / "full", model)
    tables = [key for key in before if key.endswith("tid2eid")]
    assert tables
    for key in tables:
        layer = plan_of(plan, key)
        kept = torch.tensor(layer.kept)
        old, new = before[key], kept[after[key]]
        stays = torch.isin(old, kept)
        assert torch.equal(new[stays], old[stays])
        assert not stays.all()
        for row in new:
            assert len(set(row.tolist())) == len(row)


def test_unexplained_tensor_in_a_block_is_refused(tmp_path: Path) -> None:
    model = saved.save("qwen3_moe", tmp_path / "full")
    plan = saved.make_plan(tmp_path / "full", model)
    saved.change_tensors(
        tmp_path / "full", lambda t: {**t, "model.layers.1.mlp.mystery.weight": torch.zeros(8, 4)}
    )
    with pytest.raises(UnsupportedModel, match=r"mlp\.mystery\.weight.*matches nothing"):
        apply_plan(tmp_path / "full", plan, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


def test_ignored_tensors_elsewhere_are_kept(tmp_path: Path) -> None:
    model = saved.save("qwen3_moe", tmp_path / "full")
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    saved.change_tensors(tmp_path / "full", lambda t: {**t, key: torch.arange(4.0)})
    _, before, after = prune(tmp_path / "full", model)
    assert torch.equal(before[key], after[key])
