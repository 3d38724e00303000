"""Layers by name, number and pattern; experts by id and by their activations."""

import pytest
import torch

from reap_driver.planning.selection import protected_experts, select_layers, super_experts
from reap_kernels.errors import PlanError

LAYERS = [
    *(f"model.layers.{n}.mlp.experts" for n in (1, 2, 3, 12)),
    "model.vision.layers.3.mlp.experts",
]
SIZES = dict.fromkeys(LAYERS, 4)


@pytest.mark.parametrize(
    ("selector", "places"),
    [
        ("model.layers.2.mlp.experts", [1]),
        ("2", [1]),
        ("3", [2, 4]),
        ("12", [3]),
        ("*", [0, 1, 2, 3, 4]),
        ("model.layers.1*", [0, 3]),
        ("*.[12].*", [0, 1]),
        ("model.vision.*", [4]),
    ],
)
def test_what_a_selector_means(selector: str, places: list[int]) -> None:
    assert select_layers(selector, LAYERS) == [LAYERS[place] for place in places]


@pytest.mark.parametrize("selector", ["0", "layers", "model.layers.9.*", "", "-1"])
def test_selectors_that_mean_nothing(selector: str) -> None:
    says = rf"layer '{selector}' is none of the 5 MoE layers, from model.layers.1.* to model.vis"
    with pytest.raises(PlanError, match=says.replace("*", r"\*", 1) if "*" in selector else says):
        select_layers(selector, LAYERS)


def test_protected_experts_add_up() -> None:
    found = protected_experts([("2", [0, 3]), ("*.2.*", [1]), ("12", [])], SIZES)
    assert found == {LAYERS[1]: {0, 1, 3}, LAYERS[3]: frozenset()}
    with pytest.raises(PlanError, match=r"layer model.layers.1.*: expert 4 cannot .* ids 0..3"):
        protected_experts([("1", [1, 4])], SIZES)
    with pytest.raises(PlanError, match="layer '7' is none"):
        protected_experts([("7", [1])], SIZES)


def test_super_experts_are_above_both_thresholds() -> None:
    """1000 experts: the 99.5th percentile lets at most five through, a tenth of the peak fewer."""
    draw = torch.Generator().manual_seed(0)
    peaks = {f"l{n}": 1 + torch.rand(100, generator=draw).double() for n in range(10)}
    peaks["l1"][68], peaks["l2"][92], peaks["l3"][82] = 5000.0, 900.0, 480.0
    assert super_experts(peaks) == {"l1": {68}, "l2": {92}}  # 480 is less than 5000 / 10
    peaks["l1"][68] = 100.0
    assert super_experts(peaks) == {"l1": {68}, "l2": {92}, "l3": {82}}
    peaks["l9"][[1, 3, 5, 7]] = 890.0
    found = super_experts(peaks)  # seven are above a tenth, five above the percentile
    assert sum(map(len, found.values())) <= 5


def test_experts_alike_are_not_super() -> None:
    assert super_experts({"a": torch.ones(64).double()}) == {}
