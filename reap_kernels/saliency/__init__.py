"""Saliency: norms, extrema and gate-weighted sums of expert outputs."""

from reap_kernels.saliency.op import accumulate

__all__ = ["accumulate"]
