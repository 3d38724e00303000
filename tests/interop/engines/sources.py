"""Which small model an engine's test of an architecture runs: its configuration, and its table.

Heads have 32 values, the fewest that vLLM's attention on a CPU takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.driver.published.entry import Published
from tests.driver.published.models import MODELS
from tests.driver.published.reduce import small_config
from tests.interop.engines.written import WRITTEN


@dataclass(frozen=True)
class Source:
    """Where a small model comes from.

    Attributes:
        model: whose configuration it has, or after which it was written, as the table says it.
        entry: names of tensors, and the fields that count experts.
        config: the small `config.json`.
    """

    model: str
    entry: Published
    config: Mapping[str, Any]


def _published(name: str, **fields: Any) -> Source:
    """A published configuration, made small, with some fields of other values."""
    return Source(name, MODELS[name], small_config(name, fields))


def _written(architecture: str) -> Source:
    """A configuration of which no published copy was at hand."""
    entry, config = WRITTEN[architecture]
    model = entry.hub_id.rpartition("/")[2]
    return Source(f"by hand, after {model}" if model else "by hand", entry, config)


_WIDE: dict[str, Any] = {"head_dim": 32}
_TWO: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
_GROUPED: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
# The published sizes: vLLM's latent attention on a CPU takes no others.
_LATENT: dict[str, Any] = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
# gpt-oss has false, which llama.cpp and MLX do not read.
_ROUNDED: dict[str, Any] = {"rope_scaling.truncate": True}

# Architecture -> what it is tested with.
SOURCES = {
    "qwen3_moe": _published("qwen3-30b-a3b", **_WIDE),
    "qwen2_moe": _published("qwen1.5-moe-a2.7b", **_TWO),
    "mixtral": _published("mixtral-8x7b", **_GROUPED),
    "olmoe": _published("olmoe-1b-7b", **_TWO),
    "glm4_moe": _published("glm-4.5-air", **_WIDE),
    "deepseek_v3": _published("deepseek-r1", **_LATENT),
    "minimax_m2": _published("minimax-m2", **_WIDE),
    # llama.cpp takes intermediate_size // num_key_value_heads for the width of shared experts.
    "ernie4_5_moe": _published("ernie-4.5-21b-a3b", **_WIDE, intermediate_size=128),
    "gpt_oss": _published("gpt-oss-120b", **_WIDE, **_ROUNDED),
} | {architecture: _written(architecture) for architecture in WRITTEN}
