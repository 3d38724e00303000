"""An engine that computes its experts itself: it hands over their outputs and gets a plan."""

import torch

import reap_driver as rd
import reap_kernels as rk


def moe(x: torch.Tensor, router: torch.Tensor, experts: list, stats: rk.LayerStats) -> torch.Tensor:
    """The engine's layer [T, H] -> [T, H]: its own router, one expert after the other."""
    weights, ids = (x @ router.T).softmax(-1).topk(2)
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        token, slot = (ids == number).nonzero(as_tuple=True)
        rows, gates = expert(x[token]), weights[token, slot]  # rows: before the router weight
        rk.accumulate(rows, torch.full_like(token, number), gates, stats)
        out.index_add_(0, token, gates[:, None] * rows)
    stats.add_tokens(len(x))
    return out


if __name__ == "__main__":
    torch.manual_seed(0)
    linear, silu = torch.nn.Linear, torch.nn.SiLU()
    experts = [torch.nn.Sequential(linear(64, 32), silu, linear(32, 64)) for _ in range(8)]
    router, stats = torch.randn(8, 64), rk.LayerStats(8)
    with torch.no_grad():
        moe(torch.randn(1024, 64), router, experts, stats)
    routing = {"num_experts": 8, "top_k": 2, "n_group": None}
    record = {"layers": {"experts": routing}}
    observed = rk.SaliencyStats({"experts": stats}, ["text"], record)
    observed.save("statistics.safetensors")
    plan = rd.make_plan(rd.score(observed, "reap"), ratio=0.5)
    plan.save("plan.json")
    print("experts that stay:", plan.kept["experts"])
