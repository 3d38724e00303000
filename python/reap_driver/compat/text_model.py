"""Finds the part of a model that takes text, for models without a forward of their own.

The complete Qwen3-Omni consists of a thinker, a talker and a vocoder that its `generate` calls in
turn; the model itself cannot be called. `get_text_config` of its configuration identifies the part
that takes text.
"""

from torch import nn
from transformers import PreTrainedModel

from reap_kernels.errors import UnsupportedModel


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself; or, if it has no forward, its outermost part that has one and has the same
    text configuration.

    Raises:
        UnsupportedModel: there is no such part.

    Example:
        >>> text_model(model) is model  # of a whole Qwen3-Omni it is `model.thinker`
        True
    """
    return _named(model)[1]


def text_prefix(model: PreTrainedModel) -> str:
    """Prefix of the names of everything in `text_model`: empty, or for example `thinker.`."""
    name = _named(model)[0]
    return name + "." if name else ""


def _named(model: PreTrainedModel) -> tuple[str, PreTrainedModel]:
    """Qualified name and module of the part that takes text."""
    if _runs(model):
        return "", model
    text = model.config.get_text_config()
    for name, part in model.named_modules():  # outermost first
        named = isinstance(part, PreTrainedModel) and _runs(part)
        if named and part.config.get_text_config() == text:
            return name, part
    raise UnsupportedModel(
        f"{type(model).__name__} has no forward, and none of its parts has its text configuration "
        f"({type(text).__name__}); load the part that reads text as a model of its own"
    )


def _runs(model: nn.Module) -> bool:
    """Whether the class of a model defines a forward; hooks replace that of the instance."""
    return type(model).forward is not nn.Module.forward
