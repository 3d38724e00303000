"""Fields of a configuration that may differ from layer to layer, such as Step-3.5-Flash's heads.

transformers refuses to say such a field of the whole configuration, so it is read of each layer.
"""

from typing import Any

from transformers import PretrainedConfig


def layer_values(config: PretrainedConfig, name: str) -> list[Any]:
    """The value of a field in every layer; one value where it is the same by construction.

    Args:
        config: of the text model.
        name: the field; None stands for a value that a layer does not have.
    """
    differing = getattr(config, "is_heterogeneous", False)
    parts = list(config.per_layer_config) if differing else [config]
    return [getattr(part, name, None) for part in parts]


def query_heads(module: Any, config: PretrainedConfig) -> int:
    """The number of query heads of an attention module.

    Args:
        module: says it itself, or knows the number of its layer.
        config: of the text model.
    """
    own = getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", None)
    values = layer_values(config, "num_attention_heads")
    layer = getattr(module, "layer_idx", None) or 0
    return int(own or values[layer if len(values) > 1 else 0])
