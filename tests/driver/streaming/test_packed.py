"""Checkpoints of compressed-tensors: values as the formats define them, streamed as resident."""

import copy
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
from reap_driver.cli.main import main
from reap_driver.files.checkpoint import open_checkpoint
from reap_driver.files.safetensors_file import read_header
from reap_driver.load.compressed_matrices import Matrix, plain_weights
from reap_driver.load.resident import load_model
from reap_driver.load.tensor_reader import TensorReader, start, stored
from reap_kernels.errors import CheckpointError, UnsupportedModel
from tests.driver.published.checkpoint import write_tokenizer
from tests.driver.published.reduce import VOCAB
from tests.driver.streaming import passes
from tests.driver.streaming.packing import (
    ASYMMETRIC,
    BF16,
    CASES,
    F16,
    F32,
    FLOAT,
    KIMI,
    LINEAR,
    ROUTED,
    Parts,
    checkpoints,
    config,
    floats,
    integers,
    two_groups,
)
from tests.driver.writer import saved

CPU = torch.device("cpu")


# -- single matrices -------------------------------------------------------------------------------


def written(folder: Path, **parts: Tensor) -> Path:
    path = folder / "model.safetensors"
    save_file({f"a.b.{leaf}": tensor.contiguous() for leaf, tensor in parts.items()}, path)
    return path


@pytest.mark.parametrize("name", CASES)
def test_values(name: str, tmp_path: Path) -> None:
    """Every bit, the announced shape and dtype; each byte is read once."""
    quantization, make = CASES[name]
    parts, value = make(40, 96, np.random.default_rng(0))
    plain = {"norm": torch.randn(3)}
    reader = TensorReader()
    found = stored(read_header(written(tmp_path, **parts, **plain)).tensors, reader)
    tensors = plain_weights(found, quantization, "here", CPU)
    assert sorted(tensors) == ["a.b.norm", "a.b.weight"]
    matrix = tensors["a.b.weight"]
    assert matrix.get_shape() == [40, 96]
    assert matrix.get_dtype() == {BF16: "BF16", F16: "F16", F32: "F32"}[value.dtype]
    start(tensors, ["a.b.weight"])
    made = matrix[...]
    reader.close()
    assert made.dtype == value.dtype
    assert torch.equal(made, value)
    assert reader.bytes_read == sum(part.nbytes for part in parts.values())
    assert matrix.nbytes >= max(made.nbytes, reader.bytes_read)


def test_scales_of_activations_and_devices(tmp_path: Path) -> None:
    parts, value = floats(8, 16, np.random.default_rng(0), flat=True)
    parts |= {"input_scale": torch.ones(1), "output_scale": torch.ones(1)}
    reader = TensorReader()
    found = stored(read_header(written(tmp_path, **parts)).tensors, reader)
    quantization = CASES["fp8 one scale"][0]
    tensors = plain_weights(found, quantization, "here", CPU)
    assert torch.equal(tensors["a.b.weight"][...], value)
    assert list(tensors) == ["a.b.weight"]
    # Matrices are dequantized on the device: codes are copied to a GPU, not values.
    there = plain_weights(found, quantization, "here", torch.device("meta"))["a.b.weight"][...]
    assert (there.device.type, there.shape) == ("meta", value.shape)
    reader.close()


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("int4")])
def test_kernels_make_the_same(name: str, tmp_path: Path) -> None:
    """What a GPU would compute by `dequantize` where that reads the format."""
    parts, value = CASES[name][1](40, 96, np.random.default_rng(1))
    reader = TensorReader()
    found = stored(read_header(written(tmp_path, **parts)).tensors, reader)
    matrix = plain_weights(found, CASES[name][0], "here", CPU)["a.b.weight"]
    reader.close()
    assert isinstance(matrix, Matrix)
    other = name in ("int4 in groups of 4", "int4 float16", "int4 float32", "int4 zeros")
    assert matrix._kernel_reads(parts) != other
    if not other:
        assert torch.equal(matrix._by_kernel(parts), value)


def lacking(leaf: str) -> Callable[[Parts], Parts]:
    return lambda parts: {key: value for key, value in parts.items() if key != leaf}


def adding(leaf: str, value: Tensor) -> Callable[[Parts], Parts]:
    return lambda parts: {**parts, leaf: value}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lacking("weight_scale"), "has weight_packed, weight_shape as quantized parts"),
        (lacking("weight_packed"), "has weight_scale, weight_shape as quantized parts"),
        (adding("weight", torch.zeros(8, 64).char()), "has weight, weight_packed, weight_scale"),
        (adding("weight", torch.zeros(8, 64)), "has weight, weight_packed, weight_scale"),
        (adding("weight_g_idx", torch.zeros(64)), "has a weight_g_idx: .* apply the plan to this"),
        (adding("weight_zero_point", torch.zeros(1, 2).int()), "has a weight_zero_point, but .* s"),
        (adding("weight_scale", torch.ones(8, 4).bfloat16()), r"has shape \[8, 4\] .* of \[32\]"),
        (adding("weight_scale", torch.ones(8, 3).bfloat16()), r"has shape \[8, 3\] .* of \[32\]"),
        (adding("weight_scale", torch.ones(4, 2).bfloat16()), r"has shape \[4, 2\] .* of \[32\]"),
        (adding("weight_scale", torch.ones(8, 2).byte()), "weight_scale is U8; BF16 or F16 or F32"),
        (adding("weight_packed", torch.zeros(8, 8)), "weight_packed is F32; I32 can be read"),
        (adding("weight_packed", torch.zeros(2, 8, 8).int()), r"\[2, 8, 8\]; matrices can be read"),
        (adding("weight_shape", torch.tensor([8, 60])), r"is \[8, 60\], .* \[8, 64\]; download"),
    ],
)
def test_parts_that_do_not_fit(change: Callable[[Parts], Parts], said: str, tmp_path: Path) -> None:
    parts, _ = integers(8, 64, np.random.default_rng(0))
    reader = TensorReader()
    found = stored(read_header(written(tmp_path, **change(parts))).tensors, reader)
    with pytest.raises((CheckpointError, UnsupportedModel), match=f"here: a.b.*{said}"):
        plain_weights(found, KIMI, "here", CPU)["a.b.weight"][...]
    reader.close()


@pytest.mark.parametrize(
    ("name", "zeros"),
    [
        ("int4 zeros", torch.zeros(40, 2).char()),
        ("int4 zeros", torch.zeros(3, 40).char()),
        ("int4 zeros", torch.zeros(1).char()),
        ("int4 zeros", torch.zeros(4, 3).int()),
        ("int4 zeros", torch.zeros(()).int()),
        ("int8 zeros", torch.zeros(10, 1).int()),
    ],
)
def test_zero_points_that_do_not_fit(name: str, zeros: Tensor, tmp_path: Path) -> None:
    """As many as scales, in the same places; nothing is broadcast."""
    parts, _ = CASES[name][1](40, 96, np.random.default_rng(0))
    assert zeros.shape != parts["weight_zero_point"].shape
    path = written(tmp_path, **{**parts, "weight_zero_point": zeros})
    reader = TensorReader()
    found = stored(read_header(path).tensors, reader)
    with pytest.raises(CheckpointError, match=r"here: a.b.weight_zero_point is I.* codes;"):
        plain_weights(found, CASES[name][0], "here", CPU)
    reader.close()


def test_one_scale_is_not_taken_for_those_of_all_rows(tmp_path: Path) -> None:
    quantization, make = CASES["fp8 by rows"]
    parts, _ = make(40, 96, np.random.default_rng(0))
    parts["weight_scale"] = parts["weight_scale"][:1]
    reader = TensorReader()
    found = stored(read_header(written(tmp_path, **parts)).tensors, reader)
    with pytest.raises(
        CheckpointError, match=r"weight_scale has shape \[1, 1\] for a matrix \[40,"
    ):
        plain_weights(found, quantization, "here", CPU)
    reader.close()


def test_weights_are_of_8_bits_by_default(tmp_path: Path) -> None:
    quantization, make = CASES["int8 packed"]
    quantization = copy.deepcopy(quantization)
    del quantization["config_groups"]["group_0"]["weights"]["num_bits"]
    parts, value = make(40, 96, np.random.default_rng(0))
    reader = TensorReader()
    found = stored(read_header(written(tmp_path, **parts)).tensors, reader)
    assert torch.equal(plain_weights(found, quantization, "here", CPU)["a.b.weight"][...], value)
    reader.close()


def test_parts_that_the_configuration_does_not_have(tmp_path: Path) -> None:
    parts, _ = integers(8, 64, np.random.default_rng(0))
    reader = TensorReader()
    found = stored(read_header(written(tmp_path, **parts)).tensors, reader)
    for name, said in (
        ("fp8 by rows", "has a weight_packed, but no"),
        ("int4 zeros", "has no weight_z"),
    ):
        with pytest.raises(CheckpointError, match=f"here: a.b {said}"):
            plain_weights(found, CASES[name][0], "here", CPU)
    reader.close()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bits": (config(bits=3), "group_0.weights.num_bits is 3; 4 or 8 can be read"),
    "float4": (config(type="float"), "'pack-quantized' and weights.type 'float'"),
    "nvfp4 of groups": (
        config(form="nvfp4-pack-quantized", type="float"),
        "strategy is 'group'; tensor_group can be read",
    ),
    "format": ({**KIMI, "format": None}, "group_0 has format None"),
    "strategy": (config(strategy="tensor_group"), "weights.strategy is 'tensor_group'"),
    "order": (config(actorder="group"), "weights.actorder is 'group'; none, 'weight' or 'static'"),
    "float zeros": (config(8, None, "channel", **FLOAT, **ASYMMETRIC), "symmetric is False"),
    "block": (config(8, None, "block", block_structure="2x4", **FLOAT), "block_structure is '2x4'"),
    "preset": ({**KIMI, "config_groups": {"W4A16": ["Linear"]}}, r"W4A16 is \['Linear'\]"),
    "nothing": ({**KIMI, "config_groups": {}}, "no group of config_groups has weights"),
    "status": ({**KIMI, "quantization_status": "frozen"}, "status is 'frozen'; 'compressed' can"),
    "sparse": ({**KIMI, "sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparse-24-bitmask'"),
    "rotated": ({**KIMI, "transform_config": {"config_groups": {"R1": {}}}}, r"has \['R1'\]"),
    "two widths": (two_groups(bits=8), r"pack \[4, 8\] bits; one number of bits"),
    "one is not read": (two_groups(bits=2), "group_1.weights.num_bits is 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """The message names the field, its value, and the remedy."""
    quantization, said = REFUSED[name]
    with pytest.raises(UnsupportedModel, match=f"here: .*{said}.*apply the plan to this one"):
        plain_weights({}, quantization, "here", CPU)


# -- models ----------------------------------------------------------------------------------------


def assert_equal_states(folder: Path, plain: Path) -> None:
    mine, theirs = load_model(folder).state_dict(), load_model(plain).state_dict()
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert mine[key].dtype == tensor.dtype
        assert torch.equal(mine[key], tensor), key


EVERY = {"ignore": ["lm_head", "re:.*mlp.gate$"]}
MIXED = {**two_groups(bits=8, group=None, strategy="channel", **FLOAT), "ignore": ["lm_head"]}
for group, target in zip(
    MIXED["config_groups"].values(), ("experts", "self_attn.(o|q_a)_"), strict=True
):
    group["targets"] = [rf"re:.*\.{target}.*"]
MODELS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {ROUTED: "int4"}, KIMI),
    "deepseek_v3": ("deepseek_v3", {ROUTED: "int4"}, KIMI),
    "kimi_k25": ("kimi_k25", {ROUTED: "int4"}, KIMI),  # quantization said in text_config
    "every linear layer": ("qwen3_moe", {LINEAR: "int4"}, {**KIMI, **EVERY}),
    "int4 experts, fp8 attention": (
        "deepseek_v3",
        {ROUTED: "int4", r"self_attn\.(o|q_a)_proj\.weight": "fp8 by rows"},
        MIXED,
    ),
    "fp8": ("qwen3_moe", {LINEAR: "fp8 blocks"}, {**CASES["fp8 blocks"][0], **EVERY}),
    "int8": ("deepseek_v3", {ROUTED: "int8 zeros"}, CASES["int8 zeros"][0]),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, tmp_path: Path) -> None:
    """Unquantized modules with the defined values; streamed equals resident; bytes read once."""
    folder, plain = checkpoints(MODELS[name][0], tmp_path, *MODELS[name][1:])
    assert_equal_states(folder, plain)
    data = passes.batches(VOCAB)
    mine, opened = passes.streamed(folder, data)
    passes.assert_same_bits(mine, passes.resident(folder, data))
    theirs = passes.resident(plain, data)
    for layer, stats in theirs.layers.items():
        for field, value in stats.fields().items():
            assert torch.equal(mine.layers[layer].fields()[field], value), (layer, field)
    assert opened.bytes_read == open_checkpoint(folder).nbytes
    assert not hasattr(opened.model.config, "quantization_config")


@pytest.mark.parametrize("dtype", [F32, F16])
def test_dtype_of_the_run(dtype: torch.dtype, tmp_path: Path) -> None:
    """The values as defined, in another dtype; not defined anew in it."""
    folder, plain = checkpoints("qwen3_moe", tmp_path, {ROUTED: "int4"}, KIMI)
    mine = load_model(folder, dtype=dtype).state_dict()
    for key, tensor in load_model(plain).state_dict().items():
        assert mine[key].dtype == dtype
        assert torch.equal(mine[key], tensor.to(dtype)), key


def test_device_map(tmp_path: Path) -> None:
    """Modules placed by the library, from the same weights; on disk they cannot be."""
    folder, plain = checkpoints("qwen3_moe", tmp_path, {LINEAR: "int4"}, {**KIMI, **EVERY})
    placed = load_model(folder, device_map={"": "cpu"}).state_dict()
    for key, tensor in load_model(plain).state_dict().items():
        assert torch.equal(placed[key], tensor), key
    on_disk = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu"}
    on_disk |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    with pytest.raises(UnsupportedModel, match=r"modules on disk.*`stream='always'`"):
        load_model(folder, device_map=on_disk, offload_folder=tmp_path / "off")


def test_unsupported_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    folder, _ = checkpoints("qwen3_moe", tmp_path, {ROUTED: "int4"}, config(actorder="group"))
    for options in ({}, {"device_map": {"": "cpu"}}):
        with pytest.raises(UnsupportedModel, match=f"{folder}: .*weights.actorder is 'group'"):
            load_model(folder, **options)
    with pytest.raises(UnsupportedModel, match=r"weights.actorder is 'group'"):
        passes.streamed(folder, passes.batches(VOCAB))


# -- pruning ---------------------------------------------------------------------------------------


def assert_pruned(source: Path, out: Path, kept: dict[str, tuple[int, ...]]) -> None:
    """Experts' parts byte for byte under their new numbers, and a model that loads with them."""
    before, after = saved.read_all(source), saved.read_all(out)
    named = json.loads((source / "config.json").read_text())
    assert json.loads((out / "config.json").read_text())["quantization_config"] == KIMI
    assert named["quantization_config"] == KIMI
    listed = {key for key in after if ".mlp.experts." in key}
    expected: set[str] = set()
    for layer, experts in kept.items():
        for new, old in enumerate(experts):
            of_old = f"{layer}.{old}."
            for key in (key for key in before if key.startswith(of_old)):
                moved = f"{layer}.{new}.{key.removeprefix(of_old)}"
                expected.add(moved)
                assert saved.same_bytes(after[moved], before[key]), moved
    assert listed == expected
    full, pruned = load_model(source).state_dict(), load_model(out).state_dict()
    for layer, experts in kept.items():
        for name in ("gate_up_proj", "down_proj"):
            assert torch.equal(pruned[f"{layer}.{name}"], full[f"{layer}.{name}"][list(experts)])


def test_observed_planned_and_pruned(tmp_path: Path) -> None:
    folder, _ = checkpoints("deepseek_v3", tmp_path, {ROUTED: "int4"}, KIMI)
    saved.change_config(folder, model_type="kimi_k2")  # as Kimi-K2-Thinking calls it
    model = rd.load_model(folder)
    with rd.observe(model) as observer:
        for ids in passes.batches(VOCAB).ids:
            observer(input_ids=ids)
    plan = rd.make_plan(rd.score(observer.stats), ratio=0.25)
    rd.apply_plan(folder, plan, tmp_path / "pruned")
    assert_pruned(folder, tmp_path / "pruned", dict(plan.kept))
    again = rd.load_model(tmp_path / "pruned")
    assert torch.isfinite(again(input_ids=torch.arange(3, 19)[None]).logits).all()


@pytest.mark.parametrize("stream", ["always", "never"])
def test_command_line(stream: str, tmp_path: Path) -> None:
    folder, _ = checkpoints("qwen3_moe", tmp_path, {ROUTED: "int4"}, KIMI)
    write_tokenizer(folder)
    data, out = tmp_path / "data.txt", tmp_path / "pruned"
    data.write_text("def merge(left, right):\n    return [*left, *right]\n" * 8)
    options = ["--seq-len", "64", "--ratio", "0.5", "--stream", stream, "--quiet"]
    assert main(["prune", str(folder), "--data", str(data), "--out", str(out), *options]) == 0
    plan = rd.Plan.load(out / "reap/plan.json")
    assert_pruned(folder, out, dict(plan.kept))
