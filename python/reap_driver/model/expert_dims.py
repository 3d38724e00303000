"""Finds which tensors of a model in memory hold experts, and in which dimension.

The model is compared with one on the meta device that has twice as many experts: routing groups
that divide the number of experts divide twice that number too.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.compat.config_texts import without_texts
from reap_driver.compat.mtp_layer import mtp_layers
from reap_driver.compat.pretrained import meta_model
from reap_driver.model.expert_layout import ExpertDim, Shape, derive_layout
from reap_driver.model.stacks import Stack, find_stacks, with_counts
from reap_kernels.errors import UnsupportedModel


@without_texts()
def expert_dims(model: PreTrainedModel, layers: Mapping[str, int]) -> dict[str, ExpertDim]:
    """Where the tensors of a model hold experts, by name in its state dict. Tensors of single
    experts (in an `nn.ModuleList`) are not included.

    Args:
        model: the model; only its shapes are read.
        layers: name of every MoE layer -> its number of experts.

    Raises:
        UnsupportedModel: the configuration has no field with the number of experts of a layer, or a
            shape depends on it in another way than a number of rows per expert; or the model was
            loaded with its multi-token-prediction layer.
    """
    further = mtp_layers(model)
    if further:
        raise UnsupportedModel(
            f"{type(model).__name__}: {further[0]} is for multi-token prediction and can only be "
            "observed; load the model without it (leave out `with_mtp=True`)"
        )
    config, own = model.config, _shapes(model)
    stacks = stacks_of(model, layers)
    uncounted = next((stack.layers[0] for stack in stacks if not stack.sites), None)
    if uncounted is not None:
        raise UnsupportedModel(
            f"{type(model).__name__}: no field of its configuration is {layers[uncounted]}, the "
            f"number of experts of {uncounted}; load the model with its own config.json"
        )
    twice = {name: 2 * count for name, count in layers.items()}
    raw = with_counts(config.to_diff_dict(), config.to_dict(), stacks, layers, twice)
    # Tensors that only the loaded model has, such as scales of dequantized weights, are skipped.
    double = {name: shape for name, shape in _built(model, raw).items() if name in own}
    old = {name: own[name] for name in double}
    counts = {name: (layers[name], twice[name]) for name in layers}
    return dict(derive_layout(old, double, counts).tensors)


def router_weights(
    layer: str, dims: Mapping[str, ExpertDim], state: Mapping[str, Tensor]
) -> Iterator[str]:
    """Names of the weights of a layer's routers: the matrices outside its experts that have one row
    per expert.

    Args:
        layer: name of the layer.
        dims: from `expert_dims`.
        state: the model's state dict; only shapes are read.
    """
    for name, dim in dims.items():
        inside = name.startswith(layer + ".")
        if (
            dim.layer == layer
            and not inside
            and dim.block == 1
            and state[name].squeeze().dim() == 2
        ):
            yield name


@without_texts()
def stacks_of(model: PreTrainedModel, layers: Mapping[str, int]) -> list[Stack]:
    """The stacks (see `model.stacks`) of a model in memory or on the meta device, in terms of the
    fields of its configuration's class.

    Args:
        model: the model; only its class and configuration are read.
        layers: name of every MoE layer -> its number of experts.
    """
    config = model.config
    built = functools.partial(_built, model)
    return find_stacks(config.to_diff_dict(), config.to_dict(), layers, _shapes(model), built)


def _built(model: PreTrainedModel, raw: Mapping[str, Any]) -> dict[str, Shape]:
    """Shapes of a model of the same class, built from another configuration."""
    return _shapes(meta_model(type(model.config).from_dict(dict(raw)), type(model)))


def _shapes(model: PreTrainedModel) -> dict[str, Shape]:
    """Name -> shape of every tensor of the state dict."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
