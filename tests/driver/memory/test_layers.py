"""Decoder layers are found from the position of the experts."""

import pytest
from torch import nn

from reap_driver.compat.decoder_layers import decoder_layers
from reap_driver.compat.text_model import text_prefix
from reap_driver.model.discover import find_moe_layers
from reap_kernels.errors import UnsupportedModel
from tests.driver import zoo
from tests.driver.observation.test_architectures import NAMES


def tower(depth: int, experts_at: tuple[int, ...]) -> nn.Module:
    """Layers 0 to depth - 1, some of which hold a list of experts."""
    block = nn.Module()
    block.layers = nn.ModuleList(nn.Module() for _ in range(depth))
    for index in experts_at:
        block.layers[index].mlp = nn.Module()
        block.layers[index].mlp.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    return block


def test_the_outermost_list_counts_and_towers_without_experts_do_not() -> None:
    model = nn.Module()
    model.vision = tower(3, ())
    model.thinker = tower(12, (1, 11))
    model.talker = tower(2, (0,))
    names = [
        "talker.layers.0.mlp.experts",
        "thinker.layers.11.mlp.experts",
        "thinker.layers.1.mlp.experts",
    ]
    found = decoder_layers(model, names)
    assert [name for name, _ in found] == [
        *(f"thinker.layers.{i}" for i in range(12)),
        *(f"talker.layers.{i}" for i in range(2)),
    ]
    assert all(model.get_submodule(name) is module for name, module in found)


def test_experts_outside_any_list_are_refused() -> None:
    model = nn.Module()
    model.experts = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(UnsupportedModel, match=r"Module: experts is in no nn.ModuleList"):
        decoder_layers(model, ["experts"])


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name: str) -> None:
    """Each MoE layer is in exactly one decoder layer; their number is that of the config."""
    config, model = zoo.tiny(name)
    names = [layer.name for layer in find_moe_layers(model)]
    found = [layer for layer, _ in decoder_layers(model, names)]
    for inner in names:
        assert sum(inner.startswith(layer + ".") for layer in found) == 1
    text = config.get_text_config()
    # LongCat's layers have two attentions each, and its config counts those.
    count = text.num_layers if name == "longcat_flash" else text.num_hidden_layers
    read = [layer for layer in found if layer.startswith(text_prefix(model))]
    assert len(read) == count  # the layers of a talker have a config of their own
