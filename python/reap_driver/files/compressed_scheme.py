"""Reads the `quantization_config` of compressed-tensors and refuses what cannot be dequantized."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reap_driver.files.settings_checks import check_types, refuse
from reap_kernels.schema import Anything, Flag, Int, MapOf, OrNull, Record, Text

_NVFP4, _NVFP4_GROUP = "nvfp4-pack-quantized", 16

# Bits per value that can be read, by format and type of number.
_BITS: dict[tuple[Any, Any], tuple[int, ...]] = {
    ("pack-quantized", "int"): (4, 8),
    ("int-quantized", "int"): (8,),
    ("naive-quantized", "int"): (8,),
    ("float-quantized", "float"): (8,),
    ("naive-quantized", "float"): (8,),
    (_NVFP4, "float"): (4,),
}
_FORMATS = sorted({name for name, _ in _BITS})

# Types of the fields that are read; which of their values are supported is checked below.
_NAME = OrNull(Text())
_SETTINGS = Record(
    optional={
        "config_groups": OrNull(MapOf(Anything())),
        "format": _NAME,
        "sparsity_config": OrNull(Record(optional={"format": _NAME}, open=True)),
        "transform_config": OrNull(
            Record(optional={"config_groups": OrNull(MapOf(Anything()))}, open=True)
        ),
    },
    open=True,
)
_WEIGHTS = Record(
    optional={
        "type": Text(),
        "num_bits": Int(1, 64),
        "symmetric": Flag(),
        "strategy": _NAME,
        "group_size": OrNull(Int(-1, 2**20)),
        "block_structure": OrNull(Anything()),
    },
    open=True,
)
_GROUP = Record(optional={"format": _NAME, "weights": OrNull(_WEIGHTS)}, open=True)


@dataclass(frozen=True)
class Scheme:
    """How matrices are quantized, over all groups of a configuration.

    A matrix's tensors tell which of the alternatives applies to it.

    Attributes:
        bits: bits per packed integer; None if no matrix is packed.
        groups: sizes of the groups of a row that share a scale, in elements; None stands for whole
            rows.
        block: (rows, columns) of the blocks that share a scale; None if no matrix has blocks.
        zeros: {False}, {True} or both: whether matrices have zero points.
        nvfp4: whether matrices may be NVFP4 (`load.nvfp4`).
        single: whether matrices may have one scale for all elements.
    """

    bits: int | None
    groups: frozenset[int | None]
    block: tuple[int, int] | None
    zeros: frozenset[bool]
    nvfp4: bool = False
    single: bool = False


def read_scheme(quantization: Mapping[str, Any], where: str) -> Scheme:
    """The scheme of a `quantization_config`; error messages begin with `where`.

    Raises:
        UnsupportedModel: a field has a value that is not supported; names the first such field.
        CheckpointError: a field has a value of the wrong type.
    """
    _check_whole(quantization, where)
    found = list(_weights(quantization, where))
    if not found:
        refuse(f"{where}: no group of config_groups has weights", "one")
    bits = {_num_bits(w) for _, w, name in found if name == "pack-quantized"}
    if len(bits) > 1:
        refuse(f"{where}: groups of config_groups pack {sorted(bits)} bits", "one number of bits")
    blocks = {_block(field, w) for field, w, _ in found if w.get("block_structure")}
    if len(blocks) > 1:
        refuse(f"{where}: groups of config_groups have blocks {sorted(blocks)}", "one size")
    sizes = (w.get("group_size") for _, w, _ in found if not w.get("block_structure"))
    groups = frozenset(size if size and size > 0 else None for size in sizes)
    single = any(_is_single(w) for _, w, _ in found)
    zeros = frozenset(not w.get("symmetric", True) for _, w, _ in found)
    nvfp4 = any(name == _NVFP4 for _, _, name in found)
    return Scheme(next(iter(bits), None), groups, next(iter(blocks), None), zeros, nvfp4, single)


def _check_whole(quantization: Mapping[str, Any], where: str) -> None:
    """Checks the fields that concern the checkpoint as a whole."""
    check_types(dict(quantization), _SETTINGS, where)
    status = quantization.get("quantization_status", "compressed")
    if status != "compressed":
        refuse(f"{where}.quantization_status is {status!r}", "'compressed'")
    sparsity = (quantization.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        refuse(f"{where}.sparsity_config.format is {sparsity!r}", "'dense'")
    transforms = (quantization.get("transform_config") or {}).get("config_groups")
    if transforms:  # some act on activations, so a dequantized model would compute something else
        refuse(f"{where}.transform_config has {sorted(transforms)}", "none")


def _weights(
    quantization: Mapping[str, Any], where: str
) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """(field name, its content, format) of the `weights` of each group, checked."""
    groups = quantization.get("config_groups") or {}
    for name, group in groups.items():
        field = f"{where}.config_groups.{name}"
        if not isinstance(group, Mapping):
            refuse(f"{field} is {group!r}", "a group written out")
        check_types(group, _GROUP, field)
        weights = group.get("weights")
        if weights is None:
            continue
        stored = group.get("format") or quantization.get("format")
        kind, bits = weights.get("type", "int"), _num_bits(weights)
        known = _BITS.get((stored, kind))
        if known is None:
            refuse(
                f"{field} has format {stored!r} and weights.type {kind!r}",
                f"{', '.join(_FORMATS)} with their own type",
            )
        if bits not in known:
            refuse(f"{field}.weights.num_bits is {bits}", " or ".join(map(str, known)))
        _check_layout(weights, kind, f"{field}.weights", nvfp4=stored == _NVFP4)
        yield f"{field}.weights", weights, str(stored)


def _num_bits(weights: Mapping[str, Any]) -> int:
    """Bits per value; 8 is the library's default."""
    bits: int = weights.get("num_bits", 8)
    return bits


def _is_single(weights: Mapping[str, Any]) -> bool:
    """Whether all elements share a scale, which is the library's default without a group size."""
    strategy = weights.get("strategy")
    return strategy == "tensor" or (strategy is None and weights.get("group_size") is None)


def _check_layout(weights: Mapping[str, Any], kind: str, field: str, *, nvfp4: bool) -> None:
    """Checks the fields that say which elements share a scale, and the order of columns."""
    strategy, order = weights.get("strategy"), weights.get("actorder")
    known = ("tensor_group",) if nvfp4 else ("tensor", "channel", "group", "block")
    if strategy not in (None, *known):
        refuse(f"{field}.strategy is {strategy!r}", " or ".join(known))
    if nvfp4 and weights.get("group_size") != _NVFP4_GROUP:
        refuse(f"{field}.group_size is {weights.get('group_size')}", f"{_NVFP4_GROUP}")
    if order not in (None, False, "weight", "static"):  # these keep the columns in their order
        refuse(f"{field}.actorder is {order!r}", "none, 'weight' or 'static'")
    if kind == "float" and not weights.get("symmetric", True):
        refuse(f"{field}.symmetric is False for floats", "True")


def _block(field: str, weights: Mapping[str, Any]) -> tuple[int, int]:
    """(rows, columns) of a block."""
    block = weights["block_structure"]
    pair = isinstance(block, list) and len(block) == 2
    if not (pair and all(type(n) is int and n > 0 for n in block)):
        refuse(f"{field}.block_structure is {block!r}", "a list of two sizes")
    return block[0], block[1]
