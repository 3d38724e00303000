"""The time of `reap-kernels plan` on statistics of 92 layers of 512 experts.

The statistics are random, with five groups and eight folds, in a file of 136 MB. Each step of the
command is timed in its own process after importing torch; the whole command is compared with
`import torch` alone. All figures are processor seconds of one thread, which other work on the
machine affects little, and medians over the rounds.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from functools import reduce
from pathlib import Path

import torch

from bench import rows
from reap_kernels import LayerStats, SaliencyStats

LAYERS, EXPERTS, GROUPS, PARTS = 92, 512, 5, 8

_STEPS = """
import json, sys, time
import torch
torch.set_num_threads(1)
from reap_driver.planning.scoring import score
from reap_driver.planning.planner import make_plan
from reap_driver.planning.stability import keep_probability, margin
from reap_kernels import SaliencyStats

taken = {}
def step(name, function):
    start = time.process_time()
    result = function()
    taken[name] = time.process_time() - start
    return result

stats = step("load", lambda: SaliencyStats.load(sys.argv[1]))
scores = step("score", lambda: score(stats))
plan = step("plan", lambda: make_plan(scores, 0.5))
step("global", lambda: make_plan(scores, 0.5, allocation="global"))
step("margin", lambda: margin(keep_probability(stats, plan)))
step("save", lambda: plan.save(sys.argv[2]))
print(json.dumps(taken))
"""


def main(arguments: list[str]) -> None:
    """Makes the statistics, measures in turns, appends one row of medians."""
    parser = argparse.ArgumentParser(prog="python -m bench plan_cpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="reap-bench-") as name:
        stats, plan = Path(name) / "stats.safetensors", Path(name) / "plan.json"
        made(torch.Generator().manual_seed(0)).save(stats)
        size = stats.stat().st_size
        command = [sys.executable, "-m", "reap_driver", "plan", stats, "--out", plan, "--overwrite"]
        taken: dict[str, list[float]] = {}
        for _ in range(options.rounds + 1):
            run = subprocess.run(
                [sys.executable, "-c", _STEPS, stats, plan], check=True, capture_output=True
            )
            seconds = json.loads(run.stdout)
            seconds["import_torch"] = used([sys.executable, "-c", "import torch"])
            seconds["command"] = used(command)
            for step, value in seconds.items():
                taken.setdefault(step, []).append(value)
    row: dict[str, object] = {
        "layers": LAYERS,
        "experts": EXPERTS,
        "groups": GROUPS,
        "parts": PARTS,
        "file_mb": f"{size / 1e6:.0f}",
        "rounds": options.rounds,
    }
    # The first round warms the page cache.
    row |= {f"{step}_cpu_s": f"{statistics.median(times[1:]):.3f}" for step, times in taken.items()}
    rows.write("plan_cpu", [row])


def used(command: list[object]) -> float:
    """Processor seconds of a command, user and system."""

    def so_far() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    start, alone = so_far(), {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([str(word) for word in command], check=True, capture_output=True, env=alone)
    return so_far() - start


def made(draw: torch.Generator) -> SaliencyStats:
    """Statistics in which experts differ by more than the folds of one expert."""
    names = [f"model.layers.{n}.mlp.experts" for n in range(LAYERS)]
    facts = {"num_experts": EXPERTS, "top_k": 8, "n_group": 1, "topk_group": 1}
    provenance = {"model": {"id": "bench"}, "layers": dict.fromkeys(names, facts)}
    groups = [f"group{n}" for n in range(GROUPS)]
    worth = {name: torch.rand(EXPERTS, generator=draw, dtype=torch.float64) for name in names}
    parts = [
        SaliencyStats({name: _layer(worth[name], draw) for name in names}, groups, dict(provenance))
        for _ in range(PARTS)
    ]
    whole = reduce(SaliencyStats.merge, parts)
    return SaliencyStats(whole.layers, groups, provenance, parts)


def _layer(worth: torch.Tensor, draw: torch.Generator) -> LayerStats:
    """One layer of one fold: about 500 rows per expert and group, scores that vary by 3 %."""
    layer = LayerStats(EXPERTS, GROUPS)
    count = torch.poisson(torch.full((GROUPS, EXPERTS), 500.0), generator=draw)
    noise = torch.randn(count.shape, generator=draw, dtype=torch.float64)
    layer.count.copy_(count)
    sums = count * worth * (1 + 0.03 * noise).clamp(min=0.5)
    layer.sums[:3] = sums
    layer.sums[3:] = 1.1 * sums.square() / count.clamp(min=1)  # of values that scatter
    layer.extrema[0], layer.extrema[1] = 1.0, -1.0
    layer.tokens += count.sum(dim=1).long() // 8 + 1
    return layer
