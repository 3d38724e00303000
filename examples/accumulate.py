"""A tool that computes its experts itself: it hands over their outputs and gets statistics."""

import torch

import reap_kernels as rk


def moe(x: torch.Tensor, router: torch.Tensor, experts: list, stats: rk.LayerStats) -> torch.Tensor:
    """A Mixture-of-Experts layer [T, H] -> [T, H], one expert after the other."""
    weights, ids = (x @ router.T).softmax(-1).topk(2)
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        token, slot = (ids == number).nonzero(as_tuple=True)
        rows = expert(x[token])  # before they are multiplied by their router weights
        gates = weights[token, slot]
        rk.accumulate(rows, torch.full_like(token, number), gates, stats)
        out.index_add_(0, token, gates[:, None] * rows)
    stats.add_tokens(len(x))
    return out


if __name__ == "__main__":
    torch.manual_seed(0)
    experts = [
        torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.SiLU(), torch.nn.Linear(32, 64))
        for _ in range(8)
    ]
    router, stats = torch.randn(8, 64), rk.LayerStats(8)
    with torch.no_grad():
        moe(torch.randn(1024, 64), router, experts, stats)
    saliency = (stats.weighted_norm_sum / stats.count)[0]  # mean of router weight times norm
    print("experts, least important first:", saliency.argsort().tolist())
