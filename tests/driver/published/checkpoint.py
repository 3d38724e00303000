"""Random checkpoints in the layout their publishers use: names, FP8 and MXFP4, MTP layers, shards.

The model is built from the small configuration; its tensors get their published names from
save_pretrained's own conversion or from the model's table, are quantized, and written in shards.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion

from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import model_class
from tests.driver.published.entry import Published
from tests.driver.published.models import MODELS
from tests.driver.published.reduce import VOCAB, small_config

State = dict[str, torch.Tensor]

# What the publishers of block-scaled FP8 checkpoints leave in bfloat16 or float32.
_NOT_FP8 = re.compile(r"embed_tokens|lm_head|shared_head|eh_proj|\.gate\.|weights_proj|norm")
_FP8_BLOCK = 128
_FP8_MAX = 448.0
_MXFP4_BLOCK = 32


def write_checkpoint(
    name: str, folder: Path, *, seed: int = 0, shards: int = 3, plain: bool = False
) -> Path:
    """Write the small random checkpoint of a published model into a new `folder`; return it.

    Args:
        name: of `MODELS`.
        folder: to write, with its tokenizer.
        seed: of the tensors.
        shards: how many.
        plain: every tensor in float32 and nothing quantized, whatever the publisher does.
    """
    return write_small(
        MODELS[name], small_config(name), folder, seed=seed, shards=shards, plain=plain
    )


def write_small(
    entry: Published,
    config: Mapping[str, Any],
    folder: Path,
    *,
    seed: int = 0,
    shards: int = 3,
    plain: bool = False,
    zeroed: str = "",
) -> Path:
    """As `write_checkpoint`, of any small configuration, under the names of `entry`.

    Args:
        entry: how the publisher names and stores tensors.
        config: the content of `config.json`.
        folder: as `write_checkpoint`, as `seed`, `shards` and `plain` are.
        zeroed: regular expression of tensors that are zero; of none if empty.
    """
    config = dict(config)
    if plain:
        entry = dataclasses.replace(entry, quantized=None, float32="")
        config = {k: v for k, v in config.items() if k != "quantization_config"}
        config["torch_dtype"] = "float32"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(folder)
    generator = torch.Generator().manual_seed(seed)
    state = _published_state(_build(folder), entry, generator)
    if entry.mtp is not None:
        state |= _mtp_state(state, entry, config, generator)
    state = {key: _published_dtype(key, tensor, entry) for key, tensor in state.items()}
    for key in state:
        if zeroed and re.search(zeroed, key):
            state[key].zero_()
    if entry.quantized == "fp8":
        power_of_two = config["quantization_config"].get("scale_fmt") == "ue8m0"
        state = _to_fp8(state, power_of_two=power_of_two)
    elif entry.quantized == "mxfp4":
        state = _to_mxfp4(state, entry, generator)
    _write_shards(state, folder, shards)
    return folder


def write_tokenizer(
    folder: Path, *, special: Sequence[str] = (), merges: Sequence[tuple[str, str]] = ()
) -> None:
    """Write a byte-level tokenizer for the small vocabulary: three special tokens, 256 bytes, then
    more special tokens and merges, if any.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<bos>", "<eos>", *alphabet, *special, *map("".join, merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=list(special),
    ).save_pretrained(str(folder))


def is_mtp(key: str, entry: Published, config: dict[str, Any]) -> bool:
    """Whether a disk key belongs to a multi-token-prediction layer."""
    if entry.mtp is None:
        return False
    return any(
        key.startswith(prefix)
        for i in range(entry.mtp.count)
        for prefix in (_mtp_name(entry.mtp.block, config, i), *_mtp_extras(entry, config, i))
    )


def _build(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint's configuration in float32, as its class initializes it."""
    config = load_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    config.model_type = type(config).model_type  # kimi_k2 has no key conversion of its own
    torch.manual_seed(0)
    return model_class(config)._from_config(config, dtype=torch.float32)


def _published_state(model: PreTrainedModel, entry: Published, generator: torch.Generator) -> State:
    """Random tensors under published names: matrices of unit gain, vectors near their start."""
    tied = set(model.all_tied_weights_keys)
    state = {key: tensor for key, tensor in model.state_dict().items() if key not in tied}
    for tensor in state.values():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            matrix = tensor.ndim > 1 and tensor.shape[0] > 1  # ERNIE's correction bias is [1, E]
            tensor.copy_(noise / math.sqrt(tensor.shape[-1]) if matrix else tensor + 0.02 * noise)
    if entry.revert:
        state = revert_weight_conversion(model, state)
    renamed: State = {}
    for key, tensor in state.items():
        for pattern, halves in entry.splits.items():
            if re.search(pattern, key):
                parts = tensor.chunk(2, dim=1)
                renamed |= {
                    re.sub(pattern, half, key): part
                    for half, part in zip(halves, parts, strict=True)
                }
                break
        else:
            for pattern, replacement in entry.renames.items():
                key = re.sub(pattern, replacement, key)
            renamed[key] = tensor
    return renamed


def _mtp_state(
    state: State, entry: Published, config: dict[str, Any], generator: torch.Generator
) -> State:
    """The tensors of the MTP layers: new random tensors of a decoder layer, and their own."""
    assert entry.mtp is not None
    mtp: State = {}
    for i in range(entry.mtp.count):
        block = _mtp_name(entry.mtp.block, config, i)
        shapes = {
            block + key.removeprefix(entry.mtp.like): tensor.shape
            for key, tensor in state.items()
            if key.startswith(entry.mtp.like)
        }
        shapes |= _mtp_extras(entry, config, i)
        for key, shape in shapes.items():
            mtp[key] = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    return mtp


def _mtp_extras(entry: Published, config: dict[str, Any], i: int) -> dict[str, torch.Size]:
    """Names and shapes of what MTP layer `i` has beyond a decoder layer."""
    assert entry.mtp is not None
    hidden = config.get("text_config", config)["hidden_size"]
    sizes = {"H": hidden, "2H": 2 * hidden, "V": VOCAB}
    return {
        _mtp_name(name, config, i): torch.Size(sizes[symbol] for symbol in shape)
        for name, shape in entry.mtp.extras.items()
    }


def _mtp_name(template: str, config: dict[str, Any], i: int) -> str:
    """A disk name of MTP layer `i`."""
    return template.format(n=config.get("text_config", config)["num_hidden_layers"] + i, i=i)


def _published_dtype(key: str, tensor: torch.Tensor, entry: Published) -> torch.Tensor:
    """bfloat16, or float32 where the publisher keeps it; integer tensors as they are."""
    if not tensor.is_floating_point():
        return tensor.contiguous()
    return tensor.to(
        torch.float32 if re.search(entry.float32, key) else torch.bfloat16
    ).contiguous()


def _to_fp8(state: State, *, power_of_two: bool) -> State:
    """Matrices as float8_e4m3fn, with one float32 scale per 128 x 128 block in
    `.weight_scale_inv`.
    """
    quantized: State = {}
    for key, tensor in state.items():
        if not key.endswith(".weight") or tensor.ndim != 2 or _NOT_FP8.search(key):
            quantized[key] = tensor
            continue
        rows, columns = (math.ceil(size / _FP8_BLOCK) for size in tensor.shape)
        scale = torch.empty(rows, columns)
        stored = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        for row in range(rows):
            for column in range(columns):
                block = tuple(slice(at * _FP8_BLOCK, (at + 1) * _FP8_BLOCK) for at in (row, column))
                factor = tensor[block].float().abs().max() / _FP8_MAX
                scale[row, column] = 2 ** factor.log2().ceil() if power_of_two else factor
                stored[block] = (tensor[block].float() / scale[row, column]).to(stored.dtype)
        quantized[key] = stored
        quantized[key + "_scale_inv"] = scale
    return quantized


def _to_mxfp4(state: State, entry: Published, generator: torch.Generator) -> State:
    """Expert matrices [E, in, out] as random pairs [E, out, in/32, 16] and their exponents."""
    quantized: State = {}
    stems = {name.removesuffix("_blocks") for name in entry.stacked if name.endswith("_blocks")}
    for key, tensor in state.items():
        if not key.endswith(tuple(stems)):
            quantized[key] = tensor
            continue
        experts, width, out = tensor.shape
        grid = (experts, out, width // _MXFP4_BLOCK)
        quantized[key + "_blocks"] = torch.randint(
            0, 256, (*grid, _MXFP4_BLOCK // 2), generator=generator, dtype=torch.uint8
        )
        quantized[key + "_scales"] = torch.randint(
            121, 125, grid, generator=generator, dtype=torch.uint8
        )
    return quantized


def _write_shards(state: State, folder: Path, shards: int) -> None:
    """Safetensors shards of about equal size and their index."""
    total = sum(tensor.nbytes for tensor in state.values())
    groups: list[State] = [{} for _ in range(shards)]
    written = 0
    for key, tensor in state.items():
        groups[min(shards - 1, written * shards // total)][key] = tensor
        written += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file(group, str(folder / file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
