"""Dequantized matrices have the values that the formats define; damaged parts are refused."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from reap_driver.files.quantization import Quantization
from reap_driver.files.safetensors_file import read_header
from reap_driver.load.methods import plain_weights
from reap_driver.load.tensor_reader import TensorReader, start, stored
from reap_kernels.errors import CheckpointError, UnsupportedModel
from tests.driver.formats.build import BNB_4, CT_NVFP4, MODELOPT, TORCHAO
from tests.driver.load.values import Parts, blocks, nvfp4, rows_of_bytes, scaled, torchao_metadata

Make = Callable[..., tuple[Parts, Tensor]]
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
NVFP4 = partial(nvfp4, compressed=False), MODELOPT
NVFP4_CT = partial(nvfp4, compressed=True), CT_NVFP4
CASES: dict[str, tuple[Make, dict[str, Any]]] = {
    "nf4": (blocks, BNB_4),
    "fp4 float32": (partial(blocks, kind="fp4", dtype="float32"), BNB_4),
    "nf4 nested": (partial(blocks, nested=True, dtype="float16"), BNB_4),
    "nf4 nested partly": (partial(blocks, nested=True, size=32), BNB_4),
    "nf4 larger blocks": (partial(blocks, size=4096), BNB_4),
    "nf4 stored as bfloat16": (partial(blocks, storage=torch.bfloat16), BNB_4),
    "nf4 stored as float32": (partial(blocks, storage=torch.float32), BNB_4),
    "int8": (rows_of_bytes, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "nvfp4": NVFP4,
    "nvfp4 compressed-tensors": NVFP4_CT,
    "nvfp4 weights only": (NVFP4[0], {**MODELOPT, "quant_algo": "W4A16_NVFP4"}),
}


def read(
    folder: Path,
    parts: Parts,
    settings: dict[str, Any],
    device: str = "cpu",
    metadata: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The tensors of a checkpoint with one matrix, `a.b.weight`."""
    path = folder / "model.safetensors"
    tensors = {f"a.b.{leaf}": part.contiguous() for leaf, part in parts.items()}
    save_file(tensors, path, metadata=metadata or {})
    reader = TensorReader()
    found = stored(read_header(path).tensors, reader)
    quantization = Quantization(settings["quant_method"], settings)
    return plain_weights(found, quantization, "here", torch.device(device))


@pytest.mark.parametrize("name", CASES)
def test_values(name: str, tmp_path: Path) -> None:
    """Every bit, and the announced shape and dtype; 40 x 208 has a partial block of 64."""
    make, settings = CASES[name]
    parts, value = make(40, 208, seed=3)
    bias = torch.randn(40)
    found = read(tmp_path, {**parts, "bias": bias}, settings)
    assert list(found) == ["a.b.bias", "a.b.weight"]
    matrix = found["a.b.weight"]
    assert matrix.get_shape() == [40, 208]
    assert matrix.get_dtype() == NAMES[value.dtype]
    start(found, found)
    made = matrix[...]
    assert made.dtype == value.dtype
    assert torch.equal(made, value)
    assert torch.equal(found["a.b.bias"][...], bias)
    assert matrix.nbytes >= made.nbytes
    assert torch.equal(matrix[3:5], value[3:5])
    there = read(tmp_path, parts, settings, "meta")["a.b.weight"][...]
    assert (there.device.type, there.shape) == ("meta", value.shape)


def test_parts_of_other_dimensions(tmp_path: Path) -> None:
    """bitsandbytes takes the tables and scales of a block in any shape."""
    parts, value = blocks(8, 32, nested=True)
    names = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    columns = {f"weight.{name}": parts[f"weight.{name}"][:, None] for name in names}
    found = read(tmp_path, {**parts, **columns}, BNB_4)["a.b.weight"]
    assert torch.equal(found[...], value)


def test_scales_of_activations_are_left_out(tmp_path: Path) -> None:
    for name in ("nvfp4", "nvfp4 compressed-tensors"):
        make, settings = CASES[name]
        parts, value = make(8, 32)
        other = {"input_scale": torch.ones(()), "input_global_scale": torch.ones(1)}
        if name == "nvfp4":
            del other["input_global_scale"]
        found = read(tmp_path, {**parts, **other}, settings)
        assert list(found) == ["a.b.weight"]
        assert torch.equal(found["a.b.weight"][...], value)


def lacking(leaf: str) -> Callable[[Parts], Parts]:
    return lambda parts: {key: value for key, value in parts.items() if key != leaf}


def having(leaf: str, value: Tensor) -> Callable[[Parts], Parts]:
    return lambda parts: {**parts, leaf: value}


STATE = "weight.quant_state.bitsandbytes__nf4"


def text(content: str) -> Tensor:
    return torch.tensor(list(content.encode())).byte()


def said(**fields: Any) -> Callable[[Parts], Parts]:
    """Other fields in the JSON."""

    def change(parts: Parts) -> Parts:
        state = json.loads(bytes(parts[STATE].tolist()))
        return {**parts, STATE: text(json.dumps({**state, **fields}))}

    return change


DAMAGED: list[tuple[str, Callable[[Parts], Parts], str]] = [
    ("nf4", lacking("weight.absmax"), r"a.b.weight.absmax is none; .* F32 \[4\]: download"),
    ("nf4", lacking("weight.quant_map"), "quant_map is none"),
    ("nf4", lacking(STATE), "has 0 quant_state, and needs one; download"),
    ("nf4", lacking("weight"), "has a.b.weight.*, but no a.b.weight; download"),
    ("nf4", having(STATE, text("{")), "is not readable"),
    ("nf4", having(STATE, text("[1]")), "expected an object"),
    ("nf4", having(STATE, torch.zeros(8)), r"it is F32 \[8\]"),
    ("nf4", having(STATE, torch.zeros(1 << 17).byte()), r"it is U8 \[131072\]"),
    ("nf4", having("weight.quant_state.bitsandbytes__fp4", text("{}")), "has 2 quant_state"),
    ("nf4", said(shape=[8, 16]), r"absmax is F32 \[4\]; a matrix \[8, 16\] .* F32 \[2\]"),
    ("nf4", said(shape=[8, 26]), r"has 128 bytes of codes for \[8, 26\]"),
    ("nf4", said(shape=[2, 4, 32]), r"has the shape \[2, 4, 32\]; matrices, .* apply the plan to"),
    ("nf4", said(blocksize=0), "'blocksize' is 0; expected"),
    ("nf4", said(dtype="int8"), "'dtype' is 'int8'; expected one of bfloat16"),
    ("nf4", having("weight.absmax", torch.zeros(4).half()), r"absmax is F16 \[4\]"),
    ("nf4", having("weight", torch.zeros(1, 128).byte()), r"is U8 \[1, 128\]; 4-bit codes in one"),
    ("nf4 nested", lacking("weight.nested_quant_map"), "nested_quant_map is none"),
    ("nf4 nested", said(nested_offset=None), "'nested_offset' is None"),
    (
        "int8",
        having("SCB", torch.ones(7)),
        r"weight is I8 \[8, 32\] with SCB F32 \[7\]; .* F32 \[r",
    ),
    (
        "int8",
        having("weight_format", torch.tensor(1).byte()),
        "has weight_format 1, an order .* 0, rows can be read",
    ),
    ("nvfp4", lacking("weight_scale"), "is stored as NVFP4 without weight_scale; download"),
    ("nvfp4", lacking("weight"), "is stored as NVFP4 without weight;"),
    ("nvfp4", having("weight_scale", torch.ones(8, 2)), "weight_scale is F32; NVFP4 has F8_E4M3"),
    ("nvfp4", having("weight_scale_2", torch.ones(2)), r"weight_scale_2 has shape \[2\]"),
    ("nvfp4", having("weight", torch.zeros(8, 24).byte()), r"has shape \[8, 24\] and .* \[8, 2\]"),
    ("nvfp4", having("pre_quant_scale", torch.ones(32)), "multiplies the inputs of a layer"),
    ("nvfp4 compressed-tensors", lacking("weight_scale"), "is stored as NVFP4 without weight_s"),
    (
        "nvfp4 compressed-tensors",
        having("weight_g_idx", torch.zeros(32).int()),
        "has a weight_g_idx: its columns are not in their order; observe",
    ),
    (
        "nvfp4 compressed-tensors",
        having("weight_zero_point", torch.zeros(8, 2).char()),
        "has weight_zero_point, which NVFP4 does not use; use the config.json",
    ),
    (
        "nvfp4 compressed-tensors",
        having("weight", torch.zeros(8, 32)),
        "has weight, which NVFP4 does not use",
    ),
    (
        "nvfp4 compressed-tensors",
        lacking("weight_global_scale"),
        "weight_packed is U8; I32|F8_E4M3",
    ),
]


@pytest.mark.parametrize(("name", "change", "says"), DAMAGED)
def test_damaged_parts(
    name: str, change: Callable[[Parts], Parts], says: str, tmp_path: Path
) -> None:
    make, settings = CASES[name]
    with pytest.raises((CheckpointError, UnsupportedModel), match=rf"here: .*({says})"):
        read(tmp_path, change(make(8, 32)[0]), settings)["a.b.weight"][...]


REFUSED = [
    (
        MODELOPT,
        {"quant_algo": "NVFP4_AWQ"},
        "quant_algo of .* is 'NVFP4_AWQ'; NVFP4 or W4A16_NVFP4 can be read",
    ),
    (MODELOPT, {"quant_algo": None}, "quant_algo of .* is None; NVFP4 or W4A16_NVFP4 can be read"),
    (CT_NVFP4, {"format": "mxfp4-pack-quantized"}, "has format 'mxfp4-pack-quantized'"),
]


@pytest.mark.parametrize(("settings", "change", "says"), REFUSED)
def test_refused_settings(settings: dict[str, Any], change: dict[str, Any], says: str) -> None:
    changed = {**settings, **change}
    with pytest.raises(UnsupportedModel, match=f"here: .*{says}.* apply the plan to this one"):
        plain_weights(
            {}, Quantization(changed["quant_method"], changed), "here", torch.device("cpu")
        )


def test_groups_of_another_size_and_parts_of_another_format(tmp_path: Path) -> None:
    make, settings = CASES["nvfp4 compressed-tensors"]
    group = settings["config_groups"]["group_0"]
    weights = {**group["weights"], "group_size": 32}
    other = {**settings, "config_groups": {"group_0": {**group, "weights": weights}}}
    with pytest.raises(UnsupportedModel, match="group_size is 32; 16 can be read"):
        read(tmp_path, make(8, 32)[0], other)
    weights = {"type": "float", "num_bits": 8, "strategy": "channel"}
    other = {**settings, "format": "float-quantized"}
    other["config_groups"] = {"group_0": {**group, "weights": weights}}
    with pytest.raises(CheckpointError, match="has a weight_global_scale, but no group"):
        read(tmp_path, make(8, 32)[0], other)


AO: dict[str, tuple[Make, dict[str, str]]] = {
    "Int8Tensor": (scaled, {}),
    "Int8Tensor without zero points": (partial(scaled, zeros=False), {}),
    "IntxUnpackedToInt8Tensor": (
        partial(scaled, group=16, scales=torch.bfloat16),
        {"kind": "IntxUnpackedToInt8Tensor"},
    ),
    "Float8Tensor": (partial(scaled, kind="Float8Tensor"), {"kind": "Float8Tensor"}),
    "float32": (partial(scaled, group=16, dtype="float32"), {"dtype": "float32"}),
}


def read_torchao(folder: Path, parts: Parts, **said: str) -> dict[str, Any]:
    metadata = torchao_metadata({f"a.b.{leaf}": part for leaf, part in parts.items()}, **said)
    return read(folder, parts, TORCHAO, metadata=metadata)


@pytest.mark.parametrize("name", AO)
def test_values_of_torchao(name: str, tmp_path: Path) -> None:
    make, said = AO[name]
    parts, value = make(24, 48, seed=5)
    found = read_torchao(tmp_path, {**parts, "bias": torch.ones(24)}, **said)
    assert sorted(found) == ["a.b.bias", "a.b.weight"]
    matrix = found["a.b.weight"]
    assert (matrix.get_shape(), matrix.get_dtype()) == ([24, 48], NAMES[value.dtype])
    assert torch.equal(matrix[...], value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lacking("_weight_scale"), "has no a.b._weight_scale; download"),
        (
            having("_weight_qdata", torch.zeros(24, 48)),
            r"has codes F32 \[24, 48\], and a Int8Tensor",
        ),
        (having("_weight_scale", torch.ones(24, 5)), r"has scale \[24, 5\] for \[24, 48\]"),
        (having("_weight_scale", torch.ones(2, 12)), r"has scale \[2, 12\] for \[24, 48\]"),
        (having("_weight_scale", torch.ones(24, 1).int()), "has a scale of I32, and needs BF16"),
        (having("weight", torch.zeros(24, 48)), "is stored with and without codes; download"),
    ],
)
def test_damaged_parts_of_torchao(
    change: Callable[[Parts], Parts], says: str, tmp_path: Path
) -> None:
    parts = scaled(24, 48)[0]
    metadata = torchao_metadata({f"a.b.{leaf}": part for leaf, part in parts.items()})
    with pytest.raises(CheckpointError, match=f"here: a.b.weight {says}"):
        read(tmp_path, change(parts), TORCHAO, metadata=metadata)


@pytest.mark.parametrize(
    ("entry", "kind", "says"),
    [
        ({"_type": "Int4Tensor"}, UnsupportedModel, "is a torchao 'Int4Tensor'; Int8Tensor, "),
        ({"_type": "Int8Tensor"}, CheckpointError, "metadata of 'a.b.weight' are not readable"),
        ({"_type": 7}, CheckpointError, "'_type' is 7"),
        (
            {
                "_type": "Int8Tensor",
                "_data": {"block_size": [1, 48], "dtype": {"_data": "float64"}},
            },
            UnsupportedModel,
            "has the dtype 'float64'; bfloat16, float16, float32 can be read",
        ),
        (
            {
                "_type": "Int8Tensor",
                "_data": {"block_size": [1, 48], "dtype": {"_data": "bfloat16"}},
                "_tensor_data_names": ["qdata", "scale", "act_pre_scale"],
            },
            UnsupportedModel,
            "has the parts qdata, scale, act_pre_scale; qdata, scale and zero_point can be read",
        ),
    ],
)
def test_torchao_that_is_not_read(
    entry: dict[str, Any], kind: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=says):
        read(tmp_path, scaled(24, 48)[0], TORCHAO, metadata={"a.b.weight": json.dumps(entry)})
