"""A criterion of your own, from statistics to a smaller checkpoint."""

import sys
from pathlib import Path

import torch

import reap_driver as rd
from reap_kernels import LayerStats

MODEL = Path(rd.__file__).parent / "demo" / "model"  # the bundled one


def rare_and_weak(layer: LayerStats) -> torch.Tensor:
    """[E]: experts that few tokens reach and whose output is small are removed first."""
    every = layer.total()
    mean_norm = every.norm_sum[0] / every.count[0].clamp(min=1)
    return every.count[0].double().sqrt() * mean_norm


if __name__ == "__main__":
    out = sys.argv[1] if len(sys.argv) > 1 else "model-own-criterion"
    model = rd.load_model(MODEL)
    with rd.observe(model) as observer:
        for seed in range(4):
            torch.manual_seed(seed)
            observer(input_ids=torch.randint(0, 1000, (2, 128)))
    scores = rd.score(observer.stats, rare_and_weak, name="rare and weak")
    plan = rd.make_plan(scores, ratio=0.25)
    rd.apply_plan(MODEL, plan, out)
    print(f"{out}: {plan.criterion}, layers keep {[len(ids) for ids in plan.kept.values()]}")
