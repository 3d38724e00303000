"""Dequantizes FP8 matrices whose last block of scales is only partly filled."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize


@contextlib.contextmanager
def partial_blocks() -> Iterator[None]:
    """Inside, dequantization on load takes the block size from the checkpoint's configuration.

    transformers (5.17 to 5.23) divides the size of a matrix by that of its grid of scales.
    Published matrices may end in a partial block (`kv_a_proj_with_mqa` of DeepSeek and Kimi: 576
    rows, five blocks of 128): the library refuses them or, if the grid divides the size, scales
    wrong rows.
    """
    original = Fp8Dequantize._dequantize_one

    def dequantize_one(
        self: Any, quantized: torch.Tensor, scales: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        sizes, grid = quantized.shape[-2:], scales.shape[-2:]
        blocks = getattr(self.hf_quantizer.quantization_config, "weight_block_size", None) or ()
        whole = [count * block for count, block in zip(grid, blocks, strict=False)]
        margins = [end - size for end, size in zip(whole, sizes, strict=False)]
        explained = all(0 <= m < block for m, block in zip(margins, blocks, strict=False))
        partial = any(margin and count > 1 for margin, count in zip(margins, grid, strict=False))
        # Packed 4-bit experts are integers and have another block size.
        if not (explained and partial and quantized.is_floating_point()):
            return original(self, quantized, scales, *args, **kwargs)
        padded = torch.nn.functional.pad(quantized.float(), (0, margins[1], 0, margins[0]))
        floats = original(self, padded, scales, *args, **kwargs)
        return floats[..., : sizes[0], : sizes[1]].contiguous()

    Fp8Dequantize._dequantize_one = dequantize_one
    try:
        yield
    finally:
        Fp8Dequantize._dequantize_one = original
