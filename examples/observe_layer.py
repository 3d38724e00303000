"""An engine with models of its own: one call computes its MoE layer and observes the experts."""

import torch

import reap_kernels as rk

HIDDEN, INNER, EXPERTS, TOP_K = 64, 32, 8, 2


class MoE(torch.nn.Module):
    """The engine's layer: its own router, and all experts in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.up = torch.nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN) * HIDDEN**-0.5)
        self.down = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * INNER**-0.5)

    def forward(self, x: torch.Tensor, stats: rk.LayerStats | None = None) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K)
        experts = rk.ExpertWeights(self.up, self.down, rk.Activation("silu"))
        return x + rk.observe_layer(x, ids, weights, experts, stats)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = {f"model.layers.{number}.mlp.experts": MoE() for number in range(2)}
    stats = {name: rk.LayerStats(EXPERTS) for name in model}
    with torch.no_grad():
        for x in torch.randn(4, 256, HIDDEN):  # batches of calibration text, [T, H] each
            for name, layer in model.items():
                x = layer(x, stats[name])
    routing = {"num_experts": EXPERTS, "top_k": TOP_K, "n_group": None}
    record = {"layers": dict.fromkeys(model, routing)}
    observed = rk.SaliencyStats(stats, ["text"], record)
    observed.save("statistics.safetensors")  # reap-kernels plan statistics.safetensors ...
    print(observed, "by the backend", rk.check_backend("layer", "cpu", torch.float32))
