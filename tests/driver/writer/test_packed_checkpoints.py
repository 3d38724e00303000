"""Whole checkpoints of quantizers: packed routers, experts of any leaves, packed stacks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reap_driver.files.checkpoint import open_checkpoint
from reap_driver.files.quantization import Quantization, quantization_of
from reap_driver.planning.plan import Plan
from reap_driver.writer.apply import apply_plan
from reap_kernels.errors import ReapError, UnsupportedModel
from tests.driver.writer import saved
from tests.driver.writer.packing import (
    CT,
    GPTQ,
    Codes,
)
from tests.driver.writer.saved import same_bytes


def quantized(folder: Path, tensors: dict[str, dict[str, Tensor]], settings: Any) -> Plan:
    """A Mixtral (16 experts, hidden size 256) whose routers are stored as these tensors, by layer;
    returns a plan that keeps 8.
    """
    model = saved.save("mixtral", folder, hidden_size=256, num_local_experts=16)

    def change(old: dict[str, Tensor]) -> dict[str, Tensor]:
        new = {k: v for k, v in old.items() if not k.endswith("block_sparse_moe.gate.weight")}
        for layer, leaves in tensors.items():
            stem = f"model.layers.{layer}.block_sparse_moe.gate"
            new.update({f"{stem}.{leaf}": value.clone() for leaf, value in leaves.items()})
        return new

    saved.change_tensors(folder, change)
    saved.change_config(folder, quantization_config=settings)

    def eight(layer: object, generator: torch.Generator) -> list[int]:
        return sorted(torch.randperm(16, generator=generator)[:8].tolist())

    return saved.make_plan(folder, model, eight)


def test_a_checkpoint_with_gptq_routers_where_every_length_divides(tmp_path: Path) -> None:
    """16 experts, 256 inputs, groups of 16: once cut along the inputs, without a warning."""
    codes = {str(layer): Codes.random(16, 256, 4, 16 + 16 * layer) for layer in (0, 1)}
    tensors = {layer: matrix.gptq(4) for layer, matrix in codes.items()}
    plan = quantized(tmp_path / "full", tensors, GPTQ)
    assert len(plan.layers) == len(codes)
    apply_plan(tmp_path / "full", plan, tmp_path / "out")
    found = saved.read_all(tmp_path / "out")
    for layer, matrix in codes.items():
        stem = f"model.layers.{layer}.block_sparse_moe.gate."
        kept = list(plan.layers[f"model.layers.{layer}.mlp.experts"].kept)
        leaves = {key.removeprefix(stem): t for key, t in found.items() if key.startswith(stem)}
        matrix.check_gptq(leaves, 4, kept)


def test_a_checkpoint_with_an_unknown_router_is_refused_before_writing(tmp_path: Path) -> None:
    leaves = {"weight": torch.zeros(2048, 1, dtype=torch.uint8), "weight.absmax": torch.ones(64)}
    plan = quantized(
        tmp_path / "full", {"0": leaves, "1": leaves}, {"quant_method": "bitsandbytes"}
    )
    with pytest.raises(UnsupportedModel, match=r"gate\.weight.*not read.*bitsandbytes"):
        apply_plan(tmp_path / "full", plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_are_found_wherever_quantizers_keep_them(tmp_path: Path) -> None:
    saved.save("mixtral", tmp_path)
    assert quantization_of(open_checkpoint(tmp_path)) == Quantization()
    (tmp_path / "quant_config.json").write_text(json.dumps({"w_bit": 4, "version": "GEMM"}))
    assert quantization_of(open_checkpoint(tmp_path)).packing == "awq"
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "desc_act": True}))
    assert quantization_of(open_checkpoint(tmp_path)).packing == "gptq"
    saved.change_config(tmp_path, text_config={"quantization_config": {"quant_method": "FP8"}})
    assert quantization_of(open_checkpoint(tmp_path)).method == "fp8"


def _expert_leaves(unit: str) -> dict[str, Tensor]:
    """What bitsandbytes, or a per-expert release of another quantizer, stores for one matrix."""
    nf4 = {
        "weight": torch.randint(0, 256, (512, 1)).to(torch.uint8),
        "weight.absmax": torch.randint(0, 256, (512,)).to(torch.uint8),
        "weight.quant_map": torch.rand(16),
        "weight.nested_absmax": torch.rand(8),
        "weight.nested_quant_map": torch.rand(256),
        "weight.quant_state.bitsandbytes__nf4": torch.randint(0, 256, (90,)).to(torch.uint8),
    }
    other = {
        "int8": {
            "weight": torch.randint(-99, 99, (40, 32)).to(torch.int8),
            "SCB": torch.rand(40),
            "weight_format": torch.tensor(0).to(torch.uint8),
        },
        "fp8": {
            "weight": torch.rand(24, 32).to(torch.float8_e4m3fn),
            "weight_scale": torch.rand(8),
        },
        "nvfp4": {
            "weight": torch.randint(0, 256, (24, 16)).to(torch.uint8),
            "weight_scale": torch.rand(24, 2),
            "weight_scale_2": torch.rand(()),
            "anything.new": torch.rand(16),
        },
    }
    return nf4 if unit == "nf4" else other[unit]


UNITS = [
    ("mixtral", "model.layers.{}.block_sparse_moe.experts.{}.w{}", "nf4", "bitsandbytes"),
    ("mixtral", "model.layers.{}.block_sparse_moe.experts.{}.w{}", "int8", "bitsandbytes"),
    ("qwen3_vl_moe", "model.language_model.layers.{}.mlp.experts.{}.p{}_proj", "fp8", "fp8"),
    ("gpt_oss", "model.layers.{}.mlp.experts.{}.p{}_proj", "nvfp4", "modelopt"),
    ("gemma4", "model.layers.{}.experts.{}.p{}_proj", "fp8", "compressed-tensors"),
    ("llama4", "model.layers.{}.feed_forward.experts.{}.p{}_proj", "fp8", "compressed-tensors"),
    ("qwen3_vl_moe", "model.language_model.layers.{0}.mlp.experts.p{2}_proj.{1}", "nvfp4",
     "modelopt"),
    ("dbrx", "transformer.blocks.{0}.ffn.experts.mlp.w{2}_linear.{1}", "nvfp4", "modelopt"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "form", "unit", "method"), UNITS)
def test_experts_move_as_units_whatever_their_leaves(
    name: str, form: str, unit: str, method: str, tmp_path: Path
) -> None:
    """Per-expert tensors of models that transformers stacks, and flattened ones."""
    model = saved.save(name, tmp_path / "full")
    plan = saved.make_plan(tmp_path / "full", model)
    torch.manual_seed(0)
    units: dict[str, Tensor] = {}
    for layer in plan.layers:
        number = next(part for part in layer.split(".") if part.isdigit())
        for expert in range(8):
            for projection in (1, 2, 3):
                stem = form.format(number, expert, projection)
                units.update({f"{stem}.{k}": v for k, v in _expert_leaves(unit).items()})

    def change(old: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**{k: v for k, v in old.items() if ".experts." not in k}, **units}

    saved.change_tensors(tmp_path / "full", change)
    saved.change_config(tmp_path / "full", quantization_config={"quant_method": method})
    apply_plan(tmp_path / "full", plan, tmp_path / "out")
    found = saved.read_all(tmp_path / "out")
    expected = set()
    for layer, entry in plan.layers.items():
        number = next(part for part in layer.split(".") if part.isdigit())
        for new, old in enumerate(entry.kept):
            for projection in (1, 2, 3):
                for leaf in _expert_leaves(unit):
                    key = f"{form.format(number, new, projection)}.{leaf}"
                    expected.add(key)
                    assert same_bytes(
                        found[key], units[f"{form.format(number, old, projection)}.{leaf}"]
                    )
    assert {key for key in found if ".experts." in key} == expected


def test_packed_stacks_are_cut_where_lengths_cannot_tell(tmp_path: Path) -> None:
    """32 experts, 32 inputs, 64 outputs packed in two: the conversion that transposes them when
    they are plain says nothing of packed ones.
    """
    model = saved.save(
        "qwen3_vl_moe", tmp_path / "full", num_local_experts=32, moe_intermediate_size=32
    )
    plan = saved.make_plan(tmp_path / "full", model)
    torch.manual_seed(0)

    def change(old: dict[str, Tensor]) -> dict[str, Tensor]:
        new = dict(old)
        for key in [key for key in old if ".experts." in key]:
            new[key] = torch.randint(0, 256, (32, 32, 32)).to(torch.uint8)
            new[f"{key}_weight_scale"] = torch.rand(32, 32, 4).to(torch.float8_e4m3fn)
            new[f"{key}_weight_scale_2"] = torch.rand(())
        return new

    saved.change_tensors(tmp_path / "full", change)
    settings = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    saved.change_config(tmp_path / "full", quantization_config=settings)
    before = saved.read_all(tmp_path / "full")
    apply_plan(tmp_path / "full", plan, tmp_path / "out")
    found, checked = saved.read_all(tmp_path / "out"), 0
    for layer, entry in plan.layers.items():
        for key in (key for key in before if key.startswith(f"{layer}.")):
            whole = before[key].dim() == 0
            expected = before[key] if whole else before[key][list(entry.kept)]
            assert same_bytes(found[key], expected), key
            checked += 1
    assert checked == 6 * len(plan.layers)


LAYOUTS = [
    ("experts.mystery", "experts", torch.float32),
    ("gate.W_q", "gate", torch.float32),
    ("gate.weight", "gate", torch.uint8),
    ("switch_mlp.up_proj.weight", "experts", torch.int32),  # MLX
]


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization_config": {"quant_method": "hqq"}},
        {"quantization": {"bits": 4, "group_size": 64}},
        {},
    ],
)
@pytest.mark.parametrize(("leaf", "what", "dtype"), LAYOUTS)
def test_an_unknown_layout_is_not_called_a_broken_checkpoint(
    leaf: str, what: str, dtype: torch.dtype, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = saved.save("qwen3_moe", tmp_path / "full")
    gone, key = f"model.layers.1.mlp.{what}", f"model.layers.1.mlp.{leaf}"
    new = {key: torch.ones(8, 3, dtype=dtype)}

    def change(old: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**{k: v for k, v in old.items() if not k.startswith(gone)}, **new}

    saved.change_tensors(tmp_path / "full", change)
    saved.change_config(tmp_path / "full", **settings)
    plan = saved.make_plan(tmp_path / "full", model)
    with pytest.raises(ReapError) as caught:
        apply_plan(tmp_path / "full", plan, tmp_path / "out")
    message = str(caught.value)
    assert "layout" in message
    assert "not read" in message
    assert ("hqq" if "quantization_config" in settings else "no quantizer") in message
    assert "one checkpoint" not in message
    assert "another config" not in message


ROUTERS = [
    ("minimax_m2", "model.layers.{}.block_sparse_moe.gate", 0),
    ("nemotron_h", "backbone.layers.{}.mixer.gate", 1),
    ("gemma4", "model.layers.{}.router.proj", 0),
    ("granitemoe", "model.layers.{}.block_sparse_moe.router.layer", 0),
    ("hunyuan_v1_moe", "model.layers.{}.mlp.gate.wg", 0),
    ("gpt_oss", "model.layers.{}.mlp.router", 0),
]


@pytest.mark.parametrize(("name", "form", "number"), ROUTERS)
def test_routers_of_other_names(name: str, form: str, number: int, tmp_path: Path) -> None:
    """Architectures call their routers differently, on disk and in memory."""
    model = saved.save(name, tmp_path / "full")
    stem = form.format(number)
    codes = Codes.random(8, 32, 4, 16)

    def change(old: dict[str, Tensor]) -> dict[str, Tensor]:
        new = {key: value for key, value in old.items() if key != f"{stem}.weight"}
        assert len(new) == len(old) - 1, sorted(old)
        return {**new, **{f"{stem}.{leaf}": t.clone() for leaf, t in codes.compressed(4).items()}}

    saved.change_tensors(tmp_path / "full", change)
    saved.change_config(tmp_path / "full", quantization_config=CT)
    plan = saved.make_plan(tmp_path / "full", model)
    apply_plan(tmp_path / "full", plan, tmp_path / "out")
    found = saved.read_all(tmp_path / "out")
    leaves = {k.removeprefix(f"{stem}."): t for k, t in found.items() if k.startswith(f"{stem}.")}
    kept = next(entry.kept for layer, entry in plan.layers.items() if f".{number}." in layer)
    codes.check_compressed(leaves, 4, list(kept))
