"""The truth test of plans that leave experts fewer neurons: the checkpoint, loaded by transformers,
computes what the original computes with its router masked and the new down projections put in."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import reap_driver as rd
from reap_driver.compat.text_model import text_model
from reap_driver.evaluation.compensation import compensated
from reap_driver.files.checkpoint import open_checkpoint
from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.writer.apply import apply_plan, check_plan, output_size
from reap_kernels.errors import PlanError, UnsupportedModel
from tests.driver import zoo
from tests.driver.writer import narrow_plans, saved, test_remote
from tests.driver.writer.test_truth import load

# One field sets the width of these experts and of tensors that keep theirs: dense layers, or a
# shared expert whose width no number of shared experts multiplies. In inkling every shared expert
# has a router weight of its own.
REFUSED = {
    "hunyuan_v1_moe": "shared_mlp.gate_proj",
    "jamba": "layers.0.feed_forward.gate_proj",
    "deepseek_v4": "shared_experts.gate_proj",
    "inkling": "shared_experts.gate_proj",
    "llama4": "shared_expert.gate_proj",
}


def planned(full: Path) -> tuple[PreTrainedModel, Plan, dict[str, Tensor]]:
    """The model of a checkpoint, a plan for it, and matrices."""
    model = load(full)
    plan = narrow_plans.narrow_plan(full, model)
    return model, plan, narrow_plans.random_matrices(model, plan)


@pytest.mark.parametrize("name", [name for name in zoo.names() if name not in REFUSED])
def test_narrow_checkpoint_equals_compensated_original(
    name: str, original: Callable[[str], Path], tmp_path: Path
) -> None:
    full = original(name)
    model, plan, matrices = planned(full)

    report = apply_plan(full, plan, tmp_path / "narrow", matrices=matrices)

    assert rd.check_permutation(full, tmp_path / "narrow", plan) == []
    narrow, inputs = load(tmp_path / "narrow"), zoo.tiny_inputs(name, model.config)
    with torch.no_grad():
        with rd.masked_experts(model, plan.kept):
            masked = text_model(model)(**inputs).logits
        with compensated(model, plan, matrices):
            expected = text_model(model)(**inputs).logits
        actual = text_model(narrow)(**inputs).logits
    assert not torch.allclose(masked, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(actual, expected, rtol=5e-5, atol=5e-5)
    for layer in rd.find_moe_layers(narrow):
        entry = plan.layers[layer.name]
        assert (layer.num_experts, layer.intermediate_size) == (len(entry.kept), entry.narrow_width)
        assert report.neurons_per_layer[layer.name] == (entry.width, entry.narrow_width)


@pytest.mark.parametrize("name", [name for name in zoo.names() if name in REFUSED])
def test_widths_that_would_change_other_tensors_are_refused(
    name: str, original: Callable[[str], Path], tmp_path: Path
) -> None:
    full = original(name)
    _, plan, matrices = planned(full)
    words = rf"intermediate_size` of config.json.*{REFUSED[name]}.*which keep 24 neurons"
    with pytest.raises(UnsupportedModel, match=words):
        apply_plan(full, plan, tmp_path / "narrow", matrices=matrices)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("width", "shared", "wide"),
    [(narrow_plans.half, 2, 24), (narrow_plans.two_thirds, 2, 32)],
    ids=["equal", "wider"],
)
def test_shared_experts_stay(
    width: narrow_plans.Width, shared: int, wide: int, tmp_path: Path
) -> None:
    """Their number makes up for the width; what does not divide is filled up with zeros."""
    full = tmp_path / "full"
    model = saved.save("deepseek_v3", full, dtype=torch.bfloat16)
    plan = narrow_plans.narrow_plan(full, model, width)
    matrices = narrow_plans.random_matrices(model, plan)

    report = apply_plan(full, plan, tmp_path / "narrow", matrices=matrices)

    edits = {name: new for name, (_, new) in report.edited_config.items()}
    assert edits["n_shared_experts"] == shared
    assert edits["moe_intermediate_size"] == plan.layers[next(iter(plan.layers))].narrow_width
    old, new = saved.read_all(full), saved.read_all(tmp_path / "narrow")
    keys = [key for key in old if "shared_experts" in key]
    assert len(keys) == 6
    for key in keys:
        where = tuple(map(slice, old[key].shape))
        assert saved.same_bytes(new[key][where].contiguous(), old[key])
        assert new[key].abs().sum(dtype=torch.float64) == old[key].abs().sum(dtype=torch.float64)
        assert wide in new[key].shape
    notes = [note for note in report.plan.notes if "shared experts are 32 neurons wide" in note]
    assert len(notes) == (wide > 24)
    numbers = sum(tensor.numel() for key, tensor in new.items() if "correction_bias" not in key)
    assert numbers == report.specification.parameters[1]


Made = tuple[Path, Plan, dict[str, Tensor]]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A checkpoint in bf16, a plan that leaves 5 of 8 experts 16 of 24 neurons, and matrices."""
    model = saved.save("qwen3_moe", tmp_path / "full", dtype=torch.bfloat16)
    plan = narrow_plans.narrow_plan(tmp_path / "full", model)
    return tmp_path / "full", plan, narrow_plans.random_matrices(model, plan)


def check_experts(
    old: dict[str, Tensor], new: dict[str, Tensor], plan: Plan, down: dict[str, Tensor]
) -> None:
    """Every tensor of every expert against the source's, one by one."""
    for name, layer in plan.layers.items():
        for number, (expert, neurons) in enumerate(zip(layer.kept, layer.neurons, strict=True)):
            for leaf in ("gate_proj", "up_proj"):
                before = old[f"{name}.{expert}.{leaf}.weight"]
                after = new.pop(f"{name}.{number}.{leaf}.weight")
                assert saved.same_bytes(after, before[list(neurons)])
            after = new.pop(f"{name}.{number}.down_proj.weight")
            assert saved.same_bytes(after, down[name][number].to(before.dtype))
    assert not [key for key in new if "experts" in key]


def test_bytes_of_a_divided_source(made: Made, tmp_path: Path) -> None:
    """Keys of every layer lie in all three files; values are rounded once, to bf16."""
    full, plan, down = made
    saved.shard(full, 3)
    shown: list[tuple[int, int]] = []
    size = output_size(
        open_checkpoint(full),
        plan,
        mtp="drop",
        shard_size=None,
        trust_remote_code=False,
        non_uniform=False,
        force_model=False,
    )
    report = apply_plan(
        full,
        plan,
        tmp_path / "narrow",
        matrices=down,
        progress=lambda done, total: shown.append((done, total)),
    )
    check_experts(saved.read_all(full), saved.read_all(tmp_path / "narrow"), plan, down)
    assert report.tensors_computed == 2 * 5 * 3
    files = list((tmp_path / "narrow").glob("*.safetensors"))
    assert len(files) == 3
    assert size.weights == sum(path.stat().st_size for path in files)
    assert shown == sorted(shown)
    assert shown[-1] == (size.total, size.total)
    assert rd.Plan.load(tmp_path / "narrow/reap/plan.json").layers == plan.layers


def test_all_experts_may_stay(made: Made, tmp_path: Path) -> None:
    full, _, _ = made
    model = load(full)
    plan = narrow_plans.narrow_plan(full, model)
    layers = {n: LayerPlan.keeping(8, tuple(range(8))) for n in plan.layers}
    plan = narrow_plans.narrowed(replace(plan, layers=layers), model)
    down = narrow_plans.random_matrices(model, plan)
    report = apply_plan(full, plan, tmp_path / "narrow", matrices=down)
    assert set(report.edited_config) == {"moe_intermediate_size"}
    assert (report.experts_before, report.experts_after, report.layers) == (8, 8, 2)
    check_experts(saved.read_all(full), saved.read_all(tmp_path / "narrow"), plan, down)


def test_all_neurons_may_stay(made: Made, tmp_path: Path) -> None:
    """Whole experts with new down projections."""
    full, plan, _ = made
    layers = {n: LayerPlan.keeping(8, layer.kept) for n, layer in plan.layers.items()}
    plan = replace(plan, layers=layers)
    name = next(iter(layers))
    down = {name: torch.randn(5, 32, 24)}
    apply_plan(full, plan, tmp_path / "new", matrices=down)
    old, new = saved.read_all(full), saved.read_all(tmp_path / "new")
    for number, expert in enumerate(layers[name].kept):
        written = new[f"{name}.{number}.down_proj.weight"]
        assert saved.same_bytes(written, down[name][number].bfloat16())
        kept = new[f"{name}.{number}.up_proj.weight"]
        assert saved.same_bytes(kept, old[f"{name}.{expert}.up_proj.weight"])


def test_another_part_of_the_model_may_stay_as_wide(
    original: Callable[[str], Path], tmp_path: Path
) -> None:
    """The thinker alone is cut: a field of its own sets its width."""
    full = original("qwen3_omni_moe_whole")
    _, plan, down = planned(full)
    talker = [name for name in plan.layers if name.startswith("talker.")]
    for name in talker:
        plan = replace(plan, layers={n: la for n, la in plan.layers.items() if n != name})
        del down[name]
    report = apply_plan(full, plan, tmp_path / "narrow", matrices=down)
    assert report.whole == talker
    assert list(report.neurons_per_layer) == list(plan.layers)
    widths = {la.name: la.intermediate_size for la in rd.find_moe_layers(load(tmp_path / "narrow"))}
    assert widths == dict.fromkeys(plan.layers, 16) | dict.fromkeys(talker, 24)
    assert rd.check_permutation(full, tmp_path / "narrow", plan) == []


def test_a_folder_of_matrices(made: Made, tmp_path: Path) -> None:
    full, plan, down = made
    folder = rd.Matrices.create(tmp_path / "down", model=plan.model)
    for name, values in down.items():
        folder.put(name, values.bfloat16())
    plan = replace(plan, matrices={"digest": folder.digest})
    apply_plan(full, plan, tmp_path / "narrow", matrices=tmp_path / "down")
    check_experts(saved.read_all(full), saved.read_all(tmp_path / "narrow"), plan, down)
    folder.put(name, torch.zeros_like(values))
    with pytest.raises(PlanError, match="has the digest"):
        apply_plan(full, plan, tmp_path / "other", matrices=tmp_path / "down")


def test_experts_in_modules_of_their_own(tmp_path: Path) -> None:
    full = tmp_path / "full"
    model = test_remote.save(full, method=True)
    plan = narrow_plans.narrowed(test_remote.plan_for(full), model)
    down = narrow_plans.random_matrices(model, plan)
    apply_plan(full, plan, tmp_path / "narrow", matrices=down, trust_remote_code=True)
    check_experts(saved.read_all(full), saved.read_all(tmp_path / "narrow"), plan, down)


def test_layers_may_keep_different_numbers_of_narrow_experts(made: Made, tmp_path: Path) -> None:
    """The loader beside the weights builds every layer with its own number."""
    full, _, _ = made
    model = load(full)
    plan = narrow_plans.narrow_plan(full, model, choose=saved.differing())
    down = narrow_plans.random_matrices(model, plan)
    apply_plan(full, plan, tmp_path / "narrow", matrices=down, non_uniform=True)
    narrow = rd.load_model(tmp_path / "narrow", dtype=torch.float32)
    inputs = zoo.tiny_inputs("qwen3_moe", model.config)
    rounded = {name: values.bfloat16().float() for name, values in down.items()}
    with torch.no_grad(), compensated(model, plan, rounded):
        expected = model(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(narrow(**inputs).logits, expected, rtol=5e-5, atol=5e-5)


def refused(
    made: Made, plan: Plan, matrices: dict[str, Tensor] | None, words: str, **options: Any
) -> None:
    """One error, and nothing is left behind."""
    full = made[0]
    with pytest.raises((PlanError, UnsupportedModel), match=words) as caught:
        apply_plan(full, plan, full.parent / "narrow", matrices=matrices, **options)
    assert "\n" not in str(caught.value)
    assert [path.name for path in full.parent.iterdir()] == ["full"]


def test_plans_and_matrices_that_do_not_fit(made: Made) -> None:
    full, plan, down = made
    first, second = plan.layers
    refused(made, plan, None, "used with its matrices")
    refused(made, plan, {first: down[first]}, f"have none of layer '{second}'")
    refused(made, plan, {**down, first: down[first][:4]}, r"\[4, 32, 16\]")
    refused(made, plan, {**down, first: down[first][:, :8]}, r"\[5, 8, 16\].*has \[5, 32, 16\]")
    refused(made, plan, {**down, second: down[second] / 0}, "not finite in torch.bfloat16")
    entry = plan.layers[first]
    other = LayerPlan.keeping(8, entry.kept, 23, tuple(tuple(range(16)) for _ in entry.kept))
    wrong = replace(plan, layers={**plan.layers, first: other})
    refused(made, wrong, down, "counts 23 neurons.*the model has 24")
    one = replace(plan, layers={first: entry})
    refused(made, one, down, "keeps 5 experts but")
    whole = LayerPlan.keeping(8, tuple(range(8)), 24, tuple(tuple(range(16)) for _ in range(8)))
    uneven, wide = replace(plan, layers={first: whole}), torch.ones(8, 32, 16)
    refused(made, uneven, {first: wide}, "leaves 16 neurons.*24 neurons in.*one field")
    check_plan(full, plan, full.parent / "narrow")  # before there are matrices


def test_quantized_sources_are_refused(made: Made) -> None:
    full, plan, down = made
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    saved.change_config(full, quantization_config=settings)
    refused(made, plan, down, "is quantized.*quantized from", force_model=True)


def test_multi_token_prediction_layers_are_dropped(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """They have the width of the other layers, and nothing was observed of their neurons."""
    full = checkpoint("glm-4.5-air")
    model = rd.load_model(full)
    plan = narrow_plans.narrow_plan(
        full, model, narrow_plans.half, lambda layer, _: list(range(layer.num_experts))
    )
    plan, down = replace(plan, ratio=0.5), narrow_plans.random_matrices(model, plan)
    for choice in ("keep", "prune"):
        with pytest.raises(PlanError, match=r"neurons of 'model\.layers\.3\..*`mtp='drop'`"):
            apply_plan(full, plan, tmp_path / "narrow", matrices=down, mtp=choice)
    report = apply_plan(full, plan, tmp_path / "narrow", matrices=down)
    assert report.mtp_dropped
    assert report.edited_config["num_nextn_predict_layers"] == (1, 0)


def test_stopping_leaves_nothing(made: Made) -> None:
    full, plan, down = made

    def stop(done: int, total: int) -> None:
        if done > 0.9 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_plan(full, plan, full.parent / "narrow", matrices=down, progress=stop)
    assert [path.name for path in full.parent.iterdir()] == ["full"]


def test_the_job_finds_matrices_beside_the_plan(made: Made, tmp_path: Path) -> None:
    full, plan, down = made
    folder = rd.Matrices.create(tmp_path / "plan.matrices", model=plan.model)
    for name, values in down.items():
        folder.put(name, values)
    settings = {"shape": "5x16", "width_multiple": 8, "ridge": 0.001}
    plan = replace(plan, matrices={"digest": folder.digest}, settings=settings)
    plan.save(tmp_path / "plan.json")

    applied = rd.apply(full, tmp_path / "plan.json", out=tmp_path / "narrow")

    assert "5 of 8 experts in each of 2 layers, 16 of 24 neurons in each expert" in str(
        applied.describe()
    )
    check_experts(saved.read_all(full), saved.read_all(tmp_path / "narrow"), plan, down)
    card = (tmp_path / "narrow/README.md").read_text()
    for words in (
        "with 5 of 8 routed experts in each of its 2 MoE layers, and 16 of 24 neurons in each",
        "solved again by linear least squares",
        "| neurons of a routed expert | 24 | 16 |",
        "| shape asked for (experts x neurons) | 5x16 |",
        "- New: the down projections of the experts in 2 MoE layers",
        "- Unchanged: every other tensor",
        "`moe_intermediate_size` `24` -> `16`",
        folder.digest,
    ):
        assert words in card
    (tmp_path / "plan.matrices").rename(tmp_path / "elsewhere")
    with pytest.raises(PlanError, match=r"plan\.matrices is no folder of them"):
        rd.apply(full, tmp_path / "plan.json", out=tmp_path / "other")
    rd.apply(full, tmp_path / "plan.json", out=tmp_path / "again", matrices=tmp_path / "elsewhere")
    with pytest.raises(rd.OptionError, match="masks cannot"):
        rd.apply(full, plan, as_masks=tmp_path / "masks", matrices=tmp_path / "elsewhere")
