"""Stacks of experts: which field counts which layers, and plans that cut one and leave others."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reap_driver as rd
from reap_driver.compat.model_config import config_digest, load_config
from reap_driver.compat.text_model import text_model
from reap_driver.model.stacks import Stack, find_stacks
from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.writer.mask_file import load_masks, save_masks
from reap_kernels.errors import PlanError
from tests.driver import zoo
from tests.driver.writer import saved
from tests.driver.writer.test_nonuniform import loader_of, logits
from tests.driver.writer.test_truth import load

OMNI, ERNIE = "qwen3_omni_moe_whole", "ernie4_5_vl_moe"
# Asked of the model: transformers 5.24 inserted `language_model` into the thinker's names.
LAYERS = [layer.name for layer in rd.find_moe_layers(zoo.tiny(OMNI)[1])]
THINKER, TALKER = (
    [name for name in LAYERS if name.startswith(part)] for part in ("thinker.", "talker.")
)
KEPT = dict.fromkeys(THINKER, (0, 2, 3, 6, 7))
ALL = tuple(range(8))


Shapes = Mapping[str, tuple[int, ...]]
A, B = "a.0.mlp.experts", "b.0.mlp.experts"


def shapes(config: Mapping[str, Any]) -> Shapes:
    """Of a model made of two parts; `b` counts 4 experts where nothing is said."""
    b = config.get("b", {})
    return {
        "a.0.mlp.experts.up": (config["a"]["num_experts"], 2),
        "b.0.mlp.experts.up": (b.get("n_experts", 4), 2),
        "b.0.mlp.gate": (3, b.get("n_experts", 4)),
    }


SITE_A, SITE_B, SITE_C = ("a", "num_experts"), ("b", "n_experts"), ("c", "num_experts")
BOTH = {"a": {"num_experts": 4}, "b": {"n_experts": 4}}


@pytest.mark.parametrize(
    ("config", "complete", "expected"),
    [
        (BOTH, BOTH, [((A,), (SITE_A,)), ((B,), (SITE_B,))]),
        # What the file does not say, the class does.
        ({"a": {"num_experts": 4}}, BOTH, [((A,), (SITE_A,)), ((B,), (SITE_B,))]),
        # A field that counts no layer belongs to none.
        (
            {**BOTH, "c": {"num_experts": 4}},
            BOTH,
            [((A,), (SITE_A,)), ((B,), (SITE_B,))],
        ),
        # Fields of one part that say the same are one field.
        (
            {**BOTH, "a": {"num_experts": 4, "num_local_experts": 4}},
            BOTH,
            [((A,), (SITE_A, ("a", "num_local_experts"))), ((B,), (SITE_B,))],
        ),
        # No field counts the layers of `b`.
        ({"a": {"num_experts": 4}, "c": {"num_experts": 4}}, {}, [((A,), (SITE_A,)), ((B,), ())]),
    ],
)
def test_stacks_are_what_follows_a_field(
    config: dict[str, Any], complete: dict[str, Any], expected: list[Any]
) -> None:
    found = find_stacks(config, complete, {A: 4, B: 4}, shapes(BOTH), shapes)
    assert found == [Stack(*pair) for pair in expected]


def test_one_field_asks_for_no_model() -> None:
    def build(_: Mapping[str, Any]) -> Shapes:
        raise AssertionError("no model is needed to know that one field counts all")

    config = {"num_experts": 4, "n_routed_experts": 4}
    found = find_stacks(config, {}, {A: 4, B: 4}, {}, build)
    assert found == [Stack((A, B), (("num_experts",), ("n_routed_experts",)))]


def test_layers_in_common_join_fields() -> None:
    """A field that counts layers of two others makes one stack of them."""

    def build(config: Mapping[str, Any]) -> Shapes:
        found = dict(shapes(config))
        found["a.0.mlp.shared"] = (config["b"]["n_experts"], 1)
        return found

    [stack] = find_stacks(BOTH, BOTH, {A: 4, B: 4}, build(BOTH), build)
    assert stack == Stack((A, B), (SITE_A, SITE_B))


@dataclass(frozen=True)
class Omni:
    """A whole Qwen3-Omni in memory and saved, and a plan that names its thinker alone."""

    model: Any
    folder: Path
    plan: Plan

    def planned(self, kept: Mapping[str, tuple[int, ...]]) -> Plan:
        """A plan of other layers."""
        layers = {name: LayerPlan.keeping(8, ids) for name, ids in kept.items()}
        return replace(self.plan, layers=layers)


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Omni:
    folder = tmp_path_factory.mktemp("omni")
    model = saved.save(OMNI, folder)
    made = Omni(model, folder, saved.make_plan(folder, model))
    return replace(made, plan=made.planned(KEPT))


def inputs_of(model: Any) -> dict[str, Tensor]:
    return zoo.tiny_inputs(OMNI, model.config)


def talk(model: Any, states: Tensor) -> Tensor:
    """What the talker makes of given states."""
    with torch.no_grad():
        found: Tensor = model.talker.model(inputs_embeds=states).last_hidden_state
    return found


@pytest.mark.parametrize("named", [False, True], ids=["left out", "named whole"])
def test_the_thinker_is_cut_and_the_talker_left_whole(
    named: bool, omni: Omni, tmp_path: Path
) -> None:
    """transformers loads it; it thinks as the masked original does, and talks as the original."""
    plan = omni.planned({**KEPT, **dict.fromkeys(TALKER, ALL)}) if named else omni.plan
    original = omni.model
    report = rd.apply_plan(omni.folder, plan, tmp_path / "out")
    pruned = load(tmp_path / "out")

    with rd.masked_experts(original, plan.kept) as mask:
        expected = logits(original, inputs_of(original))
    assert sorted(mask.removed) == [n.replace("experts", "gate.weight") for n in THINKER]
    actual = logits(pruned, inputs_of(original))
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    assert not torch.allclose(actual, logits(original, inputs_of(original)), atol=1e-2)
    states = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(talk(pruned, states), talk(original, states), rtol=1e-6, atol=1e-6)

    assert (report.layers, report.experts_after, report.whole) == (2, 5, TALKER)
    assert dict(report.experts_per_layer) == {
        **dict.fromkeys(THINKER, (8, 5)),
        **dict.fromkeys(TALKER, (8, 8)),
    }
    edited = {"thinker_config.text_config.num_experts": (8, 5)}
    assert report.edited_config == edited
    assert not (tmp_path / "out" / "load_pruned.py").exists()
    before, after = map(saved.read_all, (omni.folder, tmp_path / "out"))
    for key, tensor in before.items():
        if not key.startswith("thinker."):
            assert saved.same_bytes(tensor, after[key]), key
    assert rd.check_permutation(omni.folder, tmp_path / "out", plan) == []
    card = (tmp_path / "out" / "README.md").read_text()
    assert "5 of 8 routed experts in each of its 2 MoE layers" in card
    assert "Left whole: 2 MoE layers (`talker.model.layers.0.mlp.experts`" in card


@pytest.mark.parametrize(
    ("kept", "uniform"),
    [
        ({**dict.fromkeys(THINKER, 5), **dict.fromkeys(TALKER, 3)}, True),
        (dict.fromkeys(TALKER, 4), True),
        ({THINKER[0]: 5, THINKER[1]: 8}, False),
        ({THINKER[0]: 5, THINKER[1]: 4, TALKER[0]: 3}, False),
    ],
    ids=["both, other numbers", "talker alone", "thinker unevenly", "both unevenly"],
)
def test_each_stack_has_its_numbers(
    kept: dict[str, int], uniform: bool, omni: Omni, tmp_path: Path
) -> None:
    original, plan = (
        omni.model,
        omni.planned(
            {
                name: tuple(sorted((expert + place) % 8 for expert in range(number)))
                for place, (name, number) in enumerate(kept.items())
            }
        ),
    )
    if not uniform:
        with pytest.raises(PlanError, match=r"thinker_config.text_config.num_exp.* counts both"):
            rd.apply_plan(omni.folder, plan, tmp_path / "out")
    rd.apply_plan(omni.folder, plan, tmp_path / "out", non_uniform=not uniform)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("experts_per_layer" in config) != uniform
    pruned = (
        load(tmp_path / "out")
        if uniform
        else loader_of(tmp_path / "out")
        .from_pretrained(tmp_path / "out", dtype=torch.float32)
        .eval()
    )
    found = {la.name: la.num_experts for la in rd.find_moe_layers(pruned)}
    assert found == {**dict.fromkeys([*THINKER, *TALKER], 8), **kept}
    states = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    with rd.masked_experts(original, plan.kept):
        expected, said = logits(original, inputs_of(original)), talk(original, states)
    torch.testing.assert_close(logits(pruned, inputs_of(original)), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(talk(pruned, states), said, rtol=2e-5, atol=2e-5)
    # And once more from there: what was cut unevenly stays as it is where it is left whole.
    if not uniform and TALKER[0] not in kept:
        digest = config_digest(load_config(tmp_path / "out"))
        again = omni.planned(dict.fromkeys(TALKER, ALL[:4]))
        again = replace(again, model={**again.model, "config_digest": digest})
        rd.apply_plan(tmp_path / "out", again, tmp_path / "again")
        last = rd.load_model(tmp_path / "again")
        counts = {la.name: la.num_experts for la in rd.find_moe_layers(last)}
        assert counts == {**kept, **dict.fromkeys(TALKER, 4)}


def test_a_layer_left_out_of_its_own_stack(omni: Omni, tmp_path: Path) -> None:
    """It keeps all its experts, which the field it shares cannot say."""
    plan = omni.planned({THINKER[0]: KEPT[THINKER[0]]})
    with pytest.raises(PlanError, match=rf"does not name '{THINKER[1]}', so it keeps all"):
        rd.apply_plan(omni.folder, plan, tmp_path / "out")


def test_text_experts_alone_are_masked_not_written(tmp_path: Path) -> None:
    """ERNIE-VL counts text and vision experts in one field, and its code too."""
    original = saved.save(ERNIE, tmp_path / "full")
    plan = saved.make_plan(tmp_path / "full", original)
    for name in [name for name in plan.layers if "vision" in name]:
        del plan.layers[name]
    for uneven in (False, True):
        with pytest.raises(PlanError, match=r"so it keeps all\); .*`as_masks`"):
            rd.apply_plan(tmp_path / "full", plan, tmp_path / "out", non_uniform=uneven)
    save_masks(tmp_path / "full", plan, tmp_path / "masks.safetensors")
    masks = load_masks(tmp_path / "masks.safetensors")
    assert masks == plan.kept
    inputs = zoo.tiny_inputs(ERNIE, original.config)
    with rd.masked_experts(original, masks) as mask:
        masked = logits(original, inputs)
    assert len(mask.removed) == 2
    assert not torch.allclose(masked, logits(original, inputs), atol=1e-2)


def test_the_part_that_reads_text(omni: Omni) -> None:
    assert text_model(omni.model) is omni.model.thinker
    for name in ("qwen3_moe", "qwen3_omni_moe", ERNIE):
        _, model = zoo.tiny(name)
        assert text_model(model) is model
