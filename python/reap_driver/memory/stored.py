"""What a checkpoint takes on disk: exact from its headers or its index, else estimated."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from reap_driver.files.checkpoint import INDEX_NAME, SINGLE_NAME, open_checkpoint, read_json
from reap_driver.files.safetensors_file import TensorEntry
from reap_driver.memory.model_sizes import tensor_bytes
from reap_kernels.errors import CheckpointError, DataError

# Dtypes a checkpoint's plain weights come in, by their names in a safetensors header.
_FLOATS = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Stored:
    """Bytes of a checkpoint's tensors, multi-token-prediction layers included where they are known.

    Attributes:
        nbytes: of all tensors.
        origin: "headers" of the files, "index" where only that is there, or "estimated" from the
            configuration.
        format: how most weights are stored, such as "bfloat16" or "fp8".
        largest_file: of the files with weights; None where there is none.
        dtype: the first plain dtype in the files; None where there is none.
        tensors: of the headers; None where there are none.
    """

    nbytes: int
    origin: str
    format: str
    largest_file: Path | None = None
    dtype: torch.dtype | None = None
    tensors: Mapping[str, TensorEntry] | None = None


def stored_files(folder: Path, config: PretrainedConfig) -> Stored | None:
    """What the files of a checkpoint folder say; None where there are neither weights nor index.

    Raises:
        CheckpointError: files that are missing though others are there, damaged, or inconsistent.
    """
    index = folder / INDEX_NAME
    there = any(folder.glob("*.safetensors"))
    if not there and index.is_file():
        metadata = read_json(index, "restore the file").get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if isinstance(total, int):
            return Stored(total, "index", _format_name(config, None))
    if not there or not (index.is_file() or (folder / SINGLE_NAME).is_file()):
        return None
    source = open_checkpoint(folder)
    kinds = [entry.dtype for shard in source.shards for entry in shard.tensors.values()]
    dtype = next((_FLOATS[kind] for kind in kinds if kind in _FLOATS), None)
    largest = max(source.shards, key=lambda shard: shard.size)
    name = _format_name(config, dtype)
    return Stored(source.nbytes, "headers", name, largest.path, dtype, source.tensors)


def run_dtype(asked: str, config: PretrainedConfig, files: Stored | None) -> torch.dtype:
    """The dtype the model gets in memory, by the rules of `from_pretrained`.

    Args:
        asked: "auto" or the name of one.
        config: the model's.
        files: what the checkpoint's files say, None where there are none.

    Raises:
        DataError: nothing says.
    """
    if asked != "auto":
        chosen: torch.dtype = getattr(torch, asked)
        return chosen
    named = _config_dtype(config)
    # Only a plan without weights looks below the main configuration; loading looks at the weights.
    nested = _config_dtype(config.get_text_config()) if files is None else None
    found = named or (files.dtype if files is not None else nested)
    if found is None:
        raise DataError(
            f"--dtype auto: the configuration ({config.model_type}) names no dtype, and there are "
            "no weights that would show one; give --dtype bfloat16"
        )
    return found


def estimated(model: PreTrainedModel, config: PretrainedConfig, dtype: torch.dtype) -> Stored:
    """What the model would take in its published format, multi-token-prediction layers left out.

    Args:
        model: on the meta device.
        config: its configuration; `quantization_config` says how it is stored.
        dtype: of what is not quantised, where the configuration does not say.

    Raises:
        CheckpointError: a quantisation whose sizes are not known.
    """
    plain = _config_dtype(config) or _config_dtype(config.get_text_config()) or dtype
    model.tie_weights()  # a model built on meta is not yet
    sizes = dict(tensor_bytes(model, plain, stored=True))
    quantisation = _quantisation(config)
    if quantisation is not None:
        scheme = _scheme(quantisation)
        ignored = _ignored(quantisation)
        for name, tensor in _matrices(model, experts_only=scheme.experts_only):
            module = name.rpartition(".")[0] if name.endswith(".weight") else name
            if not any(pattern.search(module) for pattern in ignored):
                sizes[name] = scheme.nbytes(tensor)
    return Stored(sum(sizes.values()), "estimated", _format_name(config, plain))


@dataclass(frozen=True)
class _Scheme:
    """Numbers of `bits`, and a scale of `scale_bits` for each block of rows x columns.

    A block dimension of 0 is all of the matrix's.
    """

    bits: int
    block: tuple[int, int]
    scale_bits: int
    experts_only: bool = False

    def nbytes(self, tensor: Tensor) -> int:
        """Of one matrix, or of a stack of them."""
        *stack, rows, columns = tensor.shape
        height, width = self.block
        blocks = math.ceil(rows / (height or rows)) * math.ceil(columns / (width or columns))
        return math.prod(stack) * (rows * columns * self.bits + blocks * self.scale_bits) // 8


def _scheme(quantisation: Mapping[str, Any]) -> _Scheme:
    """The sizes of a quantisation format."""
    method = _method(quantisation)
    if method == "fp8":  # scales are float32, whatever values they may take
        height, width = quantisation.get("weight_block_size") or (0, 0)
        return _Scheme(8, (height, width), 32)
    if method == "mxfp4":  # OCP Microscaling: 32 numbers of 4 bits share a power of two
        return _Scheme(4, (1, 32), 8, experts_only=True)
    groups = quantisation.get("config_groups")
    if method == "compressed-tensors" and isinstance(groups, dict) and len(groups) == 1:
        weights = next(iter(groups.values())).get("weights") or {}
        bits, size = weights.get("num_bits"), weights.get("group_size")
        block = weights.get("block_structure")
        if isinstance(bits, int):
            shape = tuple(block) if isinstance(block, list) else (1, size or 0)
            zero = 0 if weights.get("symmetric", True) else bits
            return _Scheme(bits, (shape[0], shape[1]), 16 + zero)
    raise CheckpointError(
        f"quantization_config of method {method!r}: how many bytes its weights take is not known "
        "without them (known: fp8, mxfp4, compressed-tensors with one group); give the folder that "
        "holds the weights"
    )


def _ignored(quantisation: Mapping[str, Any]) -> list[re.Pattern[str]]:
    """Modules that stay as they are: names or parts of names, `*` for any text, `re:` patterns."""
    names = [
        *(quantisation.get("modules_to_not_convert") or ()),
        *(quantisation.get("ignore") or ()),
    ]
    try:
        return [
            re.compile("^" + name[3:] if name.startswith("re:") else _glob(name)) for name in names
        ]
    except re.error as error:
        raise CheckpointError(
            f"quantization_config of config.json: a pattern of modules cannot be read ({error}); "
            "restore the file"
        ) from error


def _glob(name: str) -> str:
    """A dotted name with stars as a pattern that whole parts must match."""
    return r"(^|\.)" + re.escape(name).replace(r"\*", ".*") + r"(\.|$)"


def _matrices(model: PreTrainedModel, *, experts_only: bool) -> list[tuple[str, Tensor]]:
    """Weights of linear layers, the head's apart, and of experts: what quantisers convert."""
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
    quantisation = _quantisation(config)
    named = _config_dtype(config) or dtype
    if quantisation is not None:
        return _method(quantisation)
    return "unknown" if named is None else str(named).removeprefix("torch.")


def _quantisation(config: PretrainedConfig) -> Mapping[str, Any] | None:
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(), "quantization_config", None)
    if found is None or isinstance(found, dict):
        return found
    described: dict[str, Any] = found.to_dict()
    return described


def _method(quantisation: Mapping[str, Any]) -> str:
    method = quantisation.get("quant_method")
    return str(getattr(method, "value", method))


def _config_dtype(config: PretrainedConfig) -> torch.dtype | None:
    found = getattr(config, "dtype", None)
    return getattr(torch, found) if isinstance(found, str) else found
