"""What `apply_plan` did, and both models in the numbers that model cards publish."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from reap_driver.compat.layer_fields import layer_values
from reap_driver.files.safetensors_file import TensorEntry
from reap_driver.model.discover import MoELayer
from reap_driver.planning.plan import Plan
from reap_driver.writer.mtp import MtpLayer

_CONTEXT = "max_position_embeddings"


@dataclass(frozen=True)
class Specification:
    """Both models in numbers. Pairs are (original, pruned); None where a number is not known.

    Attributes:
        parameters: of the model that config.json describes, before any quantization. Tied tensors
            count once, multi-token-prediction layers not.
        active_parameters: those used for one token: all but the experts it is not routed to.
        top_k: the numbers of experts that layers route a token to, each number once.
        layers: decoder layers.
        heads: attention heads.
        key_value_heads: of them with keys and values of their own.
        context: positions the configuration allows.
        stored: dtypes of the tensors on disk, the one with most bytes first.
        quantization: the method that config.json names.
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
    """Result of writing one pruned checkpoint; see `apply_plan`.

    Attributes:
        plan: that was applied, with notes on how the model differs from the plan's own.
        source, out_path: folders.
        layers: MoE layers, without those of stacks that lose neither experts nor neurons.
        experts_before, experts_after: routed experts of such a layer; the largest number where
            layers differ.
        experts_per_layer: {MoE layer: experts (before, after)}, all layers.
        neurons_per_layer: {MoE layer: neurons of an expert (before, after)}, layers whose experts
            lose some.
        refitted: layers whose experts have new down projections.
        whole: layers of stacks that lose neither experts nor neurons.
        uniform: whether every stack has one number of experts; if not, `load_pruned.py` in the
            folder loads the checkpoint.
        tensors, tensor_bytes: written, and their data in bytes.
        bytes_written: size of all files.
        source_tensors, source_tensor_bytes: the same of the source.
        shards: safetensors files written.
        specification: both models in numbers.
        edited_config: {field of config.json, with dots: (old, new)}.
        expert_keys_dropped: tensors of removed experts.
        tensors_computed: tensors with new values: of experts that lose neurons or get new down
            projections, and of shared experts that became wider.
        tables_rewritten: tables of expert ids by token (DeepSeek-V4).
        mtp_dropped: keys of multi-token-prediction layers that were left out.
        mtp_tensors: tensors of multi-token-prediction layers that were written.
        mtp_layers: {multi-token-prediction layer with experts that was written: `before` (their
            number), `kept` (their ids), `like` (the layer whose kept ids these are, or None)}.
        left_out: files that were not copied: other formats of the weights, and hidden files.
        cleaned: folders of killed runs that were removed.
        licenses: names of files with the text of the license.
        warnings: sentences for the user.
        seconds: the call took.

    Example:
        >>> report = rd.apply_plan("MODEL", plan, "reported")
        >>> report.out_path.name, report.layers
        ('reported', 4)
    """

    plan: "Plan"
    source: Path
    out_path: Path
    layers: int
    experts_before: int
    experts_after: int
    experts_per_layer: Mapping[str, tuple[int, int]]
    neurons_per_layer: Mapping[str, tuple[int, int]]
    refitted: list[str]
    whole: list[str]
    uniform: bool
    tensors: int
    tensor_bytes: int
    bytes_written: int
    source_tensors: int
    source_tensor_bytes: int
    shards: int
    specification: Specification
    edited_config: Mapping[str, tuple[Any, Any]]
    expert_keys_dropped: int
    tensors_computed: int = 0
    tables_rewritten: int = 0
    mtp_dropped: list[str] = field(default_factory=list)
    mtp_tensors: int = 0
    mtp_layers: Mapping[str, MtpLayer] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    cleaned: list[str] = field(default_factory=list)
    licenses: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def pruned(self) -> Mapping[str, tuple[int, int]]:
        """{layer: experts (before, after)}, layers of stacks that lose experts."""
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
    """The specification of a model and of its pruned version.

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
    first, *rest = layer_values(config, name)
    return first if isinstance(first, int) and all(value == first for value in rest) else None


def _dtypes(tensors: Iterable[TensorEntry]) -> tuple[str, ...]:
    held: dict[str, int] = {}
    for entry in tensors:
        held[entry.dtype] = held.get(entry.dtype, 0) + entry.nbytes
    return tuple(sorted(held, key=lambda dtype: (-held[dtype], dtype)))
