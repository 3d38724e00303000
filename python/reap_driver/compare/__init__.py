"""Comparison of a pruned model with its original: how closely its predictions follow, on text."""

from reap_driver.compare.figures import Estimate, Figures
from reap_driver.compare.models import compare, compare_streamed
from reap_driver.compare.sequences import Comparison

__all__ = ["Comparison", "Estimate", "Figures", "compare", "compare_streamed"]
