"""Data parallelism on the CPU: one to three processes under torchrun observe the same data.

The model is the CPU bench model as a checkpoint, with one OpenMP thread per process, so that the
processes compete only for cores. Seconds are those of rank 0, from the loaded model to its last
batch. The benchmark fails unless counts equal those of one process and sums agree within 1e-12.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench import cpu_model, rows
from reap_kernels import SaliencyStats

LENGTH = 512


def _observe(words: list[str], ranks: int) -> float:
    """Seconds of one run."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *(start if ranks > 1 else []), "-m", "reap_driver", *words, "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1])["observe_seconds"])


def _check(mine: Path, theirs: Path) -> None:
    left, right = SaliencyStats.load(mine), SaliencyStats.load(theirs)
    for name, layer in left.layers.items():
        other = right.layers[name]
        same = torch.equal(layer.counts, other.counts)
        if not same or not torch.allclose(layer.sums, other.sums, rtol=1e-12, atol=0):
            raise SystemExit(f"{name}: ranks change the statistics: no figure")


def measure(root: Path, sequences: int, most: int) -> list[dict[str, object]]:
    """One row per number of ranks."""
    cpu_model.build(torch.float32).save_pretrained(root / "model")
    ids = torch.cat(cpu_model.tokens(sequences, LENGTH, sequences)).flatten().tolist()
    (root / "data.jsonl").write_text(json.dumps({"input_ids": ids}) + "\n")
    words = ["observe", str(root / "model"), "--data", str(root / "data.jsonl"), "--no-journal"]
    words += ["--seq-len", str(LENGTH), "--batch-size", "4", "--stream", "never", "--overwrite"]
    taken = {}
    for ranks in range(1, most + 1):
        out = root / f"{ranks}.safetensors"
        taken[ranks] = _observe([*words, "--out", str(out)], ranks)
        _check(out, root / "1.safetensors")
    return [
        {
            "ranks": ranks,
            "cores": os.cpu_count(),
            "tokens": sequences * LENGTH,
            "seconds": f"{seconds:.2f}",
            "speedup": f"{taken[1] / seconds:.2f}",
        }
        for ranks, seconds in taken.items()
    ]


def main(arguments: list[str]) -> None:
    """Runs the benchmark and appends its rows."""
    parser = argparse.ArgumentParser(prog="python -m bench ranks_cpu", description=__doc__)
    parser.add_argument("--sequences", type=int, default=48, help="of 512 tokens")
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="print the rows, do not append them")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="reap-ranks-") as root:
        found = measure(Path(root), options.sequences, options.ranks)
    if options.dry_run:
        print(*found, sep="\n")
    else:
        rows.write("ranks_cpu", found)
