"""Comparison of two models' next-token distributions, from their logits."""

from reap_kernels.compare.op import LogitComparison, compare_logits

__all__ = ["LogitComparison", "compare_logits"]
