"""Quantized routers and experts: every format's tensors are packed here straight from the format's
definition, pruned, unpacked and compared code by code; what is not known is refused."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from reap_driver.checkpoint import apply_plan, layouts, stream
from reap_driver.checkpoint.derive import ExpertDim
from reap_driver.checkpoint.layouts import Matrix, Stored
from reap_driver.checkpoint.quantization import Quantization, quantization_of
from reap_driver.checkpoint.safetensors_file import read_header
from reap_driver.checkpoint.source import open_source
from reap_driver.checkpoint.stream import OutShard, out_tensor, write_shard
from reap_driver.plan import Plan
from reap_kernels.errors import CheckpointError, ReapError, UnsupportedModel
from tests.driver.checkpoint import saved
from tests.driver.checkpoint.saved import same_bytes

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(codes: Tensor, bits: int) -> Tensor:
    """[rows, n] codes to [rows, words] of 32 bits: code i of a row begins at bit i * bits."""
    rows = []
    for row in codes.tolist():
        whole = sum(code << (bits * i) for i, code in enumerate(row))
        words = -(-len(row) * bits // 32)
        rows.append([whole >> (32 * w) & 0xFFFFFFFF for w in range(words)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """What `pack` packed; what is behind the last code must be zero."""
    rows = []
    for row in words.tolist():
        whole = sum((word & 0xFFFFFFFF) << (32 * w) for w, word in enumerate(row))
        assert whole >> (bits * count) == 0
        rows.append([whole >> (bits * i) & (1 << bits) - 1 for i in range(count)])
    return torch.tensor(rows)


def interleave(codes: Tensor) -> Tensor:
    """[rows, n] codes in the order in which AWQ fills its words."""
    return codes.view(len(codes), -1, 8)[:, :, list(AWQ_ORDER)].reshape(codes.shape)


def straighten(codes: Tensor) -> Tensor:
    """The inverse of `interleave`."""
    found = torch.empty_like(codes).view(len(codes), -1, 8)
    found[:, :, list(AWQ_ORDER)] = codes.view(len(codes), -1, 8)
    return found.view(codes.shape)


@dataclass(frozen=True)
class Codes:
    """A quantized matrix: weight[o, i] is scales[g, o] * (codes[o, i] - zeros[g, o])."""

    codes: Tensor  # [out, in]
    zeros: Tensor  # [groups, out]
    scales: Tensor  # [groups, out]
    order: Tensor  # [in], the group of every input

    @classmethod
    def random(cls, rows: int, columns: int, bits: int, group: int) -> "Codes":
        generator = torch.Generator().manual_seed(rows + columns + bits)
        groups = columns // group
        return cls(
            torch.randint(1 << bits, (rows, columns), generator=generator),
            torch.randint(1 << bits, (groups, rows), generator=generator),
            torch.rand(groups, rows, generator=generator).half(),
            torch.arange(columns, dtype=torch.int32)[torch.randperm(columns)] // group,
        )

    def gptq(self, bits: int) -> dict[str, Tensor]:
        return {
            "qweight": pack(self.codes, bits).T.contiguous(),
            "qzeros": pack(self.zeros, bits),
            "scales": self.scales,
            "g_idx": self.order,
        }

    def awq(self) -> dict[str, Tensor]:
        return {
            "qweight": pack(interleave(self.codes.T), 4),
            "qzeros": pack(interleave(self.zeros), 4),
            "scales": self.scales,
        }

    def compressed(self, bits: int) -> dict[str, Tensor]:
        return {
            "weight_packed": pack(self.codes, bits),
            "weight_zero_point": pack(self.zeros, bits).T.contiguous(),
            "weight_scale": self.scales.T.contiguous(),
            "weight_shape": torch.tensor(self.codes.shape),
            "weight_g_idx": self.order,
        }

    def check_gptq(self, found: Mapping[str, Tensor], bits: int, kept: list[int]) -> None:
        codes, zeros = unpack(found["qweight"].T, bits, self.codes.shape[1]), found["qzeros"]
        assert torch.equal(codes, self.codes[kept])
        assert torch.equal(unpack(zeros, bits, len(kept)), self.zeros[:, kept])
        assert torch.equal(found["scales"], self.scales[:, kept])
        assert torch.equal(found["g_idx"], self.order)

    def check_awq(self, found: Mapping[str, Tensor], kept: list[int]) -> None:
        codes = straighten(unpack(found["qweight"], 4, len(kept)))
        assert torch.equal(codes.T, self.codes[kept])
        assert torch.equal(straighten(unpack(found["qzeros"], 4, len(kept))), self.zeros[:, kept])
        assert torch.equal(found["scales"], self.scales[:, kept])

    def check_compressed(self, found: Mapping[str, Tensor], bits: int, kept: list[int]) -> None:
        columns = self.codes.shape[1]
        assert torch.equal(unpack(found["weight_packed"], bits, columns), self.codes[kept])
        zeros = unpack(found["weight_zero_point"].T, bits, len(kept))
        assert torch.equal(zeros, self.zeros[:, kept])
        assert torch.equal(found["weight_scale"], self.scales.T[kept])
        assert found["weight_shape"].tolist() == [len(kept), columns]
        assert torch.equal(found["weight_g_idx"], self.order)


def cut(
    folder: Path,
    tensors: dict[str, Tensor],
    matrix: Matrix,
    kept: list[int],
    settings: dict[str, Any],
) -> dict[str, Tensor]:
    """Write the tensors of one matrix, cut them as the writer does, read what it wrote."""
    folder.mkdir(exist_ok=True)
    save_file({f"gate.{leaf}": tensor for leaf, tensor in tensors.items()}, folder / "in")
    entries = read_header(folder / "in").tensors
    method = Quantization(settings.get("quant_method"), settings)
    out = []
    for key, entry in entries.items():
        stored = Stored(key, entry, key[5:], lambda leaf: entries.get(f"gate.{leaf}"))
        made = out_tensor(key, entry, layouts.cut(stored, matrix, tuple(kept), method))
        assert made is not None
        out.append(made)
    (folder / "out").unlink(missing_ok=True)
    write_shard(folder, OutShard("out", out), lambda _: None)
    return {key[5:]: tensor for key, tensor in saved.read_all_of(folder / "out").items()}


def router(experts: int, columns: int, tail: int = 0) -> Matrix:
    dim = ExpertDim("layer", 0, 1, tail, experts)
    return Matrix("gate.weight", (experts + tail, columns), dim)


def some(experts: int, keep: int) -> list[int]:
    return sorted(
        torch.randperm(experts, generator=torch.Generator().manual_seed(3))[:keep].tolist()
    )


GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize("group", [16, 64, 256])
@pytest.mark.parametrize(
    ("bits", "experts", "keep"),
    [(2, 64, 48), (3, 64, 32), (4, 8, 8), (4, 64, 40), (4, 128, 96), (8, 64, 60)],
)
def test_gptq(bits: int, experts: int, keep: int, group: int, tmp_path: Path) -> None:
    codes, kept = Codes.random(experts, 256, bits, group), some(experts, keep)
    found = cut(tmp_path, codes.gptq(bits), router(experts, 256), kept, GPTQ)
    codes.check_gptq(found, bits, kept)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "auto-round"},
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
        {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    ],
)
def test_formats_that_pack_as_gptq_does(settings: dict[str, Any], tmp_path: Path) -> None:
    codes, kept = Codes.random(32, 64, 4, 32), some(32, 24)
    codes.check_gptq(cut(tmp_path, codes.gptq(4), router(32, 64), kept, settings), 4, kept)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "awq", "version": "gemm"},
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
    ],
)
@pytest.mark.parametrize("group", [16, 256])
def test_awq(settings: dict[str, Any], group: int, tmp_path: Path) -> None:
    codes, kept = Codes.random(64, 256, 4, group), some(64, 40)
    codes.check_awq(cut(tmp_path, codes.awq(), router(64, 256), kept, settings), kept)


CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("experts", "keep"), [(8, 5), (64, 48), (60, 33)])
@pytest.mark.parametrize("group", [32, 128])
def test_compressed_tensors(bits: int, experts: int, keep: int, group: int, tmp_path: Path) -> None:
    """Numbers of experts that do not fill words too: the format fills them with 0. All zero points
    of 8 experts and one group are one word.
    """
    codes, kept = Codes.random(experts, 128, bits, group), some(experts, keep)
    found = cut(tmp_path, codes.compressed(bits), router(experts, 128), kept, CT)
    codes.check_compressed(found, bits, kept)


def test_rows_behind_the_experts_stay(tmp_path: Path) -> None:
    """Identity experts: four rows that belong to no expert."""
    codes, kept = Codes.random(36, 64, 4, 32), [0, 3, 17, 31]
    rows = [*kept, 32, 33, 34, 35]
    found = cut(tmp_path, codes.gptq(4), router(32, 64, tail=4), kept, GPTQ)
    codes.check_gptq(found, 4, rows)


def test_the_result_does_not_depend_on_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, kept = Codes.random(64, 256, 4, 16), some(64, 24)
    whole = cut(tmp_path, codes.awq(), router(64, 256), kept, {"quant_method": "awq"})
    monkeypatch.setattr(stream, "BUFFER_BYTES", 64)
    parts = cut(tmp_path, codes.awq(), router(64, 256), kept, {"quant_method": "awq"})
    assert all(torch.equal(whole[leaf], parts[leaf]) for leaf in whole)


SCALES: list[tuple[str, tuple[int, ...], dict[str, Any], str]] = [
    ("weight_scale", (), {"quant_method": "modelopt"}, "copy"),
    ("weight_scale", (1,), {"quant_method": "fp8"}, "copy"),
    ("weight_scale", (1, 1), {"quant_method": "fp8"}, "copy"),
    ("weight_scale", (16,), {"quant_method": "compressed-tensors"}, "rows"),
    ("weight_scale", (16, 1), {"quant_method": "compressed-tensors"}, "rows"),
    ("weight_scale", (16, 2), {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "rows"),
    ("weight_scale_inv", (1, 2), {"quant_method": "fp8", "weight_block_size": [128, 16]}, "copy"),
    ("weight_scale_2", (), {"quant_method": "modelopt"}, "copy"),
    ("input_scale", (1,), {"quant_method": "modelopt"}, "copy"),
    ("SCB", (16,), {"quant_method": "bitsandbytes"}, "rows"),
    ("bias", (16,), {"quant_method": "gptq"}, "rows"),
]


@pytest.mark.parametrize(("leaf", "shape", "settings", "how"), SCALES)
def test_scales_of_a_router(
    leaf: str, shape: tuple[int, ...], settings: dict[str, Any], how: str, tmp_path: Path
) -> None:
    kept, tensor = [1, 4, 9], torch.rand(shape)
    found = cut(tmp_path, {leaf: tensor}, router(16, 32), kept, settings)[leaf]
    assert torch.equal(found, tensor[kept] if how == "rows" else tensor)


def test_four_bit_floats_are_packed_along_the_inputs(tmp_path: Path) -> None:
    weight = torch.randint(0, 256, (16, 16)).to(torch.uint8)
    nvfp4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    found = cut(tmp_path, {"weight": weight}, router(16, 32), [2, 5], nvfp4)
    assert torch.equal(found["weight"], weight[[2, 5]])


STACK = Matrix("experts.gate_up_proj", (8, 48, 32), ExpertDim("layer", 0, 1, 0, 8))
STACKED: list[tuple[str, tuple[int, ...], str]] = [
    ("blocks", (8, 48, 1, 16), "rows"),
    ("scales", (8, 48, 1), "rows"),
    ("weight_scale", (8, 48, 2), "rows"),
    ("weight_scale", (8,), "rows"),
    ("weight_scale", (), "copy"),
    ("weight_scale_2", (8,), "rows"),
    ("weight_scale_2", (1,), "copy"),
    ("input_scale", (), "copy"),
    ("scale_inv", (8, 2, 3), "rows"),
    ("qweight", (8, 4, 48), "rows"),
    ("weight", (8, 48, 16), "rows"),
]


@pytest.mark.parametrize(("leaf", "shape", "how"), STACKED)
def test_tensors_of_a_stack(leaf: str, shape: tuple[int, ...], how: str, tmp_path: Path) -> None:
    kept, tensor = [0, 2, 7], torch.rand(shape)
    found = cut(tmp_path, {leaf: tensor}, STACK, kept, {"quant_method": "modelopt"})[leaf]
    assert torch.equal(found, tensor[kept] if how == "rows" else tensor)


UNREAD: list[tuple[str, tuple[int, ...], torch.dtype, dict[str, Any], Matrix]] = [
    # Lengths that the number of experts divides, which once were taken to hold experts.
    ("qweight", (32, 16), torch.int32, {"quant_method": "hqq"}, router(16, 256)),
    ("qweight", (32, 16), torch.int32, {}, router(16, 256)),
    ("qweight", (32, 16), torch.int32, {"quant_method": "awq"}, router(16, 256)),
    ("qweight", (32, 16), torch.int32, {**GPTQ, "checkpoint_format": "marlin"}, router(16, 256)),
    ("qweight", (256, 2), torch.int32, {"quant_method": "awq", "version": "gemv"}, router(16, 256)),
    ("g_idx", (128,), torch.int32, GPTQ, router(16, 256)),
    ("absmax", (64,), torch.float32, {"quant_method": "bitsandbytes"}, router(16, 256)),
    ("quant_map", (16,), torch.float32, {"quant_method": "bitsandbytes"}, router(16, 256)),
    ("weight", (2048, 1), torch.uint8, {"quant_method": "bitsandbytes"}, router(16, 256)),
    ("weight", (8, 256), torch.uint8, {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"},
     router(16, 256)),
    ("weight", (256, 16), torch.int8, {"quant_method": "eetq"}, router(16, 256)),
    ("W_q", (16, 128), torch.uint8, {"quant_method": "hqq"}, router(16, 256)),
    ("weight_scale", (2, 16), torch.float32, {"quant_method": "fp8"}, router(16, 256)),
    ("weight_scale_inv", (2, 2), torch.float32, {"quant_method": "fp8"}, router(16, 256)),
    ("input_scale", (16,), torch.float32, {"quant_method": "fp8"}, router(16, 256)),
    ("weight_packed", (32, 16), torch.int32, CT, router(16, 256)),
    ("weight_zero_point", (16, 2), torch.int32, CT, router(16, 256)),
    ("weight_shape", (3,), torch.int64, CT, router(16, 256)),
    ("absmax", (64,), torch.float32, {"quant_method": "bitsandbytes"}, STACK),
    ("blocks", (16, 48, 1, 16), torch.uint8, {"quant_method": "mxfp4"}, STACK),
    ("g_idx", (8,), torch.int32, GPTQ, STACK),
    ("qzeros", (0, 2), torch.int32, {"quant_method": "awq"}, router(16, 256)),
    ("weight_scale", (16, 0), torch.float32, {"quant_method": "fp8"}, router(16, 256)),
    ("qweight", (8, 48), torch.int32, GPTQ, STACK),
    ("scales", (8, 4), torch.float16, GPTQ, STACK),
    ("mystery", (8, 4), torch.float32, {"quant_method": "gptq"}, STACK),
]  # fmt: skip


@pytest.mark.parametrize(("leaf", "shape", "dtype", "settings", "matrix"), UNREAD)
def test_what_is_not_known_is_refused(
    leaf: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    settings: dict[str, Any],
    matrix: Matrix,
    tmp_path: Path,
) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        cut(tmp_path, {leaf: torch.zeros(shape, dtype=dtype)}, matrix, [0, 1], settings)
    message = str(caught.value)
    assert f"gate.{leaf}: " in message
    assert matrix.name in message
    assert "layout that is not read" in message
    assert settings.get("quant_method", "names no quantizer") in message
    assert "quantized from" in message


LEAVES = ["weight", "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale"]
LEAVES += ["weight_scale_inv", "weight_scale_2", "weight_zero_point", "weight_shape", "SCB", "bias"]
LEAVES += ["weight_g_idx", "input_scale", "blocks", "packed", "absmax", "quant_map", "W_q", "meta"]
METHODS = [
    "gptq",
    "awq",
    "auto-round",
    "compressed-tensors",
    "fp8",
    "modelopt",
    "bitsandbytes",
    "hqq",
]


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_length_that_the_experts_divide_means_nothing(leaf: str, tmp_path: Path) -> None:
    """Twice the number of experts along every dimension, in every format."""
    for number, method in enumerate(METHODS):
        for matrix, shape in ((router(16, 256), (32, 32)), (STACK, (16, 16, 16))):
            for dtype in (torch.int32, torch.uint8, torch.float32):
                tensors, settings = (
                    {leaf: torch.zeros(shape, dtype=dtype)},
                    {"quant_method": method},
                )
                with pytest.raises(UnsupportedModel, match="layout that is not read"):
                    cut(tmp_path / f"{number}", tensors, matrix, [0, 1], settings)


def test_numbers_that_loaders_refuse_are_refused(tmp_path: Path) -> None:
    codes = Codes.random(64, 64, 4, 32)
    for tensors, settings in ((codes.gptq(4), GPTQ), (codes.awq(), {"quant_method": "awq"})):
        with pytest.raises(UnsupportedModel, match=r"45 rows would be left; keep a multiple of 8"):
            cut(tmp_path, tensors, router(64, 64), some(64, 45), settings)


def test_blocks_of_scales_over_several_experts_are_refused(tmp_path: Path) -> None:
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    scales = {"weight_scale_inv": torch.rand(2, 2)}
    with pytest.raises(UnsupportedModel, match=r"a block of 128 rows .*gate\.weight shares"):
        cut(tmp_path, scales, router(256, 256), some(256, 128), settings)
    rows = Matrix("gate.weight", (8 * 256, 32), ExpertDim("layer", 0, 256, 0, 8))
    scales = {"weight_scale_inv": torch.rand(16, 1)}
    found = cut(tmp_path, scales, rows, [1, 6], settings)
    assert torch.equal(found["weight_scale_inv"], scales["weight_scale_inv"][[2, 3, 12, 13]])


def test_a_shape_tensor_of_another_matrix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gate\.weight_shape.*\[9, 32\].*has 8"):
        cut(tmp_path, {"weight_shape": torch.tensor([9, 32])}, router(8, 32), [0, 1], CT)


# Whole checkpoints.


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
    """16 experts, 256 inputs, groups of 16: once cut along the inputs, without a word."""
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
    assert quantization_of(open_source(tmp_path)) == Quantization()
    (tmp_path / "quant_config.json").write_text(json.dumps({"w_bit": 4, "version": "GEMM"}))
    assert quantization_of(open_source(tmp_path)).packing == "awq"
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "desc_act": True}))
    assert quantization_of(open_source(tmp_path)).packing == "gptq"
    saved.change_config(tmp_path, text_config={"quantization_config": {"quant_method": "FP8"}})
    assert quantization_of(open_source(tmp_path)).method == "fp8"


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
