"""What transformers' own cache keeps for each decoder layer of a model."""

from dataclasses import dataclass

from transformers import PretrainedConfig
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from reap_driver.compat.library_errors import wrap_errors


@dataclass(frozen=True)
class CacheLayer:
    """What the cache keeps for one layer.

    Attributes:
        attends: whether it keeps keys and values, token by token.
        window: the number of tokens that it keeps at most; None: all.
        has_state: whether it keeps states whose size does not depend on the number of tokens.
        unknown: name of its class, where that is one that a model brings itself.
    """

    attends: bool
    window: int | None
    has_state: bool
    unknown: str | None


def cache_layers(config: PretrainedConfig) -> list[CacheLayer]:
    """The layers of the cache, by `layer_idx`. Layers that share those of others are left out.

    Raises:
        CheckpointError: the library cannot make a cache for this configuration.
    """
    what = f"{config._name_or_path or 'model'}: config.json describes no key-value cache"
    with wrap_errors(what, "plan by `ratio`, `keep` or `target_size` instead of `fits`"):
        layers = DynamicCache(config=config).layers
    return [
        CacheLayer(
            attends=isinstance(layer, DynamicLayer),
            window=layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None,
            has_state=isinstance(layer, LinearAttentionLayer),
            unknown=None
            if type(layer).__module__.endswith("cache_utils")
            else type(layer).__name__,
        )
        for layer in layers
    ]
