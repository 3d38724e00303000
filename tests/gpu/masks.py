"""A mask of experts inside a CUDA graph, as the plugin for vLLM has it, with torch alone."""

import torch
from torch import Tensor

from bench.gpu.verify import CheckFailed, NotHere
from reap_driver.integrations.vllm.engine.rows import lowest
from tests.gpu.checks import Check

TORCH = "torch"
TOKENS, EXPERTS, TOP_K = 256, 128, 8
# Every third expert but the first: none, some, others, none again.
_MASKS = ((), tuple(range(1, EXPERTS, 3)), tuple(range(2, EXPERTS, 3)), ())


def _routed(logits: Tensor, removed: Tensor, scoring: str) -> tuple[Tensor, Tensor]:
    """Weights and ids, as a router that normalizes among the chosen gives them."""
    lowered = logits.masked_fill(removed, lowest(logits.dtype)).float()
    scores = lowered.softmax(-1) if scoring == "softmax" else lowered.sigmoid()
    weights, ids = scores.topk(TOP_K)
    return weights / weights.sum(-1, keepdim=True), ids


def _logits(device: torch.device, dtype: torch.dtype) -> Tensor:
    rng = torch.Generator(device).manual_seed(0)
    return torch.randn(TOKENS, EXPERTS, generator=rng, device=device).to(dtype)


def removed_experts(device: torch.device, _: str, dtype: torch.dtype, scoring: str) -> str:
    """Removed experts have score 0 and are never chosen; the others have the scores that they have
    among themselves. (Which of two equal ones is chosen may differ.)
    """
    logits = _logits(device, dtype)
    for mask in _MASKS[1:3]:
        removed = torch.zeros(EXPERTS, dtype=torch.bool, device=device)
        removed[list(mask)] = True
        lowered = torch.full((1, EXPERTS), lowest(dtype), dtype=dtype, device=device).float()
        lowered[0, 0] = 0.0  # one that is kept
        scores = lowered.softmax(-1) if scoring == "softmax" else lowered.sigmoid()
        if float(scores[0, 1:].max()) != 0:
            raise CheckFailed(f"{scoring} of the lowest logit is {float(scores[0, 1:].max())}")
        weights, ids = _routed(logits, removed, scoring)
        kept = torch.nonzero(~removed).flatten()
        none = torch.zeros(len(kept), dtype=torch.bool, device=device)
        want, _ids = _routed(logits[:, kept], none, scoring)
        if set(ids.flatten().tolist()) & set(mask):
            raise CheckFailed("experts are chosen that are removed")
        error = float((weights - want).abs().max())
        if not error <= 1e-6:
            raise CheckFailed(f"weights are off by {error:.1e}, 1e-06 is allowed")
    return "as if the others were all there are"


def mask_in_graph(device: torch.device, _: str, dtype: torch.dtype, scoring: str) -> str:
    """A captured routing follows the buffer of the mask, which changes in place between replays."""
    if device.type != "cuda":
        raise NotHere("needs a CUDA device")
    logits = _logits(device, dtype)
    removed = torch.zeros(EXPERTS, dtype=torch.bool, device=device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # what is captured must have run before
        _routed(logits, removed, scoring)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, ids = _routed(logits, removed, scoring)
    for number, mask in enumerate(_MASKS):
        removed.zero_()
        removed[list(mask)] = True
        graph.replay()
        torch.cuda.synchronize(device)
        want = _routed(logits, removed, scoring)
        if not (torch.equal(weights, want[0]) and torch.equal(ids, want[1])):
            raise CheckFailed(
                f"replay {number + 1} does not follow the mask of {len(mask)} experts"
            )
        if set(ids.flatten().tolist()) & set(mask):
            raise CheckFailed(f"replay {number + 1} chooses experts that are removed")
    return f"{len(_MASKS)} replays follow the mask"


def plan(smoke: bool) -> list[Check]:
    """Both checks, for the two ways to score, in dtypes that logits have."""
    dtypes = (torch.float32,) if smoke else (torch.bfloat16, torch.float32, torch.float16)
    return [
        Check(f"{name}, {scoring}", TORCH, dtype, run, (scoring,))
        for name, run in (
            ("mask in a CUDA graph", mask_in_graph),
            ("masked logits", removed_experts),
        )
        for scoring in ("softmax", "sigmoid")
        for dtype in dtypes
    ]
