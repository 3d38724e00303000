"""Tiny models that take images, with their processors, and random images."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.driver import zoo

QWEN, ERNIE = "qwen3_vl_moe", "ernie4_5_vl_moe"
# Tokens around and in place of images, in the order in which the configuration names their ids.
_MARKS = {
    "image_token": "<|image_pad|>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "video_token": "<|video_pad|>",
    "video_start_token": "<|video_start|>",
    "video_end_token": "<|video_end|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
_FIRST = 259  # behind three special tokens and the bytes
VOCAB = _FIRST + len(_MARKS)
_IDS = {name: _FIRST + place for place, name in enumerate(_MARKS)}
_CONFIG = {
    QWEN: {
        "image_token_id": _IDS["image_token"],
        "video_token_id": _IDS["video_token"],
        "vision_start_token_id": _IDS["vision_bos_token"],
        "vision_end_token_id": _IDS["vision_eos_token"],
    },
    ERNIE: {f"{name}_id": _IDS[name] for name in _MARKS if name.startswith(("image", "video"))},
}
_AROUND = {
    QWEN: ("vision_bos_token", "vision_eos_token"),
    ERNIE: ("image_start_token", "image_end_token"),
}
_TEMPLATE = """\
{%- for message in messages %}<{{ message.role }}>
{%- if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}BEGIN<|image_pad|>END{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}<eos>
{%- endfor %}"""
_PROCESSORS = {
    QWEN: ("Qwen3VLProcessor", "Qwen2VLImageProcessor"),
    ERNIE: ("Ernie4_5_VLMoeProcessor", "Ernie4_5_VLMoeImageProcessor"),
}


def write(folder: Path, name: str) -> PreTrainedModel:
    """A tiny checkpoint of `QWEN` or `ERNIE` with tokenizer, template and image processor."""
    config, model = zoo.tiny(name, vocab_size=VOCAB)
    for key, number in _CONFIG[name].items():
        setattr(config, key, number)
        setattr(model.config, key, number)
    model.save_pretrained(folder)
    _write_tokenizer(folder, name)
    processor, images = _PROCESSORS[name]
    vision = config.vision_config
    settings = {
        "processor_class": processor,
        "image_processor_type": images,
        "patch_size": vision.patch_size,
        "temporal_patch_size": getattr(vision, "temporal_patch_size", 2) if name == QWEN else 1,
        "merge_size": 2,
        "size": {"shortest_edge": 16 * 16, "longest_edge": 32 * 32},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def _write_tokenizer(folder: Path, name: str) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<bos>", "<eos>", *alphabet, *_MARKS.values()]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    begin, end = (_MARKS[mark] for mark in _AROUND[name])
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=_MARKS,
        chat_template=_TEMPLATE.replace("BEGIN", begin).replace("END", end),
    ).save_pretrained(str(folder))


def png(seed: int = 0, size: tuple[int, int] = (24, 16), kind: str = "PNG") -> bytes:
    """Random pixels in a file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def data_url(content: bytes) -> str:
    """The content as text."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def says(*parts: Any, role: str = "user") -> dict[str, Any]:
    """A message of parts; strings become parts of type text."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return {"role": role, "content": content}
