"""The MoE layer op: output and statistics in one pass."""

from reap_kernels.layer.op import observe_layer

__all__ = ["observe_layer"]
