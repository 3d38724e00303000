"""A plan as a file of masks: what it holds, that the model follows it, what is refused."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import reap_driver as rd
from reap_driver.planning.plan import LayerPlan
from reap_driver.writer.mask_file import FORMAT, expert_masks, load_masks, save_masks
from reap_kernels.errors import PlanError
from reap_kernels.tensor_files import write_tensors
from tests.driver import zoo
from tests.driver.writer import saved

KEPT = ((0, 2, 3, 5, 7), (1, 4, 6))


def test_masks_are_the_plan(tmp_path: Path) -> None:
    """Different numbers in different layers; and the router follows the file."""
    model = saved.save("qwen3_moe", tmp_path / "full")
    plan = saved.make_plan(tmp_path / "full", model)
    layers = {n: LayerPlan.keeping(8, ids) for n, ids in zip(plan.layers, KEPT, strict=True)}
    plan = replace(plan, layers=layers)
    save_masks(tmp_path / "full", plan, tmp_path / "masks.safetensors")
    stored = load_file(tmp_path / "masks.safetensors")
    assert {name: mask.dtype for name, mask in stored.items()} == dict.fromkeys(layers, torch.bool)
    for name, mask in expert_masks(plan).items():
        assert torch.equal(stored[name], mask)
        assert mask.nonzero().flatten().tolist() == list(layers[name].kept)
    masks = load_masks(tmp_path / "masks.safetensors")
    assert masks == plan.kept
    with rd.masked_experts(model, masks), rd.observe(model) as obs:
        obs(**zoo.tiny_inputs("qwen3_moe", model.config))
    for name, seen in obs.stats.layers.items():
        reached = set(seen.count.sum(0).nonzero().flatten().tolist())
        assert reached <= set(layers[name].kept)


def test_plans_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    model = saved.save("qwen3_moe", tmp_path / "full")
    plan = saved.make_plan(tmp_path / "full", model)
    few = {name: LayerPlan.keeping(8, (0, 1)) for name in plan.layers}
    with pytest.raises(PlanError, match=r"keeps 2 experts in .* routed to 3"):
        save_masks(tmp_path / "full", replace(plan, layers=few), tmp_path / "masks")
    other = replace(plan, model={"id": "x", "config_digest": "sha256:1"})
    with pytest.raises(PlanError, match="config digest is sha256:1 there"):
        save_masks(tmp_path / "full", other, tmp_path / "masks")
    assert not (tmp_path / "masks").exists()


def test_other_files_are_no_masks(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"masks .*absent cannot be read"):
        load_masks(tmp_path / "absent")
    save_file({"a": torch.ones(2, dtype=torch.bool)}, tmp_path / "other")
    with pytest.raises(PlanError, match=r"other is not a masks file: .*apply --as-masks"):
        load_masks(tmp_path / "other")


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.ones(4, dtype=torch.int8), r"layer 'a': its mask is torch.int8 \[4\]; expected"),
        (torch.ones(4, dtype=torch.uint8), "torch.uint8"),
        (torch.tensor([0.0, math.nan]), "torch.float32"),
        (torch.ones(2, 2, dtype=torch.bool), r"torch.bool \[2, 2\]"),
        (torch.tensor(True), r"torch.bool \[\]"),
        (torch.zeros(4, dtype=torch.bool), "true for one expert at least"),
        (torch.ones(0, dtype=torch.bool), "true for one expert at least"),
    ],
)
def test_masks_that_are_none_are_refused(tmp_path: Path, mask: torch.Tensor, says: str) -> None:
    path = tmp_path / "masks"
    write_tensors({"a": mask}, path, FORMAT, {"model": {}})
    with pytest.raises(PlanError, match=rf"masks file {path}: .*{says}"):
        load_masks(path)


def test_a_mask_that_changed_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "masks"
    write_tensors({"a": torch.ones(8, dtype=torch.bool)}, path, FORMAT, {"model": {}})
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(PlanError, match=f"masks file {path} is damaged"):
        load_masks(path)
    write_tensors({}, path, FORMAT, {"model": {}})
    with pytest.raises(PlanError, match="has no masks"):
        load_masks(path)
