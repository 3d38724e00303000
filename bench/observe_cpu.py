"""The observed forward on the CPU, compared with transformers' unobserved forward and all-experts.

All variants run the same batches in turn, over several rounds. A figure is the median over rounds
of the ratio to our observed forward in the same round.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench import cpu_model, rows
from bench.baselines import all_experts
from reap_driver import observe

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def _forward(model: torch.nn.Module, batches: list[Tensor]) -> None:
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _observed(model: torch.nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    with observe(model) as obs:
        for ids in batches:
            obs(input_ids=ids)
    return {
        name: torch.stack([s.count[0].double(), s.norm_sum[0], s.weighted_norm_sum[0]])
        for name, s in obs.stats.layers.items()
    }


def _unobserved(model: torch.nn.Module, implementation: str, batches: list[Tensor]) -> None:
    model.set_experts_implementation(implementation)
    _forward(model, batches)


def _baseline(model: torch.nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    model.set_experts_implementation("eager")
    with all_experts(model) as sums:
        _forward(model, batches)
    return sums


def _verify(model: torch.nn.Module, batches: list[Tensor]) -> None:
    """Fails unless the statistics of both observers agree.

    In half precision, only the first MoE layer has the same inputs in both: its rounding errors
    change the hidden states, and the random routers of later layers choose other experts.
    """
    ours, theirs = _observed(model, batches[:1]), _baseline(model, batches[:1])
    exact = model.dtype == torch.float32
    bound = 1e-5 if exact else 2e-2
    for name, want in list(theirs.items())[: None if exact else 1]:
        error = float(((ours[name] - want).abs() / want.clamp_min(1)).max())
        if error > bound:
            raise SystemExit(f"{name}: statistics differ by {error:.2e}, more than {bound:.0e}")


def measure(dtype: torch.dtype, batch: int, sequences: int, rounds: int) -> dict[str, object]:
    """One row: seconds of each variant and their ratios to the observed forward."""
    model = cpu_model.build(dtype)
    batches = cpu_model.tokens(sequences, 512, batch)
    _verify(model, batches)
    # One short sequence is enough to exclude very slow implementations (batched_mm on CPUs).
    probe = [batches[0][:1, :64]]
    trial = {
        name: _seconds(lambda n=name: _unobserved(model, n, probe)) for name in IMPLEMENTATIONS
    }
    runners = [name for name in IMPLEMENTATIONS if trial[name] < 5 * min(trial.values())]
    taken: dict[str, list[float]] = {name: [] for name in ("observed", *runners, "all-experts")}
    for turn in range(rounds):
        taken["observed"].append(_seconds(lambda: _observed(model, batches)))
        for name in runners:
            taken[name].append(_seconds(lambda n=name: _unobserved(model, n, batches)))
        if turn == 0:
            taken["all-experts"].append(_seconds(lambda: _baseline(model, batches)))
    fastest = min(runners, key=lambda name: statistics.median(taken[name]))
    ours = taken["observed"]
    ratio = [mine / theirs for mine, theirs in zip(ours, taken[fastest], strict=True)]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "sequences": sequences,
        "length": 512,
        "rounds": rounds,
        "observed_s": f"{statistics.median(ours):.3f}",
        "fastest_unobserved": fastest,
        "fastest_unobserved_s": f"{statistics.median(taken[fastest]):.3f}",
        "observed/unobserved": f"{statistics.median(ratio):.3f}",
        "all_experts_s": f"{taken['all-experts'][0]:.3f}",
        "all_experts/observed": f"{taken['all-experts'][0] / ours[0]:.2f}",
        "excluded": " ".join(name for name in IMPLEMENTATIONS if name not in runners),
    }


def main(arguments: list[str]) -> None:
    """Runs float32 and bfloat16 at batch 1 and 8 and appends the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench observe_cpu", description=__doc__)
    parser.add_argument("--sequences", type=int, default=16, help="sequences of 512 tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--dry-run", action="store_true", help="print rows, do not append them")
    options = parser.parse_args(arguments)
    for dtype in options.dtype or ("float32", "bfloat16"):
        for batch in options.batch or (1, 8):
            row = measure(getattr(torch, dtype), batch, options.sequences, options.rounds)
            if options.dry_run:
                print(row, flush=True)
            else:
                rows.write("observe_cpu", [row])
