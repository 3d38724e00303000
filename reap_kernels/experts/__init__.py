"""Expert outputs of routed rows."""

from reap_kernels.experts.op import expert_outputs

__all__ = ["expert_outputs"]
