"""How the output is divided into files: as the source is, or by `shard_size` whatever the source's
division. The files differ, what is loaded from them does not."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import model_class
from reap_driver.files.checkpoint import INDEX_NAME, SINGLE_NAME
from reap_driver.planning.plan import Plan
from reap_driver.writer.apply import apply_plan
from tests.driver.writer import saved

SIZE = 20_000


@pytest.fixture
def full(tmp_path: Path) -> Path:
    saved.save("qwen3_moe", tmp_path / "full")
    return tmp_path / "full"


@pytest.fixture
def plan(full: Path) -> Plan:
    config = load_config(full)
    return saved.make_plan(full, model_class(config)(config))


def weight_map(folder: Path) -> dict[str, str]:
    """The index, after comparing it with the files."""
    index = json.loads((folder / INDEX_NAME).read_text())
    held = {
        key: path.name for path in folder.glob("*.safetensors") for key in saved.read_all_of(path)
    }
    assert index["weight_map"] == held
    total = sum(tensor.nbytes for tensor in saved.read_all(folder).values())
    assert index["metadata"]["total_size"] == total
    return held


def load(folder: Path) -> PreTrainedModel:
    model, info = model_class(load_config(folder)).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert isinstance(model, PreTrainedModel)
    return model


def assert_loads_alike(left: Path, right: Path) -> None:
    """Same tensors byte for byte, same model for transformers."""
    before, after = saved.read_all(left), saved.read_all(right)
    assert before.keys() == after.keys()
    assert all(saved.same_bytes(before[key], after[key]) for key in before)
    one, other = load(left).state_dict(), load(right).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_division_of_the_source_is_kept(full: Path, plan: Plan, tmp_path: Path) -> None:
    apply_plan(full, plan, tmp_path / "single")
    saved.shard(full, 3)
    apply_plan(full, plan, tmp_path / "pruned")
    assert set(weight_map(tmp_path / "pruned").values()) == set(weight_map(full).values())
    assert_loads_alike(tmp_path / "single", tmp_path / "pruned")


@pytest.mark.parametrize("parts", [1, 3])
def test_shard_size_makes_more_files(full: Path, plan: Plan, tmp_path: Path, parts: int) -> None:
    apply_plan(full, plan, tmp_path / "single")
    if parts > 1:
        saved.shard(full, parts)
    report = apply_plan(full, plan, tmp_path / "many", shard_size=SIZE)
    names = sorted({*weight_map(tmp_path / "many").values()})
    count = report.shards
    assert count > 4
    assert names == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    sizes = [
        [tensor.nbytes for tensor in saved.read_all_of(tmp_path / "many" / name).values()]
        for name in names
    ]
    assert all(sum(held) <= SIZE for held in sizes)
    # Filled in order: no file's first tensor had room in the file before.
    assert all(sum(held) + max(after) > SIZE for held, after in itertools.pairwise(sizes))
    assert_loads_alike(tmp_path / "single", tmp_path / "many")


def test_shard_size_makes_one_file_of_several(full: Path, plan: Plan, tmp_path: Path) -> None:
    apply_plan(full, plan, tmp_path / "single")
    saved.shard(full, 3)
    assert apply_plan(full, plan, tmp_path / "one", shard_size=1 << 40).shards == 1
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors")] == [SINGLE_NAME]
    assert not (tmp_path / "one" / INDEX_NAME).exists()
    assert_loads_alike(tmp_path / "single", tmp_path / "one")


def test_a_tensor_above_the_size_gets_a_file(full: Path, plan: Plan, tmp_path: Path) -> None:
    apply_plan(full, plan, tmp_path / "single")
    report = apply_plan(full, plan, tmp_path / "many", shard_size=1)
    assert report.shards == report.tensors == len(set(weight_map(tmp_path / "many").values()))
    assert_loads_alike(tmp_path / "single", tmp_path / "many")
