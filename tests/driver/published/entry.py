"""The entry of one model in the table of published models."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Mtp:
    """Multi-token-prediction layers: each has the tensors of a decoder layer and some of its own.

    Attributes:
        block: disk prefix of layer `{i}`; `{n}` stands for `num_hidden_layers + i`.
        like: disk prefix of the decoder layer whose tensors it repeats.
        extras: disk names of its own tensors, with their shapes in H (hidden size), V (vocabulary).
        count: how many there are.
    """

    block: str
    like: str
    extras: Mapping[str, tuple[str, ...]]
    count: int = 1


def nextn(like: int, *, own_embedding: bool = False) -> Mtp:
    """The layout of DeepSeek-V3 and GLM: one more layer at the end, like decoder layer `like`."""
    extras: dict[str, tuple[str, ...]] = {
        "model.layers.{n}.eh_proj.weight": ("H", "2H"),
        "model.layers.{n}.enorm.weight": ("H",),
        "model.layers.{n}.hnorm.weight": ("H",),
        "model.layers.{n}.shared_head.norm.weight": ("H",),
    }
    if own_embedding:
        extras["model.layers.{n}.embed_tokens.weight"] = ("V", "H")
        extras["model.layers.{n}.shared_head.head.weight"] = ("V", "H")
    return Mtp("model.layers.{n}.", f"model.layers.{like}.", extras)


@dataclass(frozen=True)
class Published:
    """One published model.

    Attributes:
        hub_id: where it is published.
        source: what the fields were checked against, and which could not be.
        counts: dotted config fields that hold the number of routed experts.
        top_k: dotted config field of the experts per token.
        overrides: dotted config field -> value of the small model.
        moe_layers: decoder layers of the small model that have experts.
        block: disk prefix of the MoE block of layer `{i}`.
        stacked: names under the block that hold all experts in dim 0.
        routers: names under the block with one entry per expert, and the dim it lies in.
        names: samples of published tensor names, which the written checkpoint must have.
        cleared: dotted config field -> value without MTP layers.
        per_layer: dotted config fields that list one value a layer, MTP layers included.
        revert: whether save_pretrained's key conversion leads to the published names.
        renames: regular expression -> replacement, applied to every key after that.
        splits: regular expression of a tensor -> replacements for its halves along dim 1.
        float32: regular expression of the tensors published in float32.
        quantized: "fp8", "mxfp4" or None.
        ratio: how much of it the end-to-end test removes; `kept` is what must be left.
        not_plain: why transformers' own from_pretrained cannot load it, if it cannot.
    """

    hub_id: str
    source: str
    counts: tuple[str, ...]
    kept: int
    overrides: Mapping[str, Any]
    names: tuple[str, ...]
    moe_layers: tuple[int, ...] = (0, 1)
    top_k: str = "num_experts_per_tok"
    block: str = "model.layers.{i}.mlp."
    stacked: tuple[str, ...] = ()
    routers: Mapping[str, int] = field(default_factory=lambda: {"gate.weight": 0})
    mtp: Mtp | None = None
    cleared: Mapping[str, Any] = field(default_factory=dict)
    per_layer: tuple[str, ...] = ()
    revert: bool = True
    renames: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    float32: str = r"e_score_correction_bias$"
    quantized: str | None = None
    ratio: float = 0.5
    not_plain: str | None = None
