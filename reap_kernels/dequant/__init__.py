"""Quantized experts as bf16 matrices."""

from reap_kernels.dequant.op import dequantize

__all__ = ["dequantize"]
