"""`python -m tests.interop.autoround.quantize MODEL OUT`: quantizes a model in each packing.

In a process of its own, because AutoRound exchanges classes of transformers. Each variant becomes a
folder of OUT; `expected.safetensors` in it holds the weights of the model that transformers loads
from it with AutoRound, where that needs no package of others.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP = 16
MIXED = {"down_proj": {"bits": 8}, "model.layers.0.self_attn.q_proj": {"bits": 16}}
# Folder -> format, options, and whether transformers and AutoRound load it by themselves.
VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "symmetric": ("auto_round", {"bits": 4, "sym": True}, True),
    "three-bits": ("auto_round", {"bits": 3, "sym": False}, True),
    "mixed": ("auto_round", {"bits": 4, "sym": True, "layer_config": MIXED}, True),
    "awq": ("auto_round:auto_awq", {"bits": 4, "sym": False}, False),
    "as-gptq": ("auto_gptq", {"bits": 4, "sym": False}, False),
    "as-awq": ("auto_awq", {"bits": 4, "sym": False}, False),
}


def main(source: str, out: Path) -> None:
    """Writes every variant of the model."""
    for name, (packing, options, loads) in VARIANTS.items():
        model = AutoModelForCausalLM.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        fixed = {"group_size": GROUP, "iters": 0, "disable_opt_rtn": True, "device_map": "cpu"}
        quantizer = AutoRound(model, tokenizer, **fixed, **options)
        quantizer.quantize_and_save(str(out / name), format=packing)
        made = next((out / name).rglob("config.json")).parent
        if made != out / name:  # a folder inside, named by model and bits
            made = made.rename(out / f"{name}-inner")
            (out / name).rmdir()
            made = made.rename(out / name)
        if loads:
            loaded = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float16)
            save_file(weights(loaded), made / "expected.safetensors")


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weight of each quantized layer: what it computes for the rows of a unit matrix."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "qweight"):
            unit = torch.eye(layer.infeatures, dtype=torch.float16)
            found[name] = layer(unit).T.contiguous()
    return found


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
