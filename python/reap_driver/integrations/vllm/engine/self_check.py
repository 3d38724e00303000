"""Whether hooked layers do what they are meant to, on random rows, before they serve anything.

How vLLM calls its routers and kernels, and what they do with one expert a row, differs by version,
device and quantization. What a layer fails is refused, with the reason; the rest is restored as it
was: mask, biases, statistics. No state of a random generator is touched.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import set_forward_context

import reap_kernels as rk
from reap_driver.integrations.vllm.engine import layers, rows
from reap_driver.integrations.vllm.engine.layer import HookedLayer, Step, described

ROWS = 8


def bound(dtype: torch.dtype) -> float:
    """The greatest difference between vLLM's sum of outputs and ours, as a part of the greatest sum
    of their magnitudes.

    Kernels round each weighted output to `dtype` and then the sum, in another order: a few units in
    the last place. Products in float32 may be added in another order, or taken in TF32 on a GPU.
    """
    return 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps


@dataclass
class _Trial:
    """A pass in which every row counts, in one group."""

    mode: str
    device: torch.device
    real: bool = True
    observed: bool = True
    num_groups: int = 1

    def counted(self, tokens: int) -> Tensor:
        return torch.ones(tokens, dtype=torch.bool, device=self.device)

    def groups(self, tokens: int) -> Tensor:
        return torch.zeros(tokens, dtype=torch.int64, device=self.device)


def check_layers(hooked: Iterable[HookedLayer], vllm_config: Any) -> dict[str, list[str]]:
    """Checks every layer, and sets `refusal` and `mask_refusal` of those that fail.

    To be called between steps, of all ranks alike: ranks of tensor parallelism sum rows.

    Args:
        hooked: installed layers.
        vllm_config: of the worker.

    Returns:
        {layer: what it failed}, without layers that failed nothing.
    """
    failed = {}
    hooked = list(hooked)
    shared = layers.shared_biases({layer.name: layer.runner for layer in hooked})
    for layer in hooked:
        if layer.name in shared and layer.mask_refusal is None:
            other = shared[layer.name]
            layer.mask_refusal = f"its router's selection bias is that of layer {other} too"
            failed[layer.name] = [layer.mask_refusal]
    with torch.inference_mode(), set_forward_context(None, vllm_config):
        for layer in hooked:
            found = check_layer(layer)
            if found:
                failed[layer.name] = failed.get(layer.name, []) + found
    return failed


def check_layer(layer: HookedLayer) -> list[str]:
    """`check_layers` of one, in a forward context of vLLM."""
    layer.runner.routed_experts._ensure_moe_quant_config_init()
    found = []
    if layer.refusal is None:
        layer.refusal = _failed(_check_statistics, layer)
        found.append(layer.refusal)
    if layer.mask_refusal is None:
        layer.mask_refusal = _failed(_check_mask, layer)
        found.append(layer.mask_refusal)
    return [reason for reason in found if reason is not None]


def _failed(check: Any, layer: HookedLayer) -> str | None:
    """What a check says, or what it raises; the layer is as before."""
    state = (layer.step, layer.stats, layer.error, layer.masked)
    try:
        reason: str | None = check(layer)
    except Exception as error:  # noqa: BLE001  any failure is a reason to refuse the layer
        reason = f"its self-check failed with {described(error)}"
    finally:
        layer.step, layer.stats, layer.error, masked = state
        if layer.masked != masked:
            layer.set_mask(masked)
    return reason


def _check_statistics(layer: HookedLayer) -> str | None:
    config = layer.runner.moe_config
    x, weights, ids = _routed_rows(layer)
    forward = layer.runner.routed_experts.forward_modular
    device, kernel = x.device, layer.facts()["kernel"]
    own = layer._own_forward(x.clone(), weights.clone(), ids.clone())
    if not isinstance(own, Tensor):
        return f"its kernel {kernel} returns {type(own).__name__} in place of a tensor"
    outputs = {}
    for mode in ("shadow", "replace"):
        layer.step = _Trial(mode, device)
        layer.stats = rk.LayerStats(layer.experts, 1, device)
        outputs[mode] = forward(x.clone(), weights.clone(), ids.clone())
        if layer.error is not None:
            return layer.error
        missing = _missing(layer, ids)
        if missing:
            return f"its kernel {kernel} gives {missing}"
    if not torch.equal(outputs["shadow"], own):
        return f"observing changes the output of its kernel {kernel}"
    parts = layer._expert_rows(x, weights, ids).view(ROWS, -1, own.shape[-1]).float()
    factors = 1.0 if layer._weights_input else weights.float().unsqueeze(-1)
    scale = float((parts * factors).abs().sum(1).max())
    difference = float((outputs["replace"].float() - own.float()).abs().max())
    if not difference <= bound(config.in_dtype) * scale:
        return (
            f"its kernel {kernel} gives another output for one expert at a time: {difference:.3g} "
            f"apart, of {scale:.3g}"
        )
    return None


def _missing(layer: HookedLayer, ids: Tensor) -> str:
    """What is wrong with the counts of a trial, or an empty text."""
    assert layer.stats is not None
    local = layer._local_experts()
    mine = ids.numel() if local is None else int((local[ids.long()] >= 0).sum())
    if int(layer.stats.nonfinite.sum()):
        return "outputs that are NaN or Inf"
    counted = int(layer.stats.count.sum())
    return "" if counted == mine else f"{counted} of {mine} expert outputs"


def _check_mask(layer: HookedLayer) -> str | None:
    router, before = layer.runner.router, layers.selection_biases(layer.runner)
    layer.set_mask([])
    before = [bias.clone() for bias in before]
    x = _hidden(layer)
    config = layer.runner.moe_config
    logits = _random(ROWS, layer.experts, seed=2).to(x.device)
    logits = logits.to(config.router_logits_dtype or config.in_dtype)
    dtype = layer.runner.routed_experts.quant_method.topk_indices_dtype
    kept = kept_experts(layer)
    removed = [expert for expert in range(layer.experts) if expert not in kept]

    def routed() -> tuple[Tensor, Tensor]:
        weights, ids = router.select_experts(x, logits.clone(), topk_indices_dtype=dtype)
        return weights.clone(), _logical(layer, ids.clone())

    own = routed()
    layer.set_mask(removed)
    weights, ids = routed()
    layer.set_mask([])
    again = routed()
    wrong = sorted(set(ids.flatten().tolist()) - set(kept))
    if wrong:
        return f"its router {type(router).__name__} chooses experts {wrong[:8]} that a mask removes"
    if removed and all(map(torch.equal, (weights, ids), own)):
        return f"its router {type(router).__name__} does not see a mask"
    biases = layers.selection_biases(layer.runner)
    if not all(map(torch.equal, own, again)) or not all(map(torch.equal, before, biases)):
        return f"its router {type(router).__name__} does not recover when a mask is cleared"
    return None


def kept_experts(layer: HookedLayer) -> set[int]:
    """As few experts as the layer's router can choose among, the last of each group."""
    facts = layer.facts()
    groups, size = facts["n_group"], layer.experts // facts["n_group"]
    needed = rows.fewest(facts["top_k"], groups, facts["topk_group"], size)
    return {group * size + size - 1 - i for group in range(groups) for i in range(needed)}


def _logical(layer: HookedLayer, ids: Tensor) -> Tensor:
    """Ids of experts from those of their copies, where load balancing has copies."""
    state = layer.runner.router.eplb_state
    if state is None or state.logical_to_physical_map is None:
        return ids
    copies = state.logical_to_physical_map.tolist()
    logical = {copy: expert for expert, held in enumerate(copies) for copy in held if copy >= 0}
    return ids.new_tensor([[logical[i] for i in row] for row in ids.tolist()])


def _routed_rows(layer: HookedLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Random rows, their weights [ROWS, k] and their experts [ROWS, k], none twice in a row."""
    x, k = _hidden(layer), layer.facts()["top_k"]
    weights = _random(ROWS, k, seed=3).softmax(-1).to(x.device)
    ids = _random(ROWS, layer.experts, seed=4).topk(k).indices
    dtype = layer.runner.routed_experts.quant_method.topk_indices_dtype or torch.int32
    return x, weights, ids.to(dtype).to(x.device)


def _hidden(layer: HookedLayer) -> Tensor:
    """Random inputs of the experts, padded as vLLM pads them."""
    config = layer.runner.moe_config
    x = _random(ROWS, layer.facts()["hidden_size"], seed=1)
    if not layer.runner.routed_experts.quant_method.skip_forward_padding:
        x = torch.nn.functional.pad(x, (0, config.hidden_dim - x.shape[-1]))
    device = next(layer.runner.routed_experts.parameters()).device
    return x.to(device=device, dtype=config.in_dtype)


def _random(rows: int, columns: int, seed: int) -> Tensor:
    """The same on every rank."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


_: type[Step] = _Trial
