"""Cross moments of targets and the experts' inner activations."""

from reap_kernels.cross.op import cross

__all__ = ["cross"]
