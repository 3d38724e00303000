"""What `apply_plan` did, and both models in the numbers that model cards publish."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from reap_driver.files.safetensors_file import TensorEntry
from reap_driver.model.discover import MoELayer
from reap_driver.plan.plan import Plan

_CONTEXT = "max_position_embeddings"


@dataclass(frozen=True)
class Specification:
    """What a table of both models shows; pairs are (original, pruned), None is not known.

    Attributes:
        parameters: of the model that is built from config.json, quantised ones counted as plain;
            tied tensors once, multi-token-prediction layers not.
        active_parameters: those a token's forward depends on: all but the experts it is not routed
            to.
        top_k: experts a token is routed to, of every layer: one number where they agree.
        layers: decoder layers.
        heads: attention heads.
        key_value_heads: of them with keys and values of their own.
        context: positions the configuration allows.
        stored: dtypes of the tensors on disk, those with most bytes first.
        quantization: the method config.json names.
        architecture: class of the model.
        remote_code: whether config.json refers to code that comes with the checkpoint.
    """

    parameters: tuple[int, int]
    active_parameters: tuple[int, int]
    top_k: tuple[int, ...]
    layers: int | None
    heads: int | None
    key_value_heads: int | None
    context: int | None
    stored: tuple[str, ...]
    quantization: str | None
    architecture: str
    remote_code: bool


@dataclass
class ApplyReport:
    """Result of writing one pruned checkpoint."""

    plan: "Plan"  # that was applied, with notes of how the model differs from the plan's own
    source: Path
    out_path: Path
    layers: int  # MoE layers, without those of stacks that are left whole
    experts_before: int  # routed experts of such a layer; the largest, where numbers differ
    experts_after: int
    experts_per_layer: Mapping[str, tuple[int, int]]  # every MoE layer -> (before, after)
    whole: list[str]  # layers of stacks of which nothing is removed
    uniform: bool  # one number of experts loads every stack; else `load_pruned.py` is in the folder
    tensors: int  # written
    tensor_bytes: int  # data of these tensors
    bytes_written: int  # all files
    source_tensors: int
    source_tensor_bytes: int
    shards: int
    specification: Specification
    edited_config: Mapping[str, tuple[Any, Any]]  # dotted field of config.json -> (old, new)
    expert_keys_dropped: int  # tensors of removed experts
    tables_rewritten: int = 0  # tables of expert ids by token (DeepSeek-V4)
    mtp_dropped: list[str] = field(default_factory=list)  # keys of MTP layers left out
    left_out: list[str] = field(default_factory=list)  # other weight formats, hidden files
    cleaned: list[str] = field(default_factory=list)  # leftovers of killed runs, removed
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def pruned(self) -> Mapping[str, tuple[int, int]]:
        """Layers of the stacks that were cut -> experts (before, after)."""
        whole = set(self.whole)
        return {name: pair for name, pair in self.experts_per_layer.items() if name not in whole}


def specify(
    model: PreTrainedModel,
    layers: Sequence[MoELayer],
    kept: Mapping[str, int],
    pruned: Mapping[str, tuple[int, ...]],
    tensors: Iterable[TensorEntry],
    raw: Mapping[str, Any],
) -> Specification:
    """The specification of a model and of what a plan leaves of it.

    Args:
        model: the original, on meta.
        layers: its MoE layers.
        kept: name of each layer -> experts it keeps.
        pruned: tensors of the pruned model's state dict -> shape.
        tensors: of the original checkpoint.
        raw: its config.json.
    """
    model.tie_weights()  # a model built on meta is not yet; tied tensors count once
    old = {name: p.numel() for name, p in model.named_parameters()}
    new = {name: math.prod(pruned[name]) for name in old if name in pruned}
    text = model.config.get_text_config()
    quantization = raw.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    return Specification(
        parameters=(sum(old.values()), sum(new.values())),
        active_parameters=(
            sum(old.values()) - _idle(old, layers, {la.name: la.num_experts for la in layers}),
            sum(new.values()) - _idle(new, layers, kept),
        ),
        top_k=tuple(sorted({layer.top_k for layer in layers})),
        layers=_number(text, "num_hidden_layers"),
        heads=_number(text, "num_attention_heads"),
        key_value_heads=_number(text, "num_key_value_heads"),
        context=_number(text, _CONTEXT),
        stored=_dtypes(tensors),
        quantization=None if method is None else str(method),
        architecture=type(model).__name__,
        remote_code="auto_map" in raw,
    )


def _idle(
    parameters: Mapping[str, int], layers: Sequence[MoELayer], experts: Mapping[str, int]
) -> int:
    """Parameters of experts that a token is not routed to."""
    idle = 0
    for layer in layers:
        held = sum(n for name, n in parameters.items() if name.startswith(layer.name + "."))
        idle += held - held * layer.top_k // experts[layer.name]
    return idle


def _number(config: Any, name: str) -> int | None:
    """A field of the configuration; None where it has none, or another one for every layer."""
    differing = getattr(config, "is_heterogeneous", False)  # then it refuses to be asked itself
    parts = list(config.per_layer_config) if differing else [config]
    first, *rest = (getattr(part, name, None) for part in parts)
    return first if isinstance(first, int) and all(value == first for value in rest) else None


def _dtypes(tensors: Iterable[TensorEntry]) -> tuple[str, ...]:
    held: dict[str, int] = {}
    for entry in tensors:
        held[entry.dtype] = held.get(entry.dtype, 0) + entry.nbytes
    return tuple(sorted(held, key=lambda dtype: (-held[dtype], dtype)))
