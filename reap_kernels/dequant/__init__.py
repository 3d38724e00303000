"""Quantised experts as bf16 matrices."""

from reap_kernels.dequant.op import dequantise

__all__ = ["dequantise"]
