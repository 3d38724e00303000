"""Saliency: norms, extrema and weighted sums of expert outputs."""

from reap_kernels.saliency.op import accumulate

__all__ = ["accumulate"]
