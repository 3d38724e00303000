"""`python -m tests.interop.gptqmodel.quantize MODEL OUT`: quantizes a model in each variant.

In a process of its own, because GPTQModel exchanges classes of transformers. Each variant becomes a
folder of OUT, and OUT/NAME.safetensors holds the weights that GPTQModel dequantizes of it.
"""

import random
import sys
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT
from safetensors.torch import save_file

MIXED = {"+:.*down_proj": {"bits": 8, "group_size": 32}, "-:.*q_proj": {}}
VARIANTS: dict[str, dict[str, Any]] = {
    "act-order": {"bits": 4, "group_size": 16, "desc_act": True},
    "mixed": {"bits": 3, "group_size": 16, "desc_act": False, "sym": False, "dynamic": MIXED},
    "second": {"bits": 4, "group_size": 32, "sym": False, "format": FORMAT.GPTQ_V2},
}


def main(source: str, out: Path) -> None:
    """Writes every variant of the model, and what the library makes of it."""
    draw = random.Random(0)
    tokens = [[draw.randrange(3, 250) for _ in range(128)] for _ in range(16)]
    data = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in tokens]
    for name, options in VARIANTS.items():
        quantizer = GPTQModel.load(source, QuantizeConfig(**options), device="cpu")
        quantizer.quantize(data, batch_size=1)
        quantizer.save(str(out / name))
        # In another dtype, the library would round the scales to it first.
        options = {"device": "cpu", "backend": BACKEND.GPTQ_TORCH, "dtype": torch.float16}
        loaded = GPTQModel.load(str(out / name), **options)
        weights = {
            module: TorchLinear.dequantize_weight(layer).T.contiguous()
            for module, layer in loaded.model.named_modules()
            if isinstance(layer, TorchLinear)
        }
        save_file(weights, out / f"{name}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
