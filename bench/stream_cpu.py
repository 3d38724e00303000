"""A checkpoint observed streamed and resident, from the page cache: time, bytes read, memory.

The checkpoint is the CPU bench model with 24 layers, saved with separate matrices per expert. Each
run is its own process and is timed from opening the checkpoint to its statistics; runs alternate.
Memory is the peak above that of the interpreter with torch and transformers loaded. Bytes are those
that the process read, from /proc/self/io.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench import cpu_model, rows
from reap_driver.files.checkpoint import open_checkpoint

LAYERS, LENGTH = 24, 512


def _status(field: str) -> int:
    """A memory figure of this process, in bytes."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    assert found is not None
    return int(found.group(1)) * 1024


def _asked() -> int:
    """Bytes that this process has read from files or the page cache."""
    return int(Path("/proc/self/io").read_text().split()[1])


def work(mode: str, folder: Path, sequences: int, batch: int, out: Path) -> dict[str, float]:
    """One run: `resident` or `streamed`."""
    from reap_driver.base.interrupts import Stop
    from reap_driver.load.resident import load_model
    from reap_driver.load.streamed_model import open_streamed
    from reap_driver.observation.observer import observe
    from reap_driver.observation.run import Run, run_resident, run_streamed
    from reap_driver.observation.state_store import StateStore

    ids = cpu_model.tokens(sequences, LENGTH, batch)

    class Batches:
        def __len__(self) -> int:
            return len(ids)

        def group(self, number: int) -> str:
            return "all"

        def inputs(self, number: int) -> dict[str, torch.Tensor]:
            return {"input_ids": ids[number]}

    before, asked, began = _status("VmHWM"), _asked(), time.perf_counter()
    if mode == "resident":
        observer = observe(load_model(folder))
        loaded = time.perf_counter()
        run_resident(Run(observer, Batches(), range(len(ids)), Stop()))
    else:
        with open_streamed(folder) as streamed:
            observer, loaded = observe(streamed.model), time.perf_counter()
            run = Run(observer, Batches(), range(len(ids)), Stop())
            run_streamed(run, streamed, StateStore("device", streamed.device))
    stats, ended = observer.stats, time.perf_counter()
    stats.save(out)
    return {
        "seconds": ended - began,
        "load": loaded - began,
        "memory": _status("VmHWM") - before,
        "asked": _asked() - asked,
    }


def _process(mode: str, options: argparse.Namespace, folder: Path, out: Path) -> dict[str, float]:
    words = ["--worker", mode, "--folder", str(folder), "--out", str(out)]
    words += ["--sequences", str(options.sequences), "--batch", str(options.batch)]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "stream_cpu", *words],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _same(left: Path, right: Path) -> bool:
    from reap_kernels import SaliencyStats

    mine, theirs = SaliencyStats.load(left), SaliencyStats.load(right)
    return all(
        torch.equal(a, b)
        for name, layer in mine.layers.items()
        for a, b in zip(layer.packed(), theirs.layers[name].packed(), strict=True)
    )


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """One row; fails unless both give bitwise identical statistics."""
    dtype = getattr(torch, options.dtype)
    cpu_model.build(dtype, layers=options.layers).save_pretrained(folder, max_shard_size="500MB")
    source = open_checkpoint(folder)
    layer = sum(e.nbytes for key, e in source.tensors.items() if ".layers.0." in key)
    states = options.sequences * LENGTH * cpu_model.HIDDEN * dtype.itemsize
    taken: dict[str, list[dict[str, float]]] = {"resident": [], "streamed": []}
    for turn in range(options.rounds + 1):  # the first fills the page cache
        for mode, found in taken.items():
            found.append(_process(mode, options, folder, folder.parent / f"{mode}.safetensors"))
        if turn == 0 and not _same(*(folder.parent / f"{m}.safetensors" for m in taken)):
            raise SystemExit("streamed and resident statistics differ: no figure")
    middle = {
        (mode, key): statistics.median(one[key] for one in found[1:])
        for mode, found in taken.items()
        for key in found[0]
    }
    ratios = [
        s["seconds"] / r["seconds"]
        for s, r in zip(taken["streamed"][1:], taken["resident"][1:], strict=True)
    ]
    bound = 2 * layer + states + 10**9
    return {
        "dtype": options.dtype,
        "layers": options.layers,
        "tokens": options.sequences * LENGTH,
        "batch": options.batch,
        "rounds": options.rounds,
        "checkpoint_gb": f"{source.nbytes / 1e9:.3f}",
        "resident_s": f"{middle['resident', 'seconds']:.2f}",
        "resident_load_s": f"{middle['resident', 'load']:.2f}",
        "streamed_s": f"{middle['streamed', 'seconds']:.2f}",
        "streamed/resident": f"{statistics.median(ratios):.3f}",
        "read/checkpoint": f"{middle['streamed', 'asked'] / source.nbytes:.4f}",
        "resident_memory_mb": round(middle["resident", "memory"] / 1e6),
        "streamed_memory_mb": round(middle["streamed", "memory"] / 1e6),
        "layer_mb": round(layer / 1e6),
        "states_mb": round(states / 1e6),
        "memory/bound": f"{middle['streamed', 'memory'] / bound:.3f}",
    }


def main(arguments: list[str]) -> None:
    """Runs the benchmark and appends one row."""
    parser = argparse.ArgumentParser(prog="python -m bench stream_cpu", description=__doc__)
    parser.add_argument("--sequences", type=int, default=16, help="of 512 tokens")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--dry-run", action="store_true", help="print the row, do not append it")
    for hidden in ("--worker", "--folder", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        folder, out = Path(options.folder), Path(options.out)
        print(json.dumps(work(options.worker, folder, options.sequences, options.batch, out)))
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    with tempfile.TemporaryDirectory(prefix="reap-stream-") as root:
        row = measure(options, Path(root) / "model")
    if options.dry_run:
        print(row)
    else:
        rows.write("stream_cpu", [row])
