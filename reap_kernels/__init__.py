"""reap-kernels, the kernel library: MoE layer output and expert statistics in one pass.

Tensors in, tensors out; imports torch, never transformers. Layers, lowest first: errors, env,
gates, quantised -> types -> dispatch, stats, device -> tuning, selfcheck -> route, dequant ->
experts -> saliency -> layer, compare.
"""

from reap_kernels import errors
from reap_kernels.compare import LogitComparison, compare_logits
from reap_kernels.dequant import dequantise
from reap_kernels.dispatch import check_backend, explain
from reap_kernels.experts import expert_outputs
from reap_kernels.gates import GateFormula, probe_gate
from reap_kernels.layer import observe_layer
from reap_kernels.quantised import Quantised
from reap_kernels.route import route
from reap_kernels.saliency import accumulate
from reap_kernels.stats import LayerStats, SaliencyStats
from reap_kernels.types import ExpertWeights, Routing

__version__ = "0.1.0"

__all__ = [
    "ExpertWeights",
    "GateFormula",
    "LayerStats",
    "LogitComparison",
    "Quantised",
    "Routing",
    "SaliencyStats",
    "accumulate",
    "check_backend",
    "compare_logits",
    "dequantise",
    "errors",
    "expert_outputs",
    "explain",
    "observe_layer",
    "probe_gate",
    "route",
]
