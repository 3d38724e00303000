"""A tool with models of its own: its MoE layer computes and observes its experts in one call."""

import torch

import reap_kernels as rk


class MoE(torch.nn.Module):
    """Top-k routed experts, written in plain torch."""

    def __init__(self, hidden: int, inner: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.router = torch.nn.Linear(hidden, experts, bias=False)
        self.up = torch.nn.Parameter(torch.randn(experts, 2 * inner, hidden) * hidden**-0.5)
        self.down = torch.nn.Parameter(torch.randn(experts, hidden, inner) * inner**-0.5)
        self.top_k = top_k

    def forward(self, x: torch.Tensor, stats: rk.LayerStats | None = None) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(self.top_k)
        experts = rk.ExpertWeights(self.up, self.down, rk.Activation("silu"))
        return rk.observe_layer(x, ids, weights, experts, stats)


if __name__ == "__main__":
    torch.manual_seed(0)
    layer, stats = MoE(hidden=64, inner=32, experts=8, top_k=2), rk.LayerStats(8)
    with torch.no_grad():
        for _ in range(4):
            layer(torch.randn(256, 64), stats)
    saliency = (stats.weighted_norm_sum / stats.count)[0]  # mean of router weight times norm
    print("experts, least important first:", saliency.argsort().tolist())
