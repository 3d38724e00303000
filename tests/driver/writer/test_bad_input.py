"""Bad checkpoints, plans and targets: each is refused with one clear line, before anything is
written."""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from reap_driver.compat.model_config import config_digest, load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.files.checkpoint import INDEX_NAME
from reap_driver.load.resident import load_model
from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.writer.apply import apply_plan, check_plan
from reap_kernels.errors import CheckpointError, PlanError, ReapError, UnsupportedModel, UsageError
from tests.driver import zoo
from tests.driver.writer import saved

Header = dict[str, Any]
EXPERTS = "model.layers.1.mlp.experts"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def full(tmp_path: Path) -> Path:
    saved.save("qwen3_moe", tmp_path / "full")
    return tmp_path / "full"


@pytest.fixture
def plan(full: Path) -> Plan:
    return saved.make_plan(full, meta_model(load_config(full)))


def assert_refused(
    full: Path, plan: Plan, error: type[ReapError], *parts: str, **options: Any
) -> None:
    """The run fails with this error, its one line names these parts, and no file changed
    anywhere.
    """
    out = options.pop("out", full.parent / "pruned")
    before, around = saved.snapshot(full), sorted(full.parent.iterdir())
    with pytest.raises(error) as caught:
        apply_plan(full, plan, out, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    assert saved.snapshot(full) == before
    assert sorted(full.parent.iterdir()) == around


# The source


def test_no_such_folder(full: Path, plan: Plan) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        apply_plan(full / "missing", plan, full.parent / "pruned")


def test_no_config(full: Path, plan: Plan) -> None:
    (full / "config.json").unlink()
    assert_refused(full, plan, CheckpointError, "config.json", "no such file")


def test_no_safetensors(full: Path, plan: Plan) -> None:
    (full / "model.safetensors").rename(full / "pytorch_model.bin")
    assert_refused(full, plan, CheckpointError, "model.safetensors", "convert the checkpoint")


def test_missing_shard(full: Path, plan: Plan) -> None:
    saved.shard(full, 3)
    (full / SHARD).unlink()
    assert_refused(full, plan, CheckpointError, SHARD, "missing", "download it again")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/x.safetensors", "C:x.safetensors", "a.bin", "", 7]
)
def test_index_leaving_the_folder(full: Path, plan: Plan, name: object) -> None:
    saved.shard(full, 3)
    index = json.loads((full / INDEX_NAME).read_text())
    key = next(iter(index["weight_map"]))
    index["weight_map"][key] = name
    (full / INDEX_NAME).write_text(json.dumps(index))
    assert_refused(full, plan, CheckpointError, INDEX_NAME, repr(key), repr(name), "inside")


def test_index_naming_a_tensor_its_shard_lacks(full: Path, plan: Plan) -> None:
    saved.shard(full, 3)
    index = json.loads((full / INDEX_NAME).read_text())
    index["weight_map"]["model.ghost.weight"] = SHARD
    (full / INDEX_NAME).write_text(json.dumps(index))
    assert_refused(full, plan, CheckpointError, SHARD, "'model.ghost.weight'", "lacks tensor")


def test_tensor_in_two_shards(full: Path, plan: Plan) -> None:
    saved.shard(full, 3)
    tensors = saved.read_all_of(full / SHARD)
    first = saved.read_all_of(full / SHARD.replace("00002", "00001", 1))
    key = next(iter(first))
    save_file({**tensors, key: first[key]}, full / SHARD)
    assert_refused(full, plan, CheckpointError, repr(key), "is also in")


def _truncate(data: bytes) -> bytes:
    return data[:-100]


def _short(data: bytes) -> bytes:
    return data[:5]


def _long_header(data: bytes) -> bytes:
    return struct.pack("<Q", len(data) * 2) + data[8:]


def _huge_header(data: bytes) -> bytes:
    return struct.pack("<Q", 1 << 60) + data[8:]


def _garbage_header(data: bytes) -> bytes:
    return data[:8] + b"?" * 40 + data[48:]


def _appended(data: bytes) -> bytes:
    return data + b"\0" * 16


def _edited(change: Callable[[Header], None]) -> Callable[[bytes], bytes]:
    """Change the header, keeping its length."""

    def edit(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header, separators=(",", ":")).encode()
        return data[:8] + text.ljust(length) + data[8 + length :]

    return edit


def _wrong_dtype(header: Header) -> None:
    header["lm_head.weight"]["dtype"] = "F8"


def _wrong_shape(header: Header) -> None:
    header["lm_head.weight"]["shape"] = [1, 2]


def _overlap(header: Header) -> None:
    header["lm_head.weight"]["data_offsets"][0] += 4
    header["lm_head.weight"]["data_offsets"][1] += 4


def _malformed(header: Header) -> None:
    del header["lm_head.weight"]["shape"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_not_waited_for(
    full: Path, plan: Plan, name: str, kind: str, tmp_path: Path
) -> None:
    (full / name).unlink()
    if kind == "pipe":
        os.mkfifo(full / name)
    else:
        (full / name).mkdir()
    assert_refused(full, plan, CheckpointError, str(full))


@pytest.mark.parametrize(
    "name", ["x" * 300 + ".safetensors", "x" * 5000 + ".safetensors", "a\0.safetensors", 3, None]
)
def test_shards_that_no_file_can_be(full: Path, plan: Plan, name: object) -> None:
    saved.shard(full, 3)
    index = json.loads((full / INDEX_NAME).read_text())
    key = next(iter(index["weight_map"]))
    index["weight_map"][key] = name
    (full / INDEX_NAME).write_text(json.dumps(index))
    assert_refused(full, plan, CheckpointError, INDEX_NAME)


@pytest.mark.parametrize("path", ["x" * 5000, "a" * 300, "loop", "nul\0"], ids=len)
def test_folders_that_cannot_be(
    plan: Plan, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="no such folder"):
        check_plan(path, plan, tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": "\\ud800"}', '{"a": 1, "a": 2}', "3", "\xff", "{", "1" * 5000]
)
def test_json_that_is_none_is_refused(full: Path, plan: Plan, name: str, text: str) -> None:
    saved.shard(full, 3)
    (full / name).write_bytes(text.encode("latin-1"))
    assert_refused(full, plan, CheckpointError, name)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (_truncate, "but the file has"),
        (_short, "has 5 bytes"),
        (_long_header, "announces a header of"),
        (_huge_header, "announces a header of 1152921504606846976 bytes"),
        (_garbage_header, "not JSON"),
        (_appended, "its tensors end at byte"),
        (_edited(_wrong_dtype), "dtype 'F8'"),
        (_edited(_wrong_shape), "'lm_head.weight'"),
        (_edited(_overlap), "expected"),
        (_edited(_malformed), "malformed entry"),
    ],
)
def test_damaged_file(full: Path, plan: Plan, damage: Callable[[bytes], bytes], part: str) -> None:
    path = full / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(full, plan, CheckpointError, "model.safetensors", part)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        (f"{EXPERTS}.3.up_proj.weight", (25, 32)),
        ("model.layers.1.mlp.gate.weight", (9, 32)),
        ("model.layers.1.mlp.gate.weight", (8, 33)),
        ("model.layers.0.self_attn.q_proj.weight", (31, 32)),
    ],
)
def test_shape_not_matching_config(
    full: Path, plan: Plan, key: str, shape: tuple[int, ...]
) -> None:
    saved.change_tensors(full, lambda t: {**t, key: torch.zeros(shape)})
    stem = "experts" if ".experts." in key else key
    assert_refused(full, plan, CheckpointError, "model.safetensors", stem, "config.json")


def test_missing_expert(full: Path, plan: Plan) -> None:
    saved.change_tensors(
        full, lambda t: {k: v for k, v in t.items() if "1.mlp.experts.7." not in k}
    )
    assert_refused(full, plan, CheckpointError, f"{EXPERTS}.7 is missing", "8 experts")


def test_more_experts_than_config_says(full: Path, plan: Plan) -> None:
    extra = f"{EXPERTS}.8.up_proj.weight"
    saved.change_tensors(full, lambda t: {**t, extra: torch.zeros(24, 32)})
    assert_refused(full, plan, CheckpointError, f"{EXPERTS}.8 is present", "8 experts")


def test_missing_router(full: Path, plan: Plan) -> None:
    saved.change_tensors(full, lambda t: {k: v for k, v in t.items() if "1.mlp.gate." not in k})
    assert_refused(full, plan, CheckpointError, "model.layers.1.mlp.gate.weight", "incomplete")


def test_table_naming_an_expert_that_does_not_exist(tmp_path: Path) -> None:
    model = saved.save("deepseek_v4", tmp_path / "full")
    plan = saved.make_plan(tmp_path / "full", model)
    saved.change_tensors(
        tmp_path / "full", lambda t: {k: v + 1 if "tid2eid" in k else v for k, v in t.items()}
    )
    assert_refused(tmp_path / "full", plan, CheckpointError, "tid2eid", "names expert 8", "[0, 8)")


def test_attention_experts_are_refused(tmp_path: Path) -> None:
    """JetMoE's attention has experts too, under the same count."""
    _, model = zoo.tiny("jetmoe")
    model.save_pretrained(tmp_path / "full")
    digest = config_digest(load_config(tmp_path / "full"))
    layers = {f"model.layers.{i}.mlp": LayerPlan.keeping(8, (0, 1, 2, 3)) for i in range(2)}
    plan = Plan({"id": "x", "config_digest": digest}, "reap", "uniform", 0.5, layers, "sha256:0")
    assert_refused(tmp_path / "full", plan, UnsupportedModel, "attention")


# The plan


def with_layer(plan: Plan, name: str, layer: LayerPlan) -> Plan:
    return replace(plan, layers={**plan.layers, name: layer})


def test_plan_of_another_model(full: Path, plan: Plan) -> None:
    other = replace(plan, model={"id": "acme/other", "config_digest": "sha256:beef"})
    assert_refused(full, other, PlanError, "acme/other", "sha256:beef", str(full))


def test_plan_without_a_layer(full: Path, plan: Plan) -> None:
    layers = {name: layer for name, layer in plan.layers.items() if name != EXPERTS}
    assert_refused(full, replace(plan, layers=layers), PlanError, EXPERTS, "does not name")


def test_plan_without_layers(full: Path, plan: Plan) -> None:
    assert_refused(full, replace(plan, layers={}), PlanError, "no layers")


def test_plan_with_a_layer_too_many(full: Path, plan: Plan) -> None:
    name = "model.layers.1.ffn.experts"
    extra = with_layer(plan, name, plan.layers[EXPERTS])
    assert_refused(full, extra, PlanError, name, "does not exist")


def test_plan_counting_other_experts(full: Path, plan: Plan) -> None:
    layers = dict.fromkeys(plan.layers, LayerPlan.keeping(16, (0, 1, 2, 3, 4)))
    assert_refused(
        full, replace(plan, layers=layers), PlanError, "16", "8", EXPERTS.replace("1", "0", 1)
    )


def test_plan_with_different_counts(full: Path, plan: Plan) -> None:
    uneven = with_layer(plan, EXPERTS, LayerPlan.keeping(8, (0, 1, 2, 3)))
    remedies = ("`non_uniform=True`", "`as_masks`", "`allocation='uniform'`")
    readers = ("from_pretrained, vLLM and SGLang", "one count for all layers", "load_pruned.py")
    assert_refused(full, uneven, PlanError, EXPERTS, "keeps 4", *readers, *remedies)


def test_plan_of_layers_of_two_sizes(full: Path, plan: Plan) -> None:
    """A second stack of experts: config.json says no number for each layer."""
    uneven = with_layer(plan, EXPERTS, LayerPlan.keeping(16, (0, 1, 2, 3, 4)))
    says = (EXPERTS, "counts 16 experts", "the model has 8")
    assert_refused(full, uneven, PlanError, *says, non_uniform=True)


def test_plan_with_different_counts_in_one_decoder_layer(tmp_path: Path) -> None:
    """ERNIE's text and vision experts: the code of their block has one count for both."""
    model = saved.save("ernie4_5_vl_moe", tmp_path / "full")
    good = saved.make_plan(tmp_path / "full", model)
    name = next(name for name in good.layers if "vision" in name)
    uneven = with_layer(good, name, LayerPlan.keeping(8, (0, 1, 2, 3)))
    says = (name, "keeps 4", "in one decoder layer")
    assert_refused(tmp_path / "full", uneven, PlanError, *says, non_uniform=True)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("all", "'experts_per_layer' is 'all'; expected an object"),
        ({"count_fields": ["num_local_experts"]}, "'experts_per_layer.counts' is missing"),
        ({"count_fields": ["num_local_experts"], "counts": {EXPERTS: 0}}, "restore"),
        ({"count_fields": ["a.b"], "counts": {EXPERTS: 8, "x.0.y": 7}}, "says that 'a.b' counts"),
        (
            {"count_fields": ["num_local_experts"], "counts": {"a.9.b": 1, EXPERTS: 8}},
            "names 'a.9', which this model does not have",
        ),
    ],
)
def test_damaged_settings(full: Path, settings: object, says: str) -> None:
    saved.change_config(full, experts_per_layer=settings)
    with pytest.raises(CheckpointError, match=says):
        meta_model(load_config(full))
    with pytest.raises(CheckpointError, match=says):
        load_model(full)


def test_plan_removing_nothing(full: Path, plan: Plan) -> None:
    layers = dict.fromkeys(plan.layers, LayerPlan.keeping(8, tuple(range(8))))
    assert_refused(full, replace(plan, layers=layers), PlanError, "removes none of 8")


def test_plan_keeping_fewer_than_top_k(full: Path, plan: Plan) -> None:
    layers = dict.fromkeys(plan.layers, LayerPlan.keeping(8, (0, 5)))
    assert_refused(full, replace(plan, layers=layers), PlanError, "keeps 2", "routed to 3", "0.625")


@pytest.mark.parametrize(
    ("kept", "part"), [((0, 1, 2, 3, 4, 5), "[4, 2]"), ((0, 4), "keeps 2"), ((1, 5), "keeps 2")]
)
def test_plan_breaking_routing_groups(tmp_path: Path, kept: tuple[int, ...], part: str) -> None:
    model = saved.save("deepseek_v3", tmp_path / "full")
    good = saved.make_plan(tmp_path / "full", model)
    layers = dict.fromkeys(good.layers, LayerPlan.keeping(8, kept))
    assert_refused(tmp_path / "full", replace(good, layers=layers), PlanError, part)


# The target


def test_target_exists(full: Path, plan: Plan) -> None:
    out = full.parent / "pruned"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert_refused(full, plan, CheckpointError, str(out), "exists", "`overwrite=True`")
    assert_refused(full, plan, CheckpointError, "not a checkpoint", overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"


def test_target_is_a_file_or_a_link(full: Path, plan: Plan) -> None:
    (full.parent / "file").write_text("mine")
    (full.parent / "link").symlink_to(full)
    for name, part in (("file", "not a folder"), ("link", "is the source")):
        out = full.parent / name
        assert_refused(full, plan, CheckpointError, part, out=out, overwrite=True)


def test_target_touching_the_source(full: Path, plan: Plan) -> None:
    for out in (full, full / "pruned", full / "a" / ".." / "pruned"):
        for overwrite in (False, True):
            assert_refused(full, plan, CheckpointError, "inside it", out=out, overwrite=overwrite)
    assert_refused(
        full, plan, CheckpointError, "contains the source", out=full.parent, overwrite=True
    )


def test_shard_size_that_is_no_size(full: Path, plan: Plan) -> None:
    assert_refused(full, plan, PlanError, "shard_size 0", shard_size=0)


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_that_are_no_number(full: Path, plan: Plan, threads: int) -> None:
    assert_refused(full, plan, PlanError, f"threads {threads!r}", "positive", threads=threads)
    with pytest.raises(PlanError, match="positive number of threads"):
        check_plan(full, plan, full.parent / "pruned", threads=threads)


@pytest.mark.parametrize("threads", [1.5, True, "4"])
def test_threads_of_another_type(full: Path, plan: Plan, threads: Any) -> None:
    said = f"threads is {threads!r}"
    assert_refused(full, plan, UsageError, said, "expected int", threads=threads)
    with pytest.raises(UsageError, match=said):
        check_plan(full, plan, full.parent / "pruned", threads=threads)
