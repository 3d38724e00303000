"""reap-kernels, the kernel library: MoE layer output and expert statistics in one pass.

Tensors in, tensors out; imports torch, never transformers. Layers, lowest first: errors, env,
activation, quantized -> types -> dispatch, stats, layer_gram, device -> tuning, selfcheck -> sort,
dequant, norm -> experts, rotary -> saliency, gram -> layer, cross, compare.
"""

from reap_kernels import errors, requirements  # noqa: F401  which checks torch
from reap_kernels.activation import Activation, probe_activation
from reap_kernels.compare import LogitComparison, compare_logits
from reap_kernels.cross import cross
from reap_kernels.dequant import dequantize
from reap_kernels.dispatch import Sizes, check_backend, explain
from reap_kernels.experts import expert_outputs
from reap_kernels.gram import gram
from reap_kernels.layer import observe_layer
from reap_kernels.layer_gram import LayerGram
from reap_kernels.norm import rms_norm
from reap_kernels.quantized import Quantized
from reap_kernels.rotary import rotary
from reap_kernels.saliency import accumulate
from reap_kernels.sort import sort_by_expert
from reap_kernels.stats import LayerStats, SaliencyStats
from reap_kernels.types import ExpertWeights, Routing

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "ExpertWeights",
    "LayerGram",
    "LayerStats",
    "LogitComparison",
    "Quantized",
    "Routing",
    "SaliencyStats",
    "Sizes",
    "accumulate",
    "check_backend",
    "compare_logits",
    "cross",
    "dequantize",
    "errors",
    "expert_outputs",
    "explain",
    "gram",
    "observe_layer",
    "probe_activation",
    "rms_norm",
    "rotary",
    "sort_by_expert",
]
