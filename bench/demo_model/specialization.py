"""Do the experts of a small model differ: who is used for which text, and what is lost without one.

Two measurements on text windows by domain:

- routing: each expert's share of the routed slots per domain, and from it the information (bits)
  that knowing the expert gives about the domain, I(expert; domain), per layer;
- ablation: how much each domain's loss grows when one expert is taken out of its router.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reap_driver.demo.evaluate import evaluate


def routers(model: Any) -> list[nn.Module]:
    """The router of every MoE layer, in order."""
    return [layer.mlp.gate for layer in model.model.layers]


@contextmanager
def router_outputs(model: Any) -> Iterator[list[tuple[Tensor, ...]]]:
    """Record what the routers return: a list of (logits [T, E], gates [T, k], ids [T, k])."""
    outputs: list[tuple[Tensor, ...]] = []
    hooks = [
        r.register_forward_hook(lambda _m, _i, out: outputs.append(out)) for r in routers(model)
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def routing_shares(model: Any, windows: dict[str, Tensor]) -> Tensor:
    """Share of a domain's routed slots that each expert takes: float64 [layers, domains, E].

    Read from the model's own routers; each row sums to 1.
    """
    experts = model.config.num_experts
    by_domain = []
    with router_outputs(model) as routed:
        for ids in windows.values():
            routed.clear()
            model(input_ids=ids, use_cache=False)
            chosen = [out[2].flatten() for out in routed]
            by_domain.append(torch.stack([torch.bincount(c, minlength=experts) for c in chosen]))
    counts = torch.stack(by_domain, dim=1).double()
    return counts / counts.sum(-1, keepdim=True)


def domain_information(shares: Tensor) -> Tensor:
    """I(expert; domain) in bits for domains of equal weight: float64 [layers].

    At most log2(domains); 0 means that every domain uses the experts alike.
    """
    mean = shares.mean(1, keepdim=True)
    terms = torch.where(shares > 0, shares * (shares / mean).log2(), 0.0)
    return terms.sum(-1).mean(-1)


@contextmanager
def without_experts(router: Any, experts: Sequence[int]) -> Iterator[None]:
    """Take experts out of a Qwen3-MoE router's choice; the next in line take their places."""

    def reroute(_module: nn.Module, _inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits = output[0].clone()
        logits[:, list(experts)] = -torch.inf
        scores, chosen = torch.topk(logits.softmax(-1, dtype=torch.float), router.top_k, dim=-1)
        if router.norm_topk_prob:
            scores = scores / scores.sum(-1, keepdim=True)
        return logits, scores.to(logits.dtype), chosen

    handle = router.register_forward_hook(reroute)
    try:
        yield
    finally:
        handle.remove()


def ablation(
    model: Any, windows: dict[str, Tensor], progress: Callable[[int, int], None]
) -> Tensor:
    """Growth of each domain's loss in nats without one expert: float64 [layers, E, domains].

    Calls ``progress(done, total)`` after each expert.
    """
    base = evaluate(model, windows).domain_loss
    experts = model.config.num_experts
    growth = torch.zeros(len(routers(model)), experts, len(windows), dtype=torch.float64)
    for layer, router in enumerate(routers(model)):
        for expert in range(experts):
            with without_experts(router, [expert]):
                loss = evaluate(model, windows).domain_loss
            growth[layer, expert] = torch.tensor([loss[d] - base[d] for d in windows])
            progress(layer * experts + expert + 1, len(growth) * experts)
    return growth
