"""Which tensors of a model in memory hold experts: it and its double, built on meta, compared.

The double has twice the experts: whatever divides their number (routing groups) divides that too,
and no plan is needed to know where experts are.
"""

import functools
from collections.abc import Mapping

from transformers import PreTrainedModel

from reap_driver.checkpoint.config_edit import Site, count_sites, with_count, with_counts
from reap_driver.checkpoint.derive import ExpertDim, Shape, derive_layout
from reap_driver.checkpoint.models import own_sites
from reap_driver.compat.load_pruned import SETTINGS
from reap_driver.compat.models import meta_model
from reap_kernels.errors import UnsupportedModel


def expert_dims(model: PreTrainedModel, layers: Mapping[str, int]) -> dict[str, ExpertDim]:
    """Where the tensors of a loaded model hold experts, by their names in its state dict; tensors
    of single experts (in an `nn.ModuleList`) are not among them.

    Args:
        model: only shapes are read.
        layers: name of every MoE layer -> its number of experts.

    Raises:
        UnsupportedModel: the configuration does not say how many experts a layer has, or a shape
            depends on that in a way that is not rows per expert.
    """
    dims: dict[str, ExpertDim] = {}
    for stack in _stacks(model, layers):
        dims |= _dims_of_stack(model, stack)
    return dims


def _stacks(model: PreTrainedModel, layers: Mapping[str, int]) -> list[dict[str, int]]:
    """The layers by the fields of the configuration that count their experts: those it gives
    numbers of their own, and the others by the number they share.
    """
    own = _own_counts(model)
    stacks: dict[int, dict[str, int]] = {}
    for name, count in sorted(layers.items(), key=lambda layer: layer[1]):
        stacks.setdefault(0 if name in own else count, {})[name] = count
    return list(stacks.values())


def _own_counts(model: PreTrainedModel) -> Mapping[str, int]:
    """Layers to which the configuration gives numbers of their own, with these."""
    settings = getattr(model.config, SETTINGS, None) or {}
    found: Mapping[str, int] = settings.get("counts", {})
    return found


def _dims_of_stack(model: PreTrainedModel, layers: Mapping[str, int]) -> dict[str, ExpertDim]:
    """The same for layers whose experts the same fields count."""
    config, largest = model.config, max(layers.values())
    sites = count_sites(config.to_dict(), largest)
    if not sites:
        raise UnsupportedModel(
            f"{type(model).__name__}: no field of its configuration says {largest}, the number of "
            f"experts of {next(iter(layers))}; load the model with its own config.json"
        )
    twice = {name: 2 * count for name, count in layers.items()}
    own, apart = _shapes(model), bool(layers.keys() & _own_counts(model).keys())

    @functools.cache
    def double(chosen: tuple[Site, ...]) -> dict[str, Shape]:
        raw, fields = config.to_diff_dict(), list(chosen)
        if apart:
            raw = with_counts(raw, fields, twice, fields)
        else:
            raw = with_count(raw, fields, 2 * largest)
        shapes = _shapes(meta_model(type(config).from_dict(raw), type(model)))
        return {name: shape for name, shape in shapes.items() if name in own}

    # What only the loaded model has (scales of dequantised weights, say) is no part of the class.
    old = {name: own[name] for name in double(tuple(sites))}
    chosen = own_sites(sites, old, layers, lambda part: double(tuple(part)))
    counts = {name: (layers[name], twice[name]) for name in layers}
    return dict(derive_layout(old, double(tuple(chosen)), counts).tensors)


def _shapes(model: PreTrainedModel) -> dict[str, Shape]:
    """Every tensor of the state dict with its shape."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
