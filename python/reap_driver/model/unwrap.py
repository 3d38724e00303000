"""Unwraps the model inside torch.compile, DataParallel or DistributedDataParallel."""

from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from reap_kernels.errors import UnsupportedModel, UsageError

# Wrappers that hold the whole model and leave what it computes unchanged: class name -> attribute.
# Names, because importing torch's compiler and its distributed package takes seconds.
_INNER = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
}


def check_mode(name: str, module: nn.Module) -> None:
    """Raises UnsupportedModel if a module, named `name` in its model, is in training mode."""
    if module.training:
        raise UnsupportedModel(
            f"{name or type(module).__name__} is in training mode, where routers may add noise and "
            "layers drop values; call model.eval() first"
        )


def unwrap_model(model: Any) -> PreTrainedModel:
    """The model inside `torch.compile`, `DataParallel` or `DistributedDataParallel`.

    Args:
        model: a loaded model, or a wrapper of one; wrappers may be nested.

    Raises:
        UsageError: it is not a transformers model.
        UnsupportedModel: the wrapper (FSDP) holds only a part of the model.

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
    return found  # for example a wrapper of LoRA adapters, which is called like the model
