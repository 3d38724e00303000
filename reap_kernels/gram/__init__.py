"""Gram matrices of the experts' inner activations."""

from reap_kernels.gram.op import gram

__all__ = ["gram"]
