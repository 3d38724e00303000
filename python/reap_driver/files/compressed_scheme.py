"""What a `quantization_config` of compressed-tensors says about stored weights; what is refused."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from reap_kernels.errors import CheckpointError, UnsupportedModel
from reap_kernels.schema import (
    Anything,
    Flag,
    Int,
    Kind,
    MapOf,
    Mismatch,
    OrNull,
    Record,
    Text,
    check,
)

METHOD = "compressed-tensors"

# Bits that can be read, by format and type of number.
_BITS: dict[tuple[Any, Any], tuple[int, ...]] = {
    ("pack-quantized", "int"): (4, 8),
    ("int-quantized", "int"): (8,),
    ("naive-quantized", "int"): (8,),
    ("float-quantized", "float"): (8,),
    ("naive-quantized", "float"): (8,),
}
_FORMATS = sorted({name for name, _ in _BITS})
REMEDY = "observe the checkpoint that it was made from, and apply the plan to this one"

# Types of the fields that are looked at; which values can be read is decided one by one.
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
    """What a configuration says of all its quantised matrices together; tensors say the rest.

    Attributes:
        bits: of a packed integer; None where nothing is packed.
        groups: elements of a row that share a scale; None: all of them.
        block: rows and columns that share a scale, where blocks do.
        zeros: whether matrices have zero points: of some, True; of some, False.
    """

    bits: int | None
    groups: frozenset[int | None]
    block: tuple[int, int] | None
    zeros: frozenset[bool]


def is_compressed(quantization: Mapping[str, Any] | None) -> bool:
    """Whether compressed-tensors stored a checkpoint of this `quantization_config`."""
    return quantization is not None and quantization.get("quant_method") == METHOD


def read_scheme(quantization: Mapping[str, Any], where: str) -> Scheme:
    """The scheme of a `quantization_config`; `where` begins messages.

    Raises:
        UnsupportedModel: names the first field whose value cannot be read.
        CheckpointError: a field is of a type it never has.
    """
    _check_whole(quantization, where)
    found = list(_weights(quantization, where))
    if not found:
        _refuse(f"{where}: no group of config_groups has weights", "one")
    bits = {w["num_bits"] for _, w, name in found if name == "pack-quantized"}
    if len(bits) > 1:
        _refuse(f"{where}: groups of config_groups pack {sorted(bits)} bits", "one number of bits")
    blocks = {_block(field, w) for field, w, _ in found if w.get("block_structure")}
    if len(blocks) > 1:
        _refuse(f"{where}: groups of config_groups have blocks {sorted(blocks)}", "one size")
    sizes = (w.get("group_size") for _, w, _ in found if not w.get("block_structure"))
    groups = frozenset(size if size and size > 0 else None for size in sizes)
    zeros = frozenset(not w.get("symmetric", True) for _, w, _ in found)
    return Scheme(next(iter(bits), None), groups, next(iter(blocks), None), zeros)


def _check_whole(quantization: Mapping[str, Any], where: str) -> None:
    """Fields that concern the checkpoint as a whole."""
    _check_types(dict(quantization), _SETTINGS, where)
    status = quantization.get("quantization_status", "compressed")
    if status != "compressed":
        _refuse(f"{where}.quantization_status is {status!r}", "'compressed'")
    sparsity = (quantization.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        _refuse(f"{where}.sparsity_config.format is {sparsity!r}", "'dense'")
    transforms = (quantization.get("transform_config") or {}).get("config_groups")
    if transforms:  # some act on activations, which a plain model does not do
        _refuse(f"{where}.transform_config has {sorted(transforms)}", "none")


def _weights(
    quantization: Mapping[str, Any], where: str
) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Each group's weights: the field they are in, what it says, and their format; all checked."""
    groups = quantization.get("config_groups") or {}
    for name, group in groups.items():
        field = f"{where}.config_groups.{name}"
        if not isinstance(group, Mapping):
            _refuse(f"{field} is {group!r}", "a group written out")
        _check_types(group, _GROUP, field)
        weights = group.get("weights")
        if weights is None:
            continue
        stored = group.get("format") or quantization.get("format")
        kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
        known = _BITS.get((stored, kind))
        if known is None:
            _refuse(
                f"{field} has format {stored!r} and weights.type {kind!r}",
                f"{', '.join(_FORMATS)} with their own type",
            )
        if bits not in known:
            _refuse(f"{field}.weights.num_bits is {bits}", " or ".join(map(str, known)))
        _check_layout(weights, kind, f"{field}.weights")
        yield f"{field}.weights", weights, str(stored)


def _check_layout(weights: Mapping[str, Any], kind: str, field: str) -> None:
    """How scales and zero points lie."""
    strategy, order = weights.get("strategy"), weights.get("actorder")
    if strategy not in (None, "tensor", "channel", "group", "block"):
        _refuse(f"{field}.strategy is {strategy!r}", "tensor, channel, group or block")
    if order not in (None, False, "weight", "static"):  # those leave the columns in their order
        _refuse(f"{field}.actorder is {order!r}", "none, 'weight' or 'static'")
    if kind == "float" and not weights.get("symmetric", True):
        _refuse(f"{field}.symmetric is False for floats", "True")


def _block(field: str, weights: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block."""
    block = weights["block_structure"]
    pair = isinstance(block, list) and len(block) == 2
    if not (pair and all(type(n) is int and n > 0 for n in block)):
        _refuse(f"{field}.block_structure is {block!r}", "a list of two sizes")
    return block[0], block[1]


def _check_types(value: Any, kind: Kind, where: str) -> None:
    """Raises for a value of another kind; `where` is the checkpoint and the field it is in."""
    try:
        check(value, kind)
    except Mismatch as error:
        raise CheckpointError(
            f"{where}: {error}; restore config.json from where the checkpoint was published"
        ) from error


def _refuse(what: str, readable: str) -> NoReturn:
    raise UnsupportedModel(f"{what}; {readable} can be read: {REMEDY}")
