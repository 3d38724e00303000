"""A published configuration made small: fewer layers, narrower widths, a small vocabulary."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.driver.published.models import MODELS

CONFIGS = Path(__file__).parent / "configs"
VOCAB = 320
PAD, BOS, EOS = 0, 1, 2
_TOKEN_IDS = {"pad": PAD, "bos": BOS, "eos": EOS}


def published_config(name: str) -> dict[str, Any]:
    """The fields of the published `config.json`."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return config


def small_config(name: str, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The published configuration, small; expert counts, top-k and groups are the real ones.

    Args:
        name: of `MODELS`.
        fields: dotted path -> value, in addition to the model's overrides.

    Raises:
        KeyError: an override names a field the published configuration does not have.
    """
    config = copy.deepcopy(published_config(name))
    for field, value in {**MODELS[name].overrides, **(fields or {})}.items():
        if get_field(config, field, missing="missing") == "missing":
            raise KeyError(f"{name}: override {field} is not a published field")
        set_field(config, field, value)
    _shrink_vocabulary(config, iter(range(VOCAB - 1, 0, -1)))
    return config


def get_field(config: dict[str, Any], dotted: str, missing: Any = None) -> Any:
    """The value at a dotted path such as `text_config.num_experts`."""
    node: Any = config
    for part in dotted.split("."):
        if not isinstance(node, dict) or part not in node:
            return missing
        node = node[part]
    return node


def set_field(config: dict[str, Any], dotted: str, value: Any) -> None:
    """Set the value at a dotted path whose parents exist."""
    *parents, last = dotted.split(".")
    node = config
    for part in parents:
        node = node[part]
    node[last] = value


def _shrink_vocabulary(config: dict[str, Any], free_ids: Any) -> None:
    """Put every vocabulary size and token id of a (nested) config into the small vocabulary."""
    for key, value in config.items():
        if isinstance(value, dict):
            _shrink_vocabulary(value, free_ids)
        elif key.startswith("vocab_size"):
            config[key] = VOCAB
        elif value is not None and key.endswith(("_token_id", "_token_index")):
            token = _TOKEN_IDS.get(key.split("_")[0])
            token = next(free_ids) if token is None else token
            config[key] = [token] if isinstance(value, list) else token
