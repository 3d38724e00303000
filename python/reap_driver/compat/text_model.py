"""The part of a model that reads text, for models that have no forward of their own.

Qwen3-Omni whole is a thinker, a talker and a vocoder that its `generate` calls in turn; the model
itself cannot be called. transformers names the part that text goes to by its configuration.
"""

from torch import nn
from transformers import PreTrainedModel

from reap_kernels.errors import UnsupportedModel


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or where it has no forward, the outermost part that shares its text
    configuration and has one.

    Raises:
        UnsupportedModel: no part has.

    Example:
        >>> text_model(whole_qwen3_omni) is whole_qwen3_omni.thinker
        True
    """
    return _named(model)[1]


def text_prefix(model: PreTrainedModel) -> str:
    """What the names of everything in `text_model` begin with: nothing, or `thinker.`."""
    name = _named(model)[0]
    return name + "." if name else ""


def _named(model: PreTrainedModel) -> tuple[str, PreTrainedModel]:
    """Qualified name and module of the part."""
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
    """Whether its class says how it is called; what hooks wrap, they wrap in the instance."""
    return type(model).forward is not nn.Module.forward
