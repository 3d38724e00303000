"""RMS norms of rows, alone or of a sum that is kept."""

from reap_kernels.norm.op import rms_norm

__all__ = ["rms_norm"]
