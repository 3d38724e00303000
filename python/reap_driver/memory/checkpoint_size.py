"""Size of a checkpoint on disk: exact from file headers or the index, else estimated."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from reap_driver.files import packed_scheme
from reap_driver.files.checkpoint import INDEX_NAME, SINGLE_NAME, open_checkpoint, read_json
from reap_driver.files.safetensors_file import TensorEntry
from reap_driver.memory.model_sizes import tensor_bytes
from reap_kernels.errors import CheckpointError, DataError

# Dtypes of unquantized weights, by their names in a safetensors header.
_FLOATS = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}

# Methods whose `config_groups` give the bits.
_GROUPED = ("compressed-tensors", "modelopt")


@dataclass(frozen=True)
class CheckpointSize:
    """Size of a checkpoint, its multi-token-prediction layers included if they are known.

    Attributes:
        nbytes: bytes of all tensors.
        origin: "headers" of the files, "index" if only the index exists, or "estimated" from the
            configuration.
        format: the format of most weights, such as "bfloat16" or "fp8".
        largest_file: the largest file of weights; None if there is none.
        dtype: the first floating-point dtype in the files; None if there is none.
        tensors: the entries of the headers; None without files.
        file_bytes: bytes of the weight files, headers included; None without files.
    """

    nbytes: int
    origin: str
    format: str
    largest_file: Path | None = None
    dtype: torch.dtype | None = None
    tensors: Mapping[str, TensorEntry] | None = None
    file_bytes: int | None = None


def stored_files(folder: Path, config: PretrainedConfig) -> CheckpointSize | None:
    """Size of the checkpoint in a folder; None if it has neither weights nor an index.

    Raises:
        CheckpointError: some files are missing, damaged, or inconsistent.
    """
    index = folder / INDEX_NAME
    there = any(folder.glob("*.safetensors"))
    if not there and index.is_file():
        metadata = read_json(index, "restore the file").get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if isinstance(total, int):
            return CheckpointSize(total, "index", _format_name(config, None))
    if not there or not (index.is_file() or (folder / SINGLE_NAME).is_file()):
        return None
    source = open_checkpoint(folder)
    kinds = [entry.dtype for shard in source.shards for entry in shard.tensors.values()]
    dtype = next((_FLOATS[kind] for kind in kinds if kind in _FLOATS), None)
    largest = max(source.shards, key=lambda shard: shard.size)
    name = _format_name(config, dtype)
    whole = sum(shard.size for shard in source.shards)
    found = (source.nbytes, "headers", name, largest.path, dtype, source.tensors, whole)
    return CheckpointSize(*found)


def run_dtype(asked: str, config: PretrainedConfig, files: CheckpointSize | None) -> torch.dtype:
    """The dtype of the model in memory, by the rules of `from_pretrained`.

    Args:
        asked: "auto" or the name of a torch dtype.
        config: configuration of the model.
        files: size and dtype of the checkpoint's files; None if there are none.

    Raises:
        DataError: neither the configuration nor the files name a dtype.
    """
    if asked != "auto":
        chosen: torch.dtype = getattr(torch, asked)
        return chosen
    named = _config_dtype(config)
    # Without weights, look at the text configuration too; loading looks at the weights instead.
    nested = _config_dtype(config.get_text_config()) if files is None else None
    found = named or (files.dtype if files is not None else nested)
    if found is None:
        raise DataError(
            f"`dtype='auto'`: the configuration ({config.model_type}) names no dtype, and there "
            "are no weights to read it from; give `dtype='bfloat16'`"
        )
    return found


def estimated(
    model: PreTrainedModel, config: PretrainedConfig, dtype: torch.dtype
) -> CheckpointSize:
    """Estimated size in the published format, without multi-token-prediction layers.

    Args:
        model: the model, on the meta device.
        config: its configuration; `quantization_config` gives the format.
        dtype: dtype of unquantized weights, if the configuration names none.

    Raises:
        CheckpointError: a quantization method whose sizes are not known.
    """
    plain = _config_dtype(config) or _config_dtype(config.get_text_config()) or dtype
    model.tie_weights()  # a model built on meta is not yet
    sizes = dict(tensor_bytes(model, plain, stored=True))
    quantization = _quantization(config)
    if quantization is not None:
        scheme = _scheme(quantization)
        ignored = _ignored(quantization)
        for name, tensor in _matrices(model, experts_only=scheme.experts_only):
            module = name.rpartition(".")[0] if name.endswith(".weight") else name
            if not any(pattern.search(module) for pattern in ignored):
                sizes[name] = scheme.nbytes(tensor)
    return CheckpointSize(sum(sizes.values()), "estimated", _format_name(config, plain))


@dataclass(frozen=True)
class _Scheme:
    """A quantization format: values of `bits`, and `scale_bits` per block of rows x columns.

    A block dimension of 0 covers the whole matrix in that dimension.
    """

    bits: int
    block: tuple[int, int]
    scale_bits: int
    experts_only: bool = False

    def nbytes(self, tensor: Tensor) -> int:
        """Bytes of a matrix, or of a stack of matrices."""
        *stack, rows, columns = tensor.shape
        height, width = self.block
        blocks = math.ceil(rows / (height or rows)) * math.ceil(columns / (width or columns))
        return math.prod(stack) * (rows * columns * self.bits + blocks * self.scale_bits) // 8


def _scheme(quantization: Mapping[str, Any]) -> _Scheme:
    """The format that a quantization config describes."""
    method = _method(quantization)
    if method == "fp8":  # scales are stored as float32, also those that are powers of two
        height, width = quantization.get("weight_block_size") or (0, 0)
        return _Scheme(8, (height, width), 32)
    if method == "mxfp4":  # OCP Microscaling: 32 values of 4 bits share a power of two
        return _Scheme(4, (1, 32), 8, experts_only=True)
    groups = quantization.get("config_groups")
    if method in _GROUPED and isinstance(groups, dict) and len(groups) == 1:
        weights = next(iter(groups.values())).get("weights") or {}
        bits, size = weights.get("num_bits"), weights.get("group_size")
        block = weights.get("block_structure")
        if isinstance(bits, int):
            shape = tuple(block) if isinstance(block, list) else (1, size or 0)
            zero = 0 if weights.get("symmetric", True) else bits
            nvfp4 = (bits, weights.get("type")) == (4, "float")  # whose scales are 8-bit floats
            return _Scheme(bits, (shape[0], shape[1]), (8 if nvfp4 else 16) + zero)
    by_module = [field for field in ("dynamic", "extra_config") if quantization.get(field)]
    if method in packed_scheme.METHODS and not by_module:
        packing = packed_scheme.read_scheme(
            method, quantization, frozenset(), "quantization_config of config.json"
        ).default
        return _Scheme(packing.bits, (1, packing.group or 0), 16 + packing.bits)
    settings = " with ".join([repr(method), *by_module])
    raise CheckpointError(
        f"quantization_config of method {settings}: "
        "the size of its weights can only be read from the files (it can be estimated for fp8, "
        "mxfp4, compressed-tensors and modelopt with one group, and gptq, awq and auto-round with "
        "the same bits everywhere); give the folder that holds the weights"
    )


def _ignored(quantization: Mapping[str, Any]) -> list[re.Pattern[str]]:
    """Patterns of unquantized modules: names or parts of names, `*` for any text, or `re:...`."""
    names = [
        *(quantization.get("modules_to_not_convert") or ()),
        *(quantization.get("ignore") or ()),
    ]
    try:
        return [
            re.compile("^" + name[3:] if name.startswith("re:") else _glob(name)) for name in names
        ]
    except re.error as error:
        raise CheckpointError(
            f"quantization_config of config.json: invalid regular expression for modules "
            f"({error}); restore the file"
        ) from error


def _glob(name: str) -> str:
    """A regular expression for a dotted name with stars, which matches whole components."""
    return r"(^|\.)" + re.escape(name).replace(r"\*", ".*") + r"(\.|$)"


def _matrices(model: PreTrainedModel, *, experts_only: bool) -> list[tuple[str, Tensor]]:
    """The weights that quantization converts: linear layers except the head, and experts."""
    head = model.get_output_embeddings()
    linear = {
        name + ".weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return [
        (name, tensor)
        for name, tensor in model.named_parameters()
        if (tensor.ndim == 3 and not name.endswith("bias") and ".experts." in name)
        or (name in linear and (".experts." in name or not experts_only))
    ]


def _format_name(config: PretrainedConfig, dtype: torch.dtype | None) -> str:
    quantization = _quantization(config)
    named = _config_dtype(config) or dtype
    if quantization is not None:
        return _method(quantization)
    return "unknown" if named is None else str(named).removeprefix("torch.")


def _quantization(config: PretrainedConfig) -> Mapping[str, Any] | None:
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(), "quantization_config", None)
    if found is None or isinstance(found, dict):
        return found
    described: dict[str, Any] = found.to_dict()
    return described


def _method(quantization: Mapping[str, Any]) -> str:
    method = quantization.get("quant_method")
    return str(getattr(method, "value", method))


def _config_dtype(config: PretrainedConfig) -> torch.dtype | None:
    found = getattr(config, "dtype", None)
    return getattr(torch, found) if isinstance(found, str) else found
