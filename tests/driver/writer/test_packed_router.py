"""Quantized matrices of experts: the tensors of every format are packed straight from its
definition, cut, unpacked and compared code by code; what is not known is refused.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from reap_driver.model.expert_layout import ExpertDim
from reap_driver.writer import stream
from reap_driver.writer.layouts import Matrix
from reap_kernels.errors import CheckpointError, UnsupportedModel
from tests.driver.writer.packing import CT, GPTQ, Codes, cut, router, some


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
