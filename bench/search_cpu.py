"""The budget search on the bundled model: its cost, and its gain on held-out text.

For each seed, some of the calibration windows are drawn for the search; the statistics are of the
others. Held-out text is from another split of the corpus. The interval is that of
searched - uniform on it, 95 %, by a bootstrap over windows.
"""

import argparse
import random
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from bench import rows
from reap_driver.demo.run import CALIBRATION_WINDOWS, MODEL, observe_windows, read_texts
from reap_driver.evaluation.router_masks import RouterMasks
from reap_driver.load.resident import load_model
from reap_driver.plan_search.budget_search import Found, Task, search
from reap_driver.plan_search.evolution import Settings
from reap_driver.plan_search.fitness import Fitness
from reap_driver.plan_search.held_out import held_out
from reap_driver.plan_search.recorder import Recorder
from reap_driver.planning.criteria import Scores
from reap_driver.planning.planner import make_plan
from reap_driver.planning.scoring import score

_BATCH = 16  # windows per batch
Batches = list[dict[str, Tensor]]


def _batches(windows: list[Tensor]) -> Batches:
    return [{"input_ids": ids} for ids in torch.cat(windows).split(_BATCH)]


def _divided(
    calibration: dict[str, Tensor], windows: int, seed: int
) -> tuple[Batches, dict[str, Tensor]]:
    """Windows of each domain for the search, and the other ones."""
    draw, chosen, others = random.Random(seed), [], {}
    for domain, ids in calibration.items():
        order = sorted(range(len(ids)), key=lambda _: draw.random())
        chosen.append(ids[order[:windows]])
        others[domain] = ids[sorted(order[windows:])]
    return _batches(chosen), others


def _row(
    model: Any, scores: Scores, text: Batches, other: Batches, ratio: float, settings: Settings
) -> dict[str, object]:
    """The row of one search: its cost and its gain."""
    task, masks = Task(scores, make_plan(scores, ratio)), RouterMasks(model)
    began, worked = time.perf_counter(), time.process_time()
    fitness = Fitness(model, text)
    found: Found = search(task, Recorder(task.measured(fitness, masks)), settings)
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    plans = [partial(masks.keeping, plan.kept) for plan in (task.uniform, found.plan)]
    check = held_out(model, other, *plans, seed=settings.seed)
    removed = [str(len(layer.removed)) for layer in found.plan.layers.values()]
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "ratio": ratio,
        "seed": settings.seed,
        "evaluations": len(found.evaluated),
        "predictions": fitness.predictions,
        "cache_mb": f"{fitness.nbytes / 1e6:.1f}",
        "seconds": f"{seconds:.1f}",
        "cpu_seconds": f"{cpu:.1f}",
        "removed": " ".join(removed),
        "uniform": f"{found.uniform:.4f}",
        "searched": f"{found.fitness:.4f}",
        "held_out_predictions": check.predictions,
        "held_out_uniform": f"{check.uniform:.4f}",
        "held_out_searched": f"{check.searched:.4f}",
        "difference_low": f"{check.low:+.4f}",
        "difference_high": f"{check.high:+.4f}",
    }


def main(arguments: list[str]) -> None:
    """Searches at every ratio with every seed, and appends the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench search_cpu", description=__doc__)
    parser.add_argument("--ratio", type=float, action="append", help="default: 0.5 and 0.25")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=500)
    parser.add_argument("--windows", type=int, default=8, help="a domain, to search on")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--dry-run", action="store_true", help="print rows, do not append them")
    options = parser.parse_args(arguments)
    if not 0 < options.windows < CALIBRATION_WINDOWS:
        parser.error(f"argument --windows: from 1 to {CALIBRATION_WINDOWS - 1}")
    calibration, unseen = read_texts(AutoTokenizer.from_pretrained(MODEL))
    other = _batches(list(unseen.values()))
    model = load_model(MODEL, dtype=getattr(torch, options.dtype))
    for seed in range(options.seeds):
        text, observed = _divided(calibration, options.windows, seed)
        scores = score(observe_windows(model, observed))
        for ratio in options.ratio or (0.5, 0.25):
            settings = Settings(options.evaluations, seed=seed)
            row = _row(model, scores, text, other, ratio, settings)
            if options.dry_run:
                print(row, flush=True)
            else:
                rows.write("search_cpu", [row])
