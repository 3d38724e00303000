"""The width axis of plans: neurons that kept experts keep, their bitmaps in files, and errors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from reap_driver.planning.neurons import from_bitmap, to_bitmap
from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.writer.mask_file import save_masks
from reap_kernels.errors import PlanError

LAYERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
FIRST = f"layers.{LAYERS[0]}"


def narrow(*layers: LayerPlan) -> Plan:
    """A plan of these layers."""
    settings = {"shape": "2x3", "width_multiple": 1, "ridge": 1e-3}
    known = dict(zip(LAYERS, layers, strict=False))
    return Plan({"id": "m"}, "obs", "uniform", 0.7, known, "", settings=settings)


def layer(*neurons: tuple[int, ...], kept: tuple[int, ...] = (0, 2), width: int = 6) -> LayerPlan:
    return LayerPlan.keeping(4, kept, width, neurons)


def plan() -> Plan:
    return narrow(layer((0, 1, 5), (2, 3, 4)), layer((1, 2, 3), (0, 4, 5)))


def test_a_round_trip_keeps_every_neuron(tmp_path: Path) -> None:
    made = dataclasses.replace(plan(), matrices={"digest": "sha256:1"})
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["matrices"] == {"digest": "sha256:1"}
    assert content["layers"][LAYERS[0]] == {
        "num_experts": 4,
        "kept": [0, 2],
        "removed": [1, 3],
        "width": 6,
        "neurons": ["23", "1c"],
    }


def test_a_plan_without_width_has_no_field_of_it(tmp_path: Path) -> None:
    whole = Plan({"id": "m"}, "reap", "uniform", 0.5, {LAYERS[0]: LayerPlan.keeping(4, (0, 2))}, "")
    whole.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert "matrices" not in text
    assert json.loads(text)["layers"] == {
        LAYERS[0]: {"num_experts": 4, "kept": [0, 2], "removed": [1, 3]}
    }
    assert (whole.shape, whole.narrows, whole.compensates) == (None, False, False)
    assert dataclasses.replace(whole, matrices={"digest": "sha256:1"}).compensates


def test_what_a_plan_says_of_its_shape() -> None:
    made = plan()
    assert (made.shape, made.narrows, made.compensates, made.uniform) == ("2x3", True, True, True)
    assert made.layers[LAYERS[0]].narrow_width == 3
    assert made.describe() == (
        "plan by obs: keeps 2 of 4 experts in each of 2 layers, with 3 of 6 neurons of each"
    )
    whole = narrow(layer((0,), (1,), (2,), (3,), kept=(0, 1, 2, 3)))
    assert whole.layers[LAYERS[0]].removed == ()
    assert whole.shape == "4x1"
    uneven = narrow(layer((0, 1), (2, 3)), layer((0, 1), kept=(1,)))
    assert uneven.shape is None
    assert not uneven.uniform
    assert uneven.describe() == (
        "plan by obs, uniform: keeps 3 of 8 experts, from 1 to 2 in each of 2 layers, with 2 of 6 "
        "neurons of each"
    )


@pytest.mark.parametrize("width", [1, 4, 5, 48, 1408])
def test_bitmaps_are_what_the_page_says(width: int) -> None:
    """Bit n of the number stands for neuron n, in as many digits as the width takes."""
    ids = tuple(n for n in range(width) if n % 3 == 0)
    text = to_bitmap(ids, width)
    assert len(text) == -(-width // 4)
    assert [n for n in range(width) if int(text, 16) >> n & 1] == list(ids)
    assert from_bitmap(text, width) == ids


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"neurons": None}, "width is given without neurons"),
        ({"width": None}, "neurons is given without width"),
        ({"width": 0}, "width is 0; give a whole number"),
        ({"width": True}, "width is True"),
        ({"width": 5}, r"neurons\[0\] holds other things than ids in 0..4"),
        ({"neurons": ((0, 1),)}, "neurons has 1 entries for 2 kept experts"),
        ({"neurons": ((0, 1), ())}, r"neurons\[1\] is empty"),
        ({"neurons": ((0, 1), (1, 0))}, r"neurons\[1\] is not ascending"),
        ({"neurons": ((0, 1), (1, 1))}, r"neurons\[1\] is not ascending"),
        ({"neurons": ((0, 1), (1, 2, 3))}, r"neurons\[1\] has 3 neurons, neurons\[0\] has 2"),
        ({"neurons": ((0, 1), (1, "2"))}, r"neurons\[1\] holds other things"),
        ({"neurons": ((0, 1), (1, False))}, r"neurons\[1\] holds other things"),
        ({"neurons": [[0, 1], [1, 2]]}, "give a tuple of ids for each kept expert"),
        ({"neurons": 3}, "neurons is 3"),
    ],
)
def test_wrong_neurons_are_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        dataclasses.replace(layer((0, 5), (2, 3)), **fields)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("width", None, rf"field '{FIRST}.width' is None"),
        ("width", 10**9, rf"field '{FIRST}.width' is 1000000000"),
        ("width", 9, r"one of the bitmaps in neurons is '23'; a width of 9 takes 3 hexadecimal"),
        ("width", 5, r"bitmaps in neurons has bits beyond the width of 5: '23'"),
        ("neurons", 3, rf"field '{FIRST}.neurons' is 3; expected a list"),
        ("neurons", ["23"], "neurons has 1 entries for 2 kept experts"),
        ("neurons", ["23", 3], rf"field '{FIRST}.neurons\[1\]' is 3"),
        ("neurons", ["23", "1C"], "'1C'; a width of 6 takes 2 hexadecimal digits in lower case"),
        ("neurons", ["23", "-c"], "'-c'; a width"),
        ("neurons", ["23", "00"], r"neurons\[1\] is empty"),
        ("neurons", ["23", "0f"], r"neurons\[1\] has 4 neurons"),
        ("neurons", ["21", "0c"], f"'{LAYERS[1]}' keeps 3 of 6 neurons and layer '{LAYERS[0]}'"),
        ("neurons", "missing", "width is given without neurons"),
        ("width", "missing", "neurons is given without width"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, field: str, value: Any, says: str) -> None:
    path = tmp_path / "plan.json"
    plan().save(path)
    content = json.loads(path.read_text())
    if value == "missing":
        del content["layers"][LAYERS[0]][field]
    else:
        content["layers"][LAYERS[0]][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=says) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith("make it again with `reap-kernels plan`")


def test_layers_have_one_width(tmp_path: Path) -> None:
    other = narrow(layer((0, 1), (2, 3)), LayerPlan.keeping(4, (0, 1)))
    with pytest.raises(PlanError, match=f"layer '{LAYERS[1]}' has no `neurons`, other layers have"):
        other.save(tmp_path / "plan.json")
    wider = narrow(layer((0, 1), (2, 3)), layer((0, 1, 7), (5, 6, 7), width=8))
    assert len(wider.check()["layers"]) == 2  # stacks of another width may keep another number
    assert wider.widths == {LAYERS[0]: (6, 2), LAYERS[1]: (8, 3)}


def test_layers_that_are_added_share_the_width_or_are_refused() -> None:
    """Those whose experts are known to have another width are another part of the model."""
    names = [f"model.layers.{number}.mlp.experts" for number in range(6)]
    part = narrow(layer((0, 1), (2, 3)))
    whole = part.covering(dict.fromkeys(names, 4))
    assert whole.layers[names[5]] == LayerPlan.keeping(4, (0, 1, 2, 3))
    assert whole.widths == part.widths
    with pytest.raises(
        PlanError, match=r"layers '.*\.1\..*', '.*\.2\..*', '.*\.3\..*' and 2 more have"
    ):
        whole.check()
    for width, fits in ((6, False), (12, True)):
        facts = {name: {"intermediate_size": width} for name in names[1:]}
        known = dataclasses.replace(whole, model={**whole.model, "layers": facts})
        if fits:
            assert len(known.check()["layers"]) == 6
        else:
            with pytest.raises(PlanError, match="give every layer its neurons"):
                known.check()


@pytest.mark.parametrize(
    "change",
    [
        {"matrices": {"digest": 3}},
        {"matrices": {"folder": "x"}},
        {"settings": {"shape": 3}},
        {"settings": {"width_multiple": 0}},
        {"settings": {"ridge": -1.0}},
    ],
    ids=str,
)
def test_what_could_not_be_read_is_not_written(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=f"plan.*{next(iter(change))}"):
        dataclasses.replace(plan(), **change).save(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


def test_masks_cannot_say_it(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"changes the experts that it keeps \(2x3\), which masks"):
        save_masks("MODEL", plan(), tmp_path / "masks")
