"""Reads the settings of GPTQ, AWQ and AutoRound and refuses what cannot be dequantized.

Which modules are quantized is said twice, by the settings and by the tensors. A module that has a
`qweight` and that the settings except is an error. One whose weight is not quantized is read as it
is, whatever the settings say.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

from reap_driver.files.quantization import AUTO_ROUND_FORMATS
from reap_driver.files.settings_checks import check_flag, check_types, pattern, refuse
from reap_kernels.errors import CheckpointError
from reap_kernels.schema import Anything, Flag, Int, ListOf, MapOf, OrNull, Record, Text, short

METHODS = ("gptq", "awq", "auto-round")

Layout = Literal["gptq", "awq"]
# How a zero point z is stored: as z; as z - 1, which AutoRound reads as stored + 1; or GPTQModel's
# z - 1, subtracted from whole words (3 bits: modulo 8), so that a code may borrow from the next.
Zeros = Literal["z", "z - 1", "words - 1"]

_TEXT = OrNull(Text())
_MODULE = Record(
    optional={
        "bits": Int(1, 64),
        "group_size": Int(-1, 2**20),
        "sym": OrNull(Flag()),
        "desc_act": OrNull(Flag()),
        "format": _TEXT,
        "checkpoint_format": _TEXT,
        "data_type": _TEXT,
        "act_bits": OrNull(Int(1, 64)),
    },
    open=True,
)
_WHOLE = Record(
    optional={
        **_MODULE.optional,
        "version": _TEXT,
        "packing_format": _TEXT,
        "provider": _TEXT,
        "backend": _TEXT,
        "meta": OrNull(MapOf(Anything())),
        "dynamic": OrNull(MapOf(MapOf(Anything()))),
        "extra_config": OrNull(MapOf(OrNull(MapOf(Anything())))),
        "modules_to_not_convert": OrNull(ListOf(Text())),
        "modules_in_block_to_quantize": OrNull(ListOf(Anything())),
    },
    open=True,
)
# Fields that say that more was done to weights than to round them.
_CHANGES = (
    "adapter",
    "is_marlin_format",
    "rotated",
    "rotation",
    "rotation_config",
    "spinquant_config",
    "super_bits",
)
# AutoAWQ's older names of fields.
_OLDER = {"w_bit": "bits", "q_group_size": "group_size"}
_BITS = {"gptq": (2, 3, 4, 8), "awq": (4,), "auto-round": (2, 3, 4, 5, 6, 7, 8)}
_FULL = 16  # bits from which AutoRound leaves a module unquantized
# Values of AutoRound's `packing_format` that store zero points as they are.
_AS_IS = ("auto_round", "auto_round:gptqmodel")
# GPTQModel writes asymmetric zero points of GPTQ since the first, those of 3 bits since the second.
_ASYMMETRIC, _THREE_BITS = (0, 9), (7, 0)
_ONE = "use the config.json and weights of one and the same checkpoint"


@dataclass(frozen=True)
class Packing:
    """How a matrix is packed.

    Attributes:
        bits: bits per code.
        group: inputs that share a scale and a zero point; None for all of them.
        layout: "gptq" for codes packed along the inputs; "awq" along the outputs, interleaved.
        zeros: how zero points are stored.
        ordered: whether the groups of inputs were chosen (act-order), so that `g_idx` is needed.
    """

    bits: int
    group: int | None
    layout: Layout
    zeros: Zeros
    ordered: bool = False


@dataclass(frozen=True)
class _Rule:
    """Settings of some modules.

    Attributes:
        field: where it was found, for error messages.
        names: whether it is for the module of this name.
        packing: how they are packed; None if they are not quantized.
    """

    field: str
    names: Callable[[str], object]
    packing: Packing | None


@dataclass(frozen=True)
class Scheme:
    """How each matrix is packed: by the first rule for it, else by `default`."""

    default: Packing
    rules: tuple[_Rule, ...]

    def of(self, module: str, name: str) -> Packing:
        """The packing of a module that has a `qweight`; `name` is for error messages.

        Raises:
            CheckpointError: by the settings, the module is not quantized.
        """
        rule = next((rule for rule in self.rules if rule.names(module)), None)
        if rule is None:
            return self.default
        if rule.packing is None:
            raise CheckpointError(
                f"{name} has a qweight, but {rule.field} excepts it from quantization; {_ONE}"
            )
        return rule.packing


def read_scheme(method: str, settings: Mapping[str, Any], modules: Set[str], where: str) -> Scheme:
    """The scheme of a quantizer's settings; error messages begin with `where`.

    Args:
        method: one of `METHODS`.
        settings: as written.
        modules: names of the modules that have tensors.
        where: names the checkpoint and the settings.

    Raises:
        UnsupportedModel: a field has a value that is not supported; names the first such field.
        CheckpointError: a field is missing or has a value of the wrong type.
    """
    settings = {_OLDER.get(field, field): value for field, value in settings.items()}
    check_types(settings, _WHOLE, where)
    default = _packing(method, settings, where)
    rules = list(_overrides(method, settings, modules, where))
    rules += [
        _Rule(f"{where}.modules_to_not_convert", _inside(name), None)
        for name in settings.get("modules_to_not_convert") or ()
    ]
    listed = _listed(settings, where)
    if listed:
        field = f"{where}.modules_in_block_to_quantize"
        rules.append(_Rule(field, lambda module: _absent(module, listed), None))
    return Scheme(default, tuple(rules))


def _overrides(
    method: str, settings: Mapping[str, Any], modules: Set[str], where: str
) -> Iterator[_Rule]:
    """The rules for single modules: GPTQModel's `dynamic`, and AutoRound's `extra_config`."""
    for text, fields in (settings.get("dynamic") or {}).items():
        field = f"{where}.dynamic[{short(text)}]"
        excepted, name = text.startswith("-:"), re.sub(r"^[-+]:", "", text)
        packing = None if excepted else _override(method, settings, fields, field)
        yield _Rule(field, pattern(name, field).match, packing)
    extra = settings.get("extra_config") or {}
    # Names of modules come first; the others are regular expressions.
    for name in sorted(extra, key=lambda name: name not in modules):
        field = f"{where}.extra_config[{short(name)}]"
        packing = _override(method, settings, extra[name] or {}, field)
        if extra[name]:
            exact = re.compile(re.escape(name) + r"\Z").match
            yield _Rule(field, exact if name in modules else pattern(name, field).search, packing)


def _override(
    method: str, settings: Mapping[str, Any], fields: Mapping[str, Any], where: str
) -> Packing | None:
    check_types(dict(fields), _MODULE, where)
    if fields.get("bits", 0) >= _FULL:
        return None
    return _packing(method, {**settings, **fields}, where)


def _packing(method: str, settings: Mapping[str, Any], where: str) -> Packing:
    """The packing that settings describe."""
    for field in ("bits", "group_size"):
        if field not in settings:
            raise CheckpointError(
                f"{where}.{field} is missing; restore config.json from where the checkpoint was "
                "published"
            )
    for field in _CHANGES:
        check_flag(settings, field, where)
    if settings.get("pack_dtype") not in (None, "int32", "torch.int32"):
        refuse(f"{where}.pack_dtype is {short(settings['pack_dtype'])}", "'int32'")
    bits, group = settings["bits"], settings["group_size"]
    if group == 0:
        refuse(f"{where}.group_size is 0", "-1 (whole rows) or a number of inputs")
    find = {"gptq": _gptq, "awq": _awq, "auto-round": _auto_round}[method]
    layout, zeros = find(settings, where)
    readable = _BITS["awq" if layout == "awq" else method]
    if bits not in readable:
        refuse(f"{where}.bits is {bits}", " or ".join(map(str, readable)))
    ordered = method == "gptq" and bool(settings.get("desc_act"))
    return Packing(bits, None if group == -1 else group, layout, zeros, ordered)


def _gptq(settings: Mapping[str, Any], where: str) -> tuple[Layout, Zeros]:
    stated = _format(settings, ("checkpoint_format", "format"), ("gptq", "gptq_v2"), where)
    if stated == "gptq_v2":
        return "gptq", "z"
    if settings.get("provider") == "auto-round":
        return "gptq", "z - 1"
    version = _gptqmodel(settings)
    symmetric = settings.get("sym", True) is not False
    if not symmetric and (version is None or version < _ASYMMETRIC):
        refuse(
            f"{where} has sym false and the format 'gptq', in which programs before GPTQModel 0.9 "
            "store zero points ambiguously",
            "sym true, 'gptq_v2', or meta.quantizer that names such a version of gptqmodel",
        )
    if settings["bits"] == 3 and version is not None and version < _THREE_BITS:
        refuse(
            f"{where}.meta.quantizer says gptqmodel {version[0]}.{version[1]}, which stores zero "
            "points of 3 bits in words of its own",
            "'gptq_v2', or 3 bits from gptqmodel 7.0 on,",
        )
    return "gptq", "words - 1"


def _awq(settings: Mapping[str, Any], where: str) -> tuple[Layout, Zeros]:
    if settings.get("backend") == "llm-awq":
        refuse(f"{where}.backend is 'llm-awq'", "the layout of AutoAWQ")
    _format(settings, ("version", "checkpoint_format", "format"), ("gemm",), where)
    return "awq", "z"


def _auto_round(settings: Mapping[str, Any], where: str) -> tuple[Layout, Zeros]:
    kind = settings.get("data_type")
    if kind not in (None, "int", "int_sym", "int_asym"):
        refuse(f"{where}.data_type is {short(kind)}", "'int'")
    activations = settings.get("act_bits")
    if activations is not None and activations < _FULL:
        refuse(f"{where}.act_bits is {activations}", f"{_FULL} or none")
    # Files before AutoRound 0.4 name it `backend`, with the kernels that were to run.
    name = "packing_format" if settings.get("packing_format") else "backend"
    stated = (settings.get(name) or "auto").lower()
    if name == "backend":
        stated = ":".join(stated.split(":")[:2])
    layout = AUTO_ROUND_FORMATS.get(stated)
    if layout is None:
        refuse(f"{where}.{name} is {short(stated)}", ", ".join(map(repr, AUTO_ROUND_FORMATS)))
    if layout == "awq":
        return "awq", "z"
    return "gptq", "z" if stated in _AS_IS else "z - 1"


def _format(
    settings: Mapping[str, Any], fields: tuple[str, ...], readable: tuple[str, ...], where: str
) -> str:
    """The format that fields state; the first readable one if none does."""
    stated = {field: settings[field].lower() for field in fields if settings.get(field)}
    for field, value in stated.items():
        if value not in readable:
            refuse(f"{where}.{field} is {short(value)}", " or ".join(map(repr, readable)))
    if len(set(stated.values())) > 1:
        refuse(f"{where} has {stated}", "fields that agree")
    return next(iter(stated.values()), readable[0])


def _gptqmodel(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """The version of GPTQModel that `meta.quantizer` names, major and minor."""
    named = (settings.get("meta") or {}).get("quantizer")
    for text in named if isinstance(named, list) else [named]:
        found = re.match(r"gptqmodel:(\d{1,9})\.(\d{1,9})", str(text).lower())
        if found is not None:
            return int(found[1]), int(found[2])
    return None


def _listed(settings: Mapping[str, Any], where: str) -> frozenset[str]:
    """Names in `modules_in_block_to_quantize`: a list of lists, or one list."""
    names: list[Any] = []
    for found in settings.get("modules_in_block_to_quantize") or ():
        names += found if isinstance(found, list) else [found]
    check_types(names, ListOf(Text()), f"{where}.modules_in_block_to_quantize")
    return frozenset(names)


def _inside(name: str) -> Callable[[str], bool]:
    """Whether a module has this name, ends with it, or is inside one of this name."""
    return lambda module: f".{module}".endswith(f".{name}") or module.startswith(f"{name}.")


def _absent(module: str, listed: Set[str]) -> bool:
    """Whether a module of a layer is not in a list of names, whole or relative to its layer."""
    parts = module.split(".")
    ends = {".".join(parts[start:]) for start in range(len(parts))}
    return any(part.isdigit() for part in parts) and not ends & listed
