"""Weights of GPTQ, AWQ and AutoRound: values as the formats define them, streamed as resident."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import reap_driver as rd
from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import read_model
from reap_driver.files.checkpoint import open_checkpoint
from reap_driver.files.quantization import Quantization, method_of
from reap_driver.files.safetensors_file import read_header
from reap_driver.load.methods import plain_weights
from reap_driver.load.resident import load_model
from reap_driver.load.tensor_reader import Readable, TensorReader, start, stored
from reap_driver.memory.checkpoint_size import estimated
from reap_kernels.errors import CheckpointError, UnsupportedModel
from tests.driver.load.words import CASES, LESS, V2, WORDS, auto_round, awq, gptq, matrix
from tests.driver.published.reduce import VOCAB
from tests.driver.streaming import passes
from tests.driver.streaming.packing import BF16, F16, F32, LINEAR, ROUTED, Parts, checkpoints
from tests.driver.writer import saved

CPU = torch.device("cpu")


# -- single matrices -------------------------------------------------------------------------------


def read(
    folder: Path, settings: dict[str, Any], parts: Parts, reader: TensorReader, module: str = "a.b"
) -> dict[str, Readable]:
    """Tensors of a file with the parts of one matrix."""
    path = folder / "model.safetensors"
    save_file({f"{module}.{leaf}": part.contiguous() for leaf, part in parts.items()}, path)
    quantization = Quantization(method_of(settings, "awq"), settings)
    return plain_weights(stored(read_header(path).tensors, reader), quantization, "here", CPU)


def value(folder: Path, settings: dict[str, Any], parts: Parts, module: str = "a.b") -> Tensor:
    reader = TensorReader()
    try:
        return read(folder, settings, parts, reader, module)[f"{module}.weight"][...]
    finally:
        reader.close()


@pytest.mark.parametrize("name", CASES)
def test_values(name: str, tmp_path: Path) -> None:
    """Every bit, the announced shape and dtype; each byte is read once."""
    settings, make = CASES[name]
    parts, expected = make(64, 96, np.random.default_rng(0))
    reader = TensorReader()
    tensors = read(tmp_path, settings, {**parts, "bias": torch.randn(64)}, reader)
    assert sorted(tensors) == ["a.b.bias", "a.b.weight"]
    found = tensors["a.b.weight"]
    assert found.get_shape() == [64, 96]
    assert found.get_dtype() == {BF16: "BF16", F16: "F16", F32: "F32"}[expected.dtype]
    start(tensors, ["a.b.weight"])
    made = found[...]
    reader.close()
    assert made.dtype == expected.dtype
    assert made.is_contiguous()
    assert torch.equal(made, expected)
    assert reader.bytes_read == sum(part.nbytes for part in parts.values())
    assert found.nbytes >= max(made.nbytes, reader.bytes_read)


def test_zero_points_differ_by_variant(tmp_path: Path) -> None:
    """The same words stand for other values in each variant; nothing but the settings tells."""
    parts, _ = matrix(64, 96, np.random.default_rng(0))
    variants = (gptq(sym=False, **V2), gptq(sym=False, provider="auto-round"), gptq(sym=False))
    found = [value(tmp_path, settings, parts) for settings in variants]
    scales = parts["scales"].repeat_interleave(16, 0).T
    assert torch.allclose((found[0] - found[1]).float(), scales.float(), atol=2e-4)
    carried = found[1] != found[2]  # where a zero point was 15, or one before it in its word was
    assert 0 < carried.float().mean() < 0.2


def lacking(leaf: str) -> Callable[[Parts], Parts]:
    return lambda parts: {key: value for key, value in parts.items() if key != leaf}


def adding(leaf: str, value: Tensor) -> Callable[[Parts], Parts]:
    return lambda parts: {**parts, leaf: value}


GROUPS = torch.arange(64, dtype=torch.int32) // 16
PLAIN, ORDERED = gptq(), gptq(desc_act=True)


@pytest.mark.parametrize(
    ("settings", "change", "said"),
    [
        (PLAIN, lacking("qzeros"), r"has g_idx, qweight, scales, but no qzeros; download"),
        (PLAIN, lacking("scales"), r"but no scales; download"),
        (ORDERED, lacking("g_idx"), r"has qweight, qzeros, scales, but no g_idx; download"),
        (PLAIN, adding("qweight", torch.zeros(8, 8)), "qweight is F32; I32 can be read"),
        (PLAIN, adding("qzeros", torch.zeros(4, 1).byte()), "qzeros is U8; I32 can be read"),
        (PLAIN, adding("scales", torch.ones(4, 8).int()), "scales is I32; F16 or BF16 or F32"),
        (PLAIN, adding("qweight", torch.zeros(2, 8, 8).int()), r"\[2, 8, 8\]; 2 dimensions"),
        (PLAIN, adding("qweight", torch.zeros(6, 8).int()), r"shape \[6, 8\], not \[8, 8\]"),
        (PLAIN, adding("qweight", torch.zeros(8, 6).int()), r"shape \[8, 6\], not \[8, 8\]"),
        (PLAIN, adding("scales", torch.ones(2, 8)), r"scales has shape \[2, 8\], not \[4, 8\]"),
        (PLAIN, adding("scales", torch.ones(0, 8)), r"scales has shape \[0, 8\]; 2 dimensions"),
        (PLAIN, adding("qzeros", torch.ones(4, 2).int()), r"qzeros has shape \[4, 2\], not \[4, 1"),
        (PLAIN, adding("g_idx", GROUPS + 1), "g_idx has values from 1 to 4, but there are 4 group"),
        (PLAIN, adding("g_idx", GROUPS - 1), "g_idx has values from -1 to 2, but there are 4 grou"),
        (PLAIN, adding("g_idx", GROUPS.float()), "g_idx is F32; I32 or I64 can be read"),
        (gptq(group=32), adding("g_idx", GROUPS), r"in groups of 32 inputs \(gptq\) make it for 8"),
        (gptq(bits=8), adding("g_idx", GROUPS), r"qweight has shape \[8, 8\], not \[16, 8\], as 8"),
        (PLAIN, adding("weight", torch.zeros(8, 64)), "has both a weight and g_idx, .*; download"),
        (awq(), lambda parts: parts, "has a g_idx, which AWQ does not use; use the config.json"),
    ],
)
def test_parts_that_do_not_fit(
    settings: dict[str, Any], change: Callable[[Parts], Parts], said: str, tmp_path: Path
) -> None:
    parts, _ = matrix(8, 64, np.random.default_rng(0), order=False)
    with pytest.raises((CheckpointError, UnsupportedModel), match=f"here: a.b.*{said}"):
        value(tmp_path, settings, change(parts))


def test_outputs_that_awq_cannot_pack(tmp_path: Path) -> None:
    parts = {"qweight": torch.zeros(32, 2).int(), "qzeros": torch.zeros(2, 2).int()}
    with pytest.raises(CheckpointError, match=r"a\.b has 12 outputs, which AWQ cannot pack; a"):
        value(tmp_path, awq(), {**parts, "scales": torch.ones(2, 12)})


# -- settings by module ----------------------------------------------------------------------------

EIGHT = {"bits": 8, "group_size": 32}
MODULE = "model.layers.3.mlp.experts.7.down_proj"
BY_MODULE: dict[str, dict[str, Any]] = {
    "dynamic": gptq(**V2, dynamic={r"+:.*\.down_proj": EIGHT}),
    "dynamic, the first that matches": gptq(
        **V2, dynamic={r"-:.*\.up_proj": {}, r".*\.7\.down_proj$": EIGHT, ".*": {"bits": 2}}
    ),
    "extra_config by name": auto_round(packing="auto_round", extra_config={MODULE: EIGHT}),
    "extra_config, names first": auto_round(
        packing="auto_round", extra_config={".*": {"bits": 2}, MODULE: EIGHT}
    ),
    "extra_config by expression": auto_round(
        packing="auto_round", extra_config={r"experts\.\d+\.down": EIGHT, "lm_head": {"bits": 16}}
    ),
    "extra_config without a change": auto_round(
        8, "auto_round", group_size=32, extra_config={MODULE: {}, "lm_head": None}
    ),
}


@pytest.mark.parametrize("name", BY_MODULE)
def test_settings_of_a_module(name: str, tmp_path: Path) -> None:
    parts, expected = matrix(32, 64, np.random.default_rng(0), bits=8, group=32)
    assert torch.equal(value(tmp_path, BY_MODULE[name], parts, MODULE), expected)


EXCEPTED: dict[str, dict[str, Any]] = {
    r"dynamic\['-:.*down'\]": gptq(**V2, dynamic={"-:.*down": {}}),
    rf"extra_config\['{MODULE}'\]": auto_round(extra_config={MODULE: {"bits": 16}}),
    "modules_to_not_convert": gptq(modules_to_not_convert=["lm_head", "model.layers.3"]),
    "modules_in_block_to_quantize": gptq(modules_in_block_to_quantize=[["mlp.up_proj"], ["o"]]),
}


@pytest.mark.parametrize("name", EXCEPTED)
def test_a_packed_module_that_settings_except(name: str, tmp_path: Path) -> None:
    parts, _ = matrix(32, 64, np.random.default_rng(0))
    with pytest.raises(CheckpointError, match=f"{MODULE} has a qweight, but .*{name} excepts it"):
        value(tmp_path, EXCEPTED[name], parts, MODULE)


@pytest.mark.parametrize(
    "settings",
    [
        gptq(modules_to_not_convert=["mlp.gate", "model.layers.30", "experts.7.down"]),
        gptq(modules_in_block_to_quantize=[["self_attn.o_proj"], ["mlp.experts.7.down_proj"]]),
        gptq(modules_in_block_to_quantize=[MODULE]),
        auto_round(block_name_to_quantize="model.layers", extra_config={"lm_head": {"bits": 16}}),
    ],
)
def test_settings_that_except_others(settings: dict[str, Any], tmp_path: Path) -> None:
    zeros = WORDS if settings["quant_method"] == "gptq" else LESS
    parts, expected = matrix(32, 64, np.random.default_rng(0), zeros=zeros)
    assert torch.equal(value(tmp_path, settings, parts, MODULE), expected)


# -- refusals --------------------------------------------------------------------------------------

OLD: dict[str, Any] = {"meta": {"quantizer": "gptqmodel:0.8.9"}}
THREE: dict[str, Any] = {"meta": {"quantizer": ["gptqmodel:6.0"]}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "marlin": (gptq(checkpoint_format="marlin"), "checkpoint_format is 'marlin'; 'gptq' or 'gptq"),
    "bitblas": (gptq(checkpoint_format=None, format="bitblas"), "format is 'bitblas'; 'gptq' or"),
    "planar": (gptq(checkpoint_format="gptq_p"), "checkpoint_format is 'gptq_p'"),
    "old marlin": (gptq(is_marlin_format=True), "is_marlin_format is True; checkpoints without"),
    "two formats": (gptq(format="gptq_v2"), "fields that agree can be read"),
    "words of 16 bits": (gptq(pack_dtype="int16"), "pack_dtype is 'int16'; 'int32' can be read"),
    "bits": (gptq(5), "bits is 5; 2 or 3 or 4 or 8 can be read"),
    "group": (gptq(group=0), "group_size is 0; -1"),
    "rotated": (gptq(rotation="hadamard"), "rotation is 'hadamard'; checkpoints without it can"),
    "adapter": (gptq(adapter={"name": "lora"}), "adapter is .*; checkpoints without it can be"),
    "asymmetric": (gptq(sym=False, meta=None), "has sym false and the format 'gptq', in which"),
    "asymmetric, old": (gptq(sym=False, **OLD), "before GPTQModel 0.9 store zero points ambig"),
    "asymmetric, unknown": (gptq(sym=False, meta={"quantizer": "gptqmodel:main"}), "sym false"),
    "3 bits, old": (
        gptq(3, **THREE),
        "meta.quantizer says gptqmodel 6.0, which stores zero points",
    ),
    "a module": (gptq(dynamic={"a": {"bits": 6}}), r"dynamic\['a'\].bits is 6; 2 or 3 or 4 or 8"),
    "gemv": (awq(version="gemv"), "version is 'gemv'; 'gemm' can be read"),
    "gemv_fast": (awq(version=None, format="gemv_fast"), "format is 'gemv_fast'"),
    "awq marlin": (awq(version="marlin"), "version is 'marlin'"),
    "exllama": (awq(version="exllama"), "version is 'exllama'"),
    "llm-awq": (awq(backend="llm-awq"), "backend is 'llm-awq'; the layout of AutoAWQ can be read"),
    "awq bits": (awq(bits=8), "bits is 8; 4 can be read"),
    "auto-round awq bits": (auto_round(8, "auto_round:auto_awq"), "bits is 8; 4 can be read"),
    "packing": (auto_round(packing="auto_round:llm_compressor"), "format is 'auto_round:llm_comp"),
    "old backend": (
        auto_round(packing="", backend="itrex"),
        "backend is 'itrex'; 'auto',",
    ),
    "floats": (auto_round(data_type="mx_fp"), "data_type is 'mx_fp'; 'int' can be read"),
    "activations": (auto_round(act_bits=8), "act_bits is 8; 16 or none can be read"),
    "scales of scales": (auto_round(super_bits=6), "super_bits is 6; checkpoints without it can"),
    "extra": (auto_round(extra_config={"a": {"data_type": "fp"}}), r"\['a'\].data_type is 'fp'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """The message names the field, its value, and the remedy; no tensor is needed."""
    settings, said = REFUSED[name]
    quantization = Quantization(settings["quant_method"], settings)
    with pytest.raises(
        UnsupportedModel, match=f"here: quantization_config.*{said}.*apply the plan to this one"
    ):
        plain_weights({}, quantization, "here", CPU)


SPOILED: list[tuple[dict[str, Any], str]] = [
    (gptq("4"), "'bits' is '4'; expected a whole number"),  # type: ignore[arg-type]
    ({"quant_method": "gptq", "group_size": 16}, "bits is missing"),
    ({"quant_method": "awq", "bits": 4}, "group_size is missing"),
    (gptq(group=-2), "'group_size' is -2"),
    (gptq(dynamic=["-:a"]), "'dynamic' is"),
    (gptq(dynamic={"-:(": {}}), r"dynamic\['-:\('\]: '\(' is not a regular expression"),
    (gptq(dynamic={"a": 7}), "'dynamic.a' is 7"),
    (gptq(dynamic={"a": {"bits": "4"}}), r"dynamic\['a'\]: field 'bits' is '4'"),
    (auto_round(extra_config={"(": {"bits": 8}}), "is not a regular expression"),
    (auto_round(packing=7), "'packing_format' is 7"),  # type: ignore[arg-type]
    (gptq(meta=["gptqmodel:7.0"]), "'meta' is"),
    (gptq(modules_in_block_to_quantize=["a", 7]), "modules_in_block_to_quantize: .* is 7"),
]


@pytest.mark.parametrize(("settings", "said"), SPOILED)
def test_spoiled_settings(settings: dict[str, Any], said: str) -> None:
    quantization = Quantization(settings["quant_method"], settings)
    with pytest.raises(CheckpointError, match=f"here: quantization_config.*{said}.*restore conf"):
        plain_weights({}, quantization, "here", CPU)


# -- models ----------------------------------------------------------------------------------------

MODELS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "gptq": ("qwen3_moe", {LINEAR: "gptq act-order"}, CASES["gptq act-order"][0]),
    "gptq, mixed": (
        "deepseek_v3",
        {r"experts.*down_proj\.weight$": "gptq_v2 8 bits, act-order", ROUTED: "gptq"},
        gptq(dynamic={"+:.*down_proj": CASES["gptq_v2 8 bits, act-order"][0]}),
    ),
    "awq": ("mixtral", {r"experts.*w\d\.weight$": "awq"}, awq(modules_to_not_convert=["gate"])),
    "auto-round": ("qwen3_moe", {ROUTED: "auto-round 3 bits"}, auto_round(3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, tmp_path: Path) -> None:
    """Unquantized modules with the defined values; streamed equals resident; bytes read once."""
    folder, plain = checkpoints(MODELS[name][0], tmp_path, *MODELS[name][1:], cases=CASES)
    mine, theirs = load_model(folder), load_model(plain).state_dict()
    assert not hasattr(mine.config, "quantization_config")
    assert mine.state_dict().keys() == theirs.keys()
    for key, tensor in mine.state_dict().items():
        assert tensor.dtype == theirs[key].dtype
        assert torch.equal(tensor, theirs[key]), key
    data = passes.batches(VOCAB)
    stats, opened = passes.streamed(folder, data)
    passes.assert_same_bits(stats, passes.resident(folder, data, model=mine))
    assert opened.bytes_read == open_checkpoint(folder).nbytes


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_biases_that_the_model_does_not_have(value: float, tmp_path: Path) -> None:
    """AutoGPTQ once gave every layer one, of zeros."""
    folder, plain = checkpoints("qwen3_moe", tmp_path, {LINEAR: "gptq"}, gptq(), cases=CASES)
    tensors = saved.read_all(folder)
    scales = {key: tensor for key, tensor in tensors.items() if key.endswith(".scales")}
    tensors |= {
        key.replace(".scales", ".bias"): torch.full(tensor.shape[1:], value).half()
        for key, tensor in scales.items()
    }
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for options in ({}, {"device_map": {"": "cpu"}}):
        if value:
            with pytest.raises(CheckpointError, match=r"unknown to the model, first .*bias"):
                load_model(folder, **options)
            continue
        found = load_model(folder, **options).state_dict()
        for key, tensor in load_model(plain).state_dict().items():
            assert torch.equal(found[key], tensor), key


def test_settings_in_a_file_beside_config_json(tmp_path: Path) -> None:
    """As AutoGPTQ and AutoAWQ first wrote them."""
    folder, plain = checkpoints("qwen3_moe", tmp_path, {LINEAR: "gptq"}, gptq(), cases=CASES)
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    found = load_model(folder).state_dict()
    for key, tensor in load_model(plain).state_dict().items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", ["auto-round 3 bits", "auto-round 8 bits, asymmetric"])
def test_estimated_size(name: str, tmp_path: Path) -> None:
    """From config.json alone, the bytes that the files have."""
    settings = CASES[name][0]
    folder, _ = checkpoints("qwen3_moe", tmp_path, {LINEAR: name}, settings, cases=CASES)
    config, model = read_model(folder)
    assert estimated(model, config, BF16).nbytes == open_checkpoint(folder).nbytes
    saved.change_config(folder, quantization_config={**settings, "extra_config": {"a": {}}})
    with pytest.raises(CheckpointError, match=r"'auto-round' with extra_config: the size of"):
        estimated(model, load_config(folder), BF16)


def test_device_map(tmp_path: Path) -> None:
    """Modules placed by the library, from the same weights."""
    folder, plain = checkpoints("qwen3_moe", tmp_path, {LINEAR: "gptq"}, gptq(), cases=CASES)
    placed = load_model(folder, device_map={"": "cpu"}).state_dict()
    for key, tensor in load_model(plain).state_dict().items():
        assert torch.equal(placed[key], tensor), key


def test_observed_planned_and_pruned(tmp_path: Path) -> None:
    """A plan of the quantized checkpoint, applied to it: the kept experts as they were stored."""
    folder, _ = checkpoints("qwen3_moe", tmp_path, {LINEAR: "gptq"}, gptq(), cases=CASES)
    stats = rd.observe_streamed(folder, [{"input_ids": ids} for ids in passes.batches(VOCAB).ids])
    plan = rd.make_plan(rd.score(stats), ratio=0.25)
    rd.apply_plan(folder, plan, tmp_path / "pruned")
    before, after = saved.read_all(folder), saved.read_all(tmp_path / "pruned")
    full, pruned = load_model(folder).state_dict(), load_model(tmp_path / "pruned").state_dict()
    for layer, experts in plan.kept.items():
        for new, old in enumerate(experts):
            key = f"{layer}.{{}}.down_proj.qweight"
            assert torch.equal(after[key.format(new)], before[key.format(old)])
        for name in ("gate_up_proj", "down_proj"):
            assert torch.equal(pruned[f"{layer}.{name}"], full[f"{layer}.{name}"][list(experts)])
