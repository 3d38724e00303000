"""Which quantizer wrote a checkpoint, according to its configuration files."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reap_driver.files.checkpoint import Checkpoint, read_json
from reap_driver.files.safetensors_file import TensorEntry
from reap_kernels.files import is_file

# Fields of config.json, at any depth, that hold a quantizer's settings.
SETTINGS_FIELDS = ("quantization_config", "compression_config", "quantization")
# Files beside config.json with a quantizer's settings -> the quantizer, unless the settings name
# it.
SETTINGS_FILES = {
    "quantization_config.json": "auto-round",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
REMEDY = "observe the checkpoint that it was quantized from, and apply the plan to this one"
# Dtypes of packed quantized values, whose tensors have other shapes than the model's.
PACKED = frozenset({"U8", "I8", "U16", "I16", "U32", "I32", "F4", "F6_E2M3", "F6_E3M2"})
# Values of `format` (older: `checkpoint_format`) with the packing that writer/layouts.py describes.
_GPTQ_FORMATS = frozenset({"gptq", "gptq_v2"})
# AutoRound's `packing_format` -> the packing.
AUTO_ROUND_FORMATS = {
    **dict.fromkeys(("auto", "auto_gptq", "auto_round:auto_gptq", "auto_round:gptq"), "gptq"),
    **dict.fromkeys(("auto_round", "auto_round:gptqmodel"), "gptq"),
    **dict.fromkeys(("auto_awq", "auto_round:auto_awq", "auto_round:awq"), "awq"),
}


@dataclass(frozen=True)
class Quantization:
    """A quantizer's settings.

    Attributes:
        method: `quant_method` in lower case; None if no file names it.
        settings: as written in the file.
        origin: where they are written, for error messages.
    """

    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    origin: str = "config.json"

    def is_behind(self, entries: Iterable[TensorEntry]) -> bool:
        """Whether tensors that do not fit the model may have been written by a quantizer: there are
        settings of one, or a tensor has a dtype that packs values.
        """
        found = self.method is not None or bool(self.settings)
        return found or any(entry.dtype in PACKED for entry in entries)

    @property
    def is_stated(self) -> bool:
        """Whether config.json names the method. Other settings may be left over from a quantized
        checkpoint, beside weights that are not quantized.
        """
        return self.method is not None and self.origin not in SETTINGS_FILES

    @property
    def packing(self) -> str | None:
        """The order in which `qweight` and `qzeros` hold their codes: "gptq" or "awq"; None if it
        is another one or unknown.
        """
        stated = self._text("checkpoint_format") or self._text("format")
        if self.method == "gptq":
            return "gptq" if stated is None or stated in _GPTQ_FORMATS else None
        if self.method == "awq":
            version = self._text("version") or stated
            return "awq" if version in (None, "gemm") else None
        if self.method is not None and "auto-round" in self.method:
            return AUTO_ROUND_FORMATS.get(self._text("packing_format") or "auto")
        return None

    @property
    def block(self) -> int | None:
        """Rows of the blocks that share a scale; None if the settings give no number, or
        several.
        """
        sizes = {_rows(self.settings.get("weight_block_size"))}
        groups = self.settings.get("config_groups")  # of compressed-tensors
        for group in groups.values() if isinstance(groups, dict) else ():
            weights = group.get("weights") if isinstance(group, dict) else None
            sizes.add(_rows(weights.get("block_structure")) if isinstance(weights, dict) else None)
        found = sizes - {None}
        return found.pop() if len(found) == 1 else None

    def __str__(self) -> str:
        if self.method is None:
            return f"{'its settings name' if self.settings else 'config.json names'} no quantizer"
        names = ("format", "checkpoint_format", "packing_format", "version", "quant_algo")
        stated = [f"{name} {self.settings[name]!r}" for name in names if name in self.settings]
        return ", ".join([f"quant_method is {self.method!r}", *stated])

    def _text(self, name: str) -> str | None:
        value = self.settings.get(name)
        return value.lower() if isinstance(value, str) else None


def quantization_of(source: Checkpoint) -> Quantization:
    """A checkpoint's quantizer, from config.json or else from a file beside it."""
    return quantization_in(source.folder, source.config)


def quantization_in(folder: Path, config: Mapping[str, Any]) -> Quantization:
    """The quantizer of the checkpoint in a folder, whose weights need not be there.

    Args:
        folder: where files beside config.json are looked for.
        config: config.json as written.
    """
    for path, settings in settings_in(config):
        return Quantization(method_of(settings, None), settings, f"{'.'.join(path)} of config.json")
    for name, method in SETTINGS_FILES.items():
        if is_file(folder / name):
            found = read_json(folder / name, "restore the file")
            inner = found.get("quantization")
            settings = inner if isinstance(inner, dict) else found
            return Quantization(method_of(settings, method), settings, name)
    return Quantization()


def settings_in(
    config: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """(path of the field, settings) of every quantizer in a configuration, at any depth."""
    for name, value in config.items():
        if not isinstance(value, dict):
            continue
        if name in SETTINGS_FIELDS:
            yield (*path, name), value
        else:
            yield from settings_in(value, (*path, name))


def _rows(block: Any) -> int | None:
    """The rows of a block [rows, columns]; None if it is not one."""
    rows = block[0] if isinstance(block, list) and block else None
    return rows if type(rows) is int and rows > 0 else None


def method_of(settings: Mapping[str, Any], default: str | None) -> str | None:
    """The method that a quantizer's settings name, in lower case; `default` if they name none.

    Example:
        >>> method_of({"quant_method": "gptq", "bits": 4}, None)
        'gptq'
    """
    found = settings.get("quant_method")
    if isinstance(found, str):
        return found.lower()
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    return default
