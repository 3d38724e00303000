"""The (token, slot) rows of a batch, sorted by expert."""

from reap_kernels.sort.op import sort_by_expert

__all__ = ["sort_by_expert"]
