"""Rotary position embeddings of queries and keys, after their norms where they have some."""

from reap_kernels.rotary.op import rotary

__all__ = ["rotary"]
