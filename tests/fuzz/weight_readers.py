"""Readers of packed weights: a quantizer's settings, and the tensors that they describe."""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.driver.load.words import V2, auto_round, awq, gptq, matrix
from tests.fuzz.campaign import Nonsense, Reader
from tests.fuzz.changes import container, json_value
from tests.fuzz.world import World, command

_NAMES = ("gate", "up", "down")
_EXCEPTED = {"-:.*q_proj": {}, r"+:.*\.up_proj": {"bits": 4, "group_size": 16}}
_LISTED = [[f"mlp.experts.{number}.{name}_proj"] for number in range(8) for name in _NAMES]
_SETTINGS = (
    gptq(**V2, dynamic=_EXCEPTED, modules_to_not_convert=["lm_head", "mlp.gate"]),
    gptq(**V2, desc_act=True, modules_in_block_to_quantize=_LISTED),
    auto_round(packing="auto_round", extra_config={".*gate$": {"bits": 16}, "lm_head": {}}),
)


def weights(world: World) -> Iterable[Reader]:
    """Read as `observe --dry-run` does, and as weights are loaded."""
    model = _packed_model(world)
    file = model / "model.safetensors"
    yield Reader(
        "settings of packed weights",
        [json.dumps(settings).encode() for settings in _SETTINGS],
        json_value,
        partial(_dry_run, world, model, json.loads((model / "config.json").read_text())),
        odd=[json.dumps(awq()).encode()],
    )
    yield Reader("packed weights", [file.read_bytes()], container, partial(_matrices, file))


def _packed_model(world: World) -> Path:
    """The model with packed experts, in one file."""
    model, rng = world.model_copy("packed"), np.random.default_rng(0)
    tensors = {}
    for path in sorted(model.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (model / "model.safetensors.index.json").unlink(missing_ok=True)
    for key in [key for key in tensors if ".experts." in key]:
        rows, columns = tensors.pop(key).shape
        parts, _ = matrix(rows, columns, rng, order=True)
        tensors |= {f"{key.removesuffix('weight')}{leaf}": part for leaf, part in parts.items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def _dry_run(world: World, model: Path, config: dict[str, object], content: bytes) -> None:
    text = json.dumps(config)[:-1].encode() + b', "quantization_config": ' + content + b"}"
    (model / "config.json").write_bytes(text)
    command("observe", model, "--data", world.data, "--seq-len", 16, "--dry-run")


def _matrices(file: Path, content: bytes) -> None:
    from reap_driver.files.quantization import Quantization
    from reap_driver.files.safetensors_file import read_header
    from reap_driver.load.methods import plain_weights
    from reap_driver.load.tensor_reader import TensorReader, stored

    file.write_bytes(content)
    reader = TensorReader()
    try:
        found = stored(read_header(file).tensors, reader)
        settings = Quantization("gptq", _SETTINGS[1])
        for key, tensor in plain_weights(found, settings, file, torch.device("cpu")).items():
            value = tensor[...]
            if list(value.shape) != tensor.get_shape() or not value.numel():
                raise Nonsense(f"{key} has another shape than was announced")
    finally:
        reader.close()
