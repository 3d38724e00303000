"""Which tensors of a model in memory hold experts: it and its double, built on meta, compared.

The double has twice the experts: whatever divides their number (routing groups) divides that too,
and no plan is needed to know where experts are.
"""

import functools
from collections.abc import Mapping

from transformers import PreTrainedModel

from reap_driver.checkpoint.config_edit import Site, count_sites, with_count
from reap_driver.checkpoint.derive import ExpertDim, Shape, derive_layout
from reap_driver.checkpoint.models import own_sites
from reap_driver.compat.models import meta_model
from reap_kernels.errors import UnsupportedModel


def expert_dims(model: PreTrainedModel, layers: Mapping[str, int]) -> dict[str, ExpertDim]:
    """Where the tensors of a loaded model hold experts, by their names in its state dict.

    Args:
        model: only shapes are read.
        layers: name of every MoE layer -> its number of experts.

    Raises:
        UnsupportedModel: the configuration does not say how many experts a layer has, or a shape
            depends on that in a way that is not rows per expert.
    """
    dims: dict[str, ExpertDim] = {}
    for count in sorted(set(layers.values())):
        dims |= _dims_of_count(model, [name for name in layers if layers[name] == count], count)
    return dims


def _dims_of_count(model: PreTrainedModel, layers: list[str], count: int) -> dict[str, ExpertDim]:
    """The same for the layers that have `count` experts."""
    config = model.config
    sites = count_sites(config.to_dict(), count)
    if not sites:
        raise UnsupportedModel(
            f"{type(model).__name__}: no field of its configuration says {count}, the number of "
            f"experts of {layers[0]}; load the model with its own config.json"
        )

    @functools.cache
    def double(chosen: tuple[Site, ...]) -> dict[str, Shape]:
        edited = with_count(config.to_diff_dict(), list(chosen), 2 * count)
        return _shapes(meta_model(type(config).from_dict(edited), type(model)))

    # What only the loaded model has (scales of dequantised weights, say) is no part of the class.
    own = _shapes(model)
    old = {name: own[name] for name in double(tuple(sites)) if name in own}
    chosen = own_sites(sites, old, layers, 2 * count, lambda part: double(tuple(part)))
    new = double(tuple(chosen))
    found = derive_layout(old, new, before=count, after=2 * count, layers=layers)
    return dict(found.tensors)


def _shapes(model: PreTrainedModel) -> dict[str, Shape]:
    """Every tensor of the state dict with its shape."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
