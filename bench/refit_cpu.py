"""The re-fit of a pruned model on the CPU, in observing passes of the same text.

The CPU bench model without half of its experts is re-fitted to the whole one; both run the same
batches in turn, over several rounds. Seconds are those of the process. Weights are random, so what
a re-fit gains is not looked at here.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reap_driver as rd
from bench import cpu_model, rows

LENGTH = 512


def _seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _observed(model: Any, batches: list[Tensor]) -> rd.SaliencyStats:
    with rd.observe(model) as obs:
        for ids in batches:
            obs(input_ids=ids)
        return obs.stats


def measure(batch: int, sequences: int, rounds: int) -> dict[str, object]:
    """One row: process seconds of both, and their ratio."""
    with tempfile.TemporaryDirectory(prefix="reap-refit-") as root:
        source, cut = Path(root) / "model", Path(root) / "cut"
        cpu_model.build(torch.float32).save_pretrained(source)
        model, batches = rd.load_model(source), cpu_model.tokens(sequences, LENGTH, batch)
        plan = rd.make_plan(rd.score(_observed(model, batches), "reap"), 0.5)
        rd.apply_plan(source, plan, cut)
        pruned = rd.load_model(cut)
    given = [{"input_ids": ids} for ids in batches]
    passes, refits = [], []
    for _ in range(rounds):
        passes.append(_seconds(lambda: _observed(model, batches)))
        refits.append(_seconds(lambda: rd.refit_models(model, pruned, given)))
    ratios = [refit / one for refit, one in zip(refits, passes, strict=True)]
    return {
        "experts": cpu_model.EXPERTS,
        "kept": len(next(iter(plan.kept.values()))),
        "layers": cpu_model.LAYERS,
        "tokens": sequences * LENGTH,
        "batch": batch,
        "rounds": rounds,
        "observed_s": f"{statistics.median(passes):.2f}",
        "refit_s": f"{statistics.median(refits):.2f}",
        "refit/observed": f"{statistics.median(ratios):.2f}",
        "least_ratio": f"{min(ratios):.2f}",
        "most_ratio": f"{max(ratios):.2f}",
    }


def main(arguments: list[str]) -> None:
    """Measures and appends one row."""
    parser = argparse.ArgumentParser(prog="python -m bench refit_cpu", description=__doc__)
    parser.add_argument("--sequences", type=int, default=64, help="of 512 tokens (default: 64)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="print the row, do not append it")
    options = parser.parse_args(arguments)
    row = measure(options.batch, options.sequences, options.rounds)
    if options.dry_run:
        print(row)
    else:
        rows.write("refit_cpu", [row])
