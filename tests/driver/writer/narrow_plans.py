"""Plans that leave experts fewer neurons, and random matrices for them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.model.discover import find_moe_layers
from reap_driver.planning.plan import LayerPlan, Plan
from tests.driver.writer import saved

Width = Callable[[int], int]


def two_thirds(width: int) -> int:
    """More than half, so that one shared expert has no equal in narrower ones; a multiple of 8, as
    grouped products of transformers need it.
    """
    return max(8, 2 * width // 3 // 8 * 8)


def half(width: int) -> int:
    """Two narrow shared experts are as wide as one before."""
    return width // 2


def narrow_plan(
    folder: Path,
    model: PreTrainedModel,
    width: Width = two_thirds,
    choose: saved.Chooser = saved.scattered,
) -> Plan:
    """A plan for a saved model; each kept expert keeps other neurons."""
    return narrowed(saved.make_plan(folder, model, choose), model, width)


def narrowed(plan: Plan, model: PreTrainedModel, width: Width = two_thirds) -> Plan:
    """A plan whose kept experts keep random neurons."""
    generator = torch.Generator().manual_seed(3)
    layers = {}
    for layer in find_moe_layers(model):
        kept, inner = plan.layers[layer.name].kept, layer.intermediate_size
        orders = (torch.randperm(inner, generator=generator) for _ in kept)
        neurons = tuple(tuple(sorted(order[: width(inner)].tolist())) for order in orders)
        layers[layer.name] = LayerPlan.keeping(layer.num_experts, kept, inner, neurons)
    return replace(plan, layers=layers)


def random_matrices(model: PreTrainedModel, plan: Plan) -> dict[str, Tensor]:
    """New down projections of the experts that a plan keeps, in float32."""
    generator = torch.Generator().manual_seed(4)

    def new(name: str, hidden: int) -> Tensor:
        layer = plan.layers[name]
        width = layer.narrow_width or 0
        shape = len(layer.kept), hidden, width
        return torch.randn(shape, generator=generator) / width**0.5

    return {la.name: new(la.name, la.hidden_size) for la in find_moe_layers(model)}
