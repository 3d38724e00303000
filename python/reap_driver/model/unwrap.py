"""The model itself, out of what torch wraps around it to compile it or to spread batches."""

from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from reap_kernels.errors import UnsupportedModel, UsageError

# Wrappers whose inner model is whole, and computes what it computes without them: class -> where.
# By name, since importing torch's compiler and its distributed parts takes seconds.
_INNER = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
}


def check_mode(name: str, module: nn.Module) -> None:
    """Raises UnsupportedModel where a module of a model, "" for itself, is in training mode."""
    if module.training:
        raise UnsupportedModel(
            f"{name or type(module).__name__} is in training mode, where routers may add noise and "
            "layers drop values; call model.eval() first"
        )


def unwrap_model(model: Any) -> PreTrainedModel:
    """The model that `torch.compile`, `DataParallel` or `DistributedDataParallel` was given.

    Args:
        model: a loaded model, or such a wrapper of one; wrappers may be nested.

    Raises:
        UsageError: it is no model with a configuration.
        UnsupportedModel: a wrapper that holds but a part of the model.

    Example:
        >>> unwrap_model(torch.compile(model)) is model
        True
    """
    found = model
    while isinstance(found, nn.Module) and type(found).__name__ in _INNER:
        found = getattr(found, _INNER[type(found).__name__])
    if type(found).__name__ == "FullyShardedDataParallel":
        raise UnsupportedModel(
            "the model is wrapped by FullyShardedDataParallel, which holds a part of every tensor; "
            "load it without, or spread its layers by device_map"
        )
    if isinstance(found, PreTrainedModel):
        return found
    known = isinstance(found, nn.Module) and isinstance(
        getattr(found, "config", None), PretrainedConfig
    )
    if not known:
        raise UsageError(
            f"model is a {type(found).__name__}; give a loaded transformers model, such as "
            "load_model makes of a folder or hub id"
        )
    return found  # a wrapper of adapters, say: called alike
