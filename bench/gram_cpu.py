"""The observed forward on the CPU that sums Gram matrices too, compared with the one that does not.

Both run the same batches in turn, over several rounds. A figure is the median over rounds, and the
ratio is the median over rounds of that in the same round. Seconds are those of the process.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

from bench import cpu_model, rows
from reap_driver import observe
from reap_kernels import LayerGram, SaliencyStats

LENGTH = 512


def _observed(
    model: torch.nn.Module, batches: list[Tensor], gram: bool
) -> tuple[float, SaliencyStats, dict[str, LayerGram]]:
    """Process seconds, statistics and Gram matrices of one observed pass."""
    began = time.process_time()
    with observe(model, gram=gram) as obs:
        for ids in batches:
            obs(input_ids=ids)
        stats, grams = obs.stats, obs.grams if gram else {}
    return time.process_time() - began, stats, grams


def _check(plain: SaliencyStats, summed: SaliencyStats, grams: dict[str, LayerGram]) -> None:
    """Fails unless the statistics are the same bits, and the Gram matrices of the same rows."""
    for name, layer in plain.layers.items():
        pairs = zip(layer.packed(), summed.layers[name].packed(), strict=True)
        if not all(torch.equal(*pair) for pair in pairs):
            raise SystemExit(f"{name}: statistics differ from those without Gram matrices")
        if not torch.equal(grams[name].count, layer.count.sum(0)):
            raise SystemExit(f"{name}: Gram matrices are of other rows than the statistics")


def measure(dtype: torch.dtype, batch: int, sequences: int, rounds: int) -> dict[str, object]:
    """One row: process seconds with and without Gram matrices, and their ratio."""
    model = cpu_model.build(dtype)
    batches = cpu_model.tokens(sequences, LENGTH, batch)
    plain, summed = _observed(model, batches, False), _observed(model, batches, True)
    _check(plain[1], summed[1], summed[2])
    taken: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(rounds):
        for gram in (False, True) if turn % 2 else (True, False):
            taken[gram].append(_observed(model, batches, gram)[0])
    ratios = [more / less for more, less in zip(taken[True], taken[False], strict=True)]
    layers = next(iter(summed[2].values()))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "sequences": sequences,
        "length": LENGTH,
        "rounds": rounds,
        "observed_s": f"{statistics.median(taken[False]):.3f}",
        "with_gram_s": f"{statistics.median(taken[True]):.3f}",
        "with_gram/observed": f"{statistics.median(ratios):.3f}",
        "least_ratio": f"{min(ratios):.3f}",
        "most_ratio": f"{max(ratios):.3f}",
        "gram_mb": round(
            len(summed[2]) * LayerGram.nbytes_of(layers.num_experts, layers.intermediate_size) / 1e6
        ),
    }


def main(arguments: list[str]) -> None:
    """Runs float32 and bfloat16 and appends the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench gram_cpu", description=__doc__)
    parser.add_argument("--sequences", type=int, default=16, help="sequences of 512 tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append")
    parser.add_argument("--dry-run", action="store_true", help="print rows, do not append them")
    options = parser.parse_args(arguments)
    for dtype in options.dtype or ("float32", "bfloat16"):
        row = measure(getattr(torch, dtype), options.batch, options.sequences, options.rounds)
        if options.dry_run:
            print(row, flush=True)
        else:
            rows.write("gram_cpu", [row])
