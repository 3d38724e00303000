"""Reads config.json as written and checks its values before a model is built from them."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from reap_driver.compat.library_errors import one_line, wrap_errors
from reap_driver.compat.load_pruned import SETTINGS
from reap_kernels.documents import parse_json, read_bytes
from reap_kernels.errors import CheckpointError
from reap_kernels.files import is_file
from reap_kernels.schema import (
    MAX_INT,
    Anything,
    Int,
    Kind,
    ListOf,
    MapOf,
    Mismatch,
    OrNull,
    Record,
    Text,
    check,
    short,
)

_NAME = "config.json"
_REMEDY = "restore the file from where the checkpoint was published"


@dataclass(frozen=True)
class _Number:
    """null, a number from `low` to `high`, or a list of these, one per layer."""

    low: float
    high: float
    types: tuple[type, ...] = (int, float)
    name: str = "number"

    def check(self, value: Any, at: str) -> None:
        for item in value if isinstance(value, list) else [value]:
            fits = type(item) in self.types and self.low <= item <= self.high
            if not fits and item is not None:
                kind = f"a {self.name}, {self.low} to {self.high}"
                raise Mismatch(at, f"is {short(item)}", kind)


def _size(low: int, high: int) -> _Number:
    return _Number(low, high, (int,), "whole number")


# Upper bounds are several times what any published model has. Lower bounds are 0 where 0 means
# "none", as for experts, layers and ranks.
_LAYERS, _EXPERTS, _MODULES = 1024, 16_384, 131_072
_LAYER_FIELDS = (
    "num_hidden_layers",
    "num_layers",
    "n_layers",
    "n_layer",
    "depth",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
)
# Every field name that configurations use for the number of routed experts of a layer.
COUNT_FIELDS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
    "n_experts",
)
# Those for the number of shared experts, which are as wide as so many routed ones.
SHARED_COUNT_FIELDS = (
    "n_shared_experts",
    "num_shared_experts",
    "moe_num_shared_experts",
    "num_shared_expert",
)
_EXPERT_FIELDS = (
    *COUNT_FIELDS,
    *SHARED_COUNT_FIELDS,
    "zero_expert_num",
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_k",
    "moe_top_k",
    "moe_topk",
    "n_group",
    "topk_group",
    "num_expert_group",
    "num_group",
)
MTP_FIELDS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "num_mtp_modules",
)
_WIDTH_FIELDS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "ffn_hidden_size",
    "expert_ffn_hidden_size",
    "q_lora_rank",
    "kv_lora_rank",
    "head_dim",
    "v_head_dim",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
)
_STEP_FIELDS = (
    "decoder_sparse_step",
    "interleave_moe_layer_step",
    "moe_layer_freq",
    "first_k_dense_replace",
    "num_dense_layers",
    "moe_layer_interval",
    "expert_layer_period",
    "expert_layer_offset",
    "attn_layer_period",
    "attn_layer_offset",
)
_FACTORS = (
    "rope_theta",
    "rope_local_base_freq",
    "routed_scaling_factor",
    "route_scale",
)
_SHARES = (
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_eps",
    "partial_rotary_factor",
)
_BOUNDS: Mapping[str, Kind] = {
    **dict.fromkeys((*_LAYER_FIELDS, *MTP_FIELDS), _size(0, _LAYERS)),
    **dict.fromkeys(_EXPERT_FIELDS, _size(0, _EXPERTS)),
    **dict.fromkeys(_WIDTH_FIELDS, _size(0, 2**22)),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), _size(1, 2**20)),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads"), _size(1, 2**16)),
    **dict.fromkeys(("num_key_value_heads", "kv_n_heads", "num_attention_groups"), _size(1, 2**16)),
    **dict.fromkeys(_STEP_FIELDS, _size(0, _LAYERS)),
    **dict.fromkeys(_FACTORS, _Number(1e-9, 1e12)),
    **dict.fromkeys(_SHARES, _Number(0, 1)),
    "vocab_size": _size(1, 2**24),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len"), _size(1, 2**31)),
}
# Names of other counts and sizes; -1 may mean "none".
_COUNTED = re.compile(r"^(num|n)_|_(size|sizes|dim|rank|layers|heads|experts|window)$")
# Names that torch gives to the dtypes that weights are computed in.
DTYPES = ("bfloat16", "float16", "float32", "float64")
_DTYPE = OrNull(Text(choices=(*DTYPES, *(f"torch.{name}" for name in DTYPES), "auto")))
_NAMES = OrNull(ListOf(Text()))
_QUANTIZATION = Record(
    optional={
        "quant_method": OrNull(Text()),
        "weight_block_size": OrNull(ListOf(Int(1, 2**20), 2, 2)),
        "modules_to_not_convert": _NAMES,
        "ignore": _NAMES,
    },
    open=True,
)
_FIELDS: Mapping[str, Kind] = {
    **_BOUNDS,
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "architectures": _NAMES,
    "auto_map": OrNull(MapOf(Anything())),
    "model_type": OrNull(Text()),
    "quantization_config": OrNull(_QUANTIZATION),
    "compression_config": OrNull(_QUANTIZATION),
    SETTINGS: Record(
        {"count_fields": ListOf(Text(), 1), "counts": MapOf(Int(1, _EXPERTS), 1)}, open=True
    ),
}
# Objects that describe how weights are stored; their fields are not those of a model.
_STORED = frozenset({"quantization_config", "compression_config"})
# Fields that may be infinite, such as the `time_step_limit` of Mamba layers.
_LIMITS = ("limit", "max", "min", "clip", "clamp")


def read_config(path_or_id: str | Path) -> dict[str, Any]:
    """`config.json` of a local checkpoint folder or of a hub id, as written.

    Raises:
        CheckpointError: there is no such file, it is not a JSON object, or a field for a size, a
            dtype or a name has a value that no model can have.
    """
    folder = Path(path_or_id)
    if _is_folder(folder):
        where, raw = str(folder / _NAME), _from_folder(folder)
    else:
        where, raw = f"{path_or_id}: {_NAME}", _from_hub(path_or_id)
    if not isinstance(raw, dict):
        raise CheckpointError(
            f"{where}: holds a {type(raw).__name__}, expected a JSON object; {_REMEDY}"
        )
    try:
        _check_fields(raw)
    except Mismatch as error:
        raise CheckpointError(f"{where}: {error}; {_REMEDY}") from error
    return raw


def _from_folder(folder: Path) -> Any:
    file = folder / _NAME
    if not is_file(file):
        raise CheckpointError(
            f"{folder}: no config.json there; give the folder of a Hugging Face checkpoint."
        )
    try:
        return parse_json(read_bytes(file), plain=False)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}; {_REMEDY}") from error


def _from_hub(path_or_id: str | Path) -> Any:
    path = Path(path_or_id)
    local = path.is_absolute() or str(path_or_id).startswith(".") or len(path.parts) > 2
    if local or is_file(path):
        raise CheckpointError(f"{path_or_id}: no such checkpoint folder.")
    try:
        with wrap_errors(f"{path_or_id}: {_NAME} cannot be read", _REMEDY):
            return dict(PretrainedConfig.get_config_dict(str(path_or_id))[0])
    except CheckpointError as error:
        raise CheckpointError(
            f"{path_or_id}: neither a folder nor a hub id that can be read "
            f"({one_line(error.__cause__)})."
        ) from error


def _is_folder(path: Path) -> bool:
    """Whether a path is a folder; False for names that the file system does not allow."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _check_fields(raw: Mapping[str, Any]) -> None:
    """Raises Mismatch for the first field, at any depth, whose value no model can have."""
    most: dict[str, tuple[str, int]] = {"layers": ("", 0), "experts": ("", 0)}
    for at, name, value in _walk(raw, ""):
        if isinstance(value, float) and not math.isfinite(value):
            limit = any(word in name for word in _LIMITS)
            if math.isnan(value) or not limit:
                raise Mismatch(at, f"is {value}", "a finite number")
        if type(value) is int and not -MAX_INT - 1 <= value <= MAX_INT:
            raise Mismatch(at, f"is {short(value)}", "a number of 64 bits")
        if name in _FIELDS:
            check(value, _FIELDS[name], at)
        elif type(value) is int and _COUNTED.search(name):
            check(value, Int(-1, 2**40), at)
        for kind, fields in (("layers", _LAYER_FIELDS), ("experts", _EXPERT_FIELDS)):
            counts = [n for n in (value if isinstance(value, list) else [value]) if type(n) is int]
            if name in fields and counts and max(counts) > most[kind][1]:
                most[kind] = (at, max(counts))
    (layers, depth), (experts, count) = most["layers"], most["experts"]
    if depth * count > _MODULES:
        raise Mismatch(
            layers,
            f"is {depth} and {experts!r} is {count}",
            f"at most {_MODULES} experts in all layers together",
        )


def _walk(value: Any, at: str, name: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted name, own name, value) of every field and every item of a list.

    The own name is empty inside `quantization_config`, whose fields are not those of a model; only
    the range of its numbers is checked.
    """
    if isinstance(value, dict):
        stored = not _STORED.isdisjoint(at.split("."))
        for key, item in value.items():
            inside = f"{at}.{key}" if at else key
            own = "" if stored else key
            yield inside, own, item
            yield from _walk(item, inside, own)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            if isinstance(item, dict | list | float | int):
                yield f"{at}[{number}]", name if isinstance(item, float) else "", item
                yield from _walk(item, f"{at}[{number}]", name)
