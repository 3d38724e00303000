"""A checkpoint observed streamed and resident, from the page cache: time, bytes read, memory.

The checkpoint is the CPU bench model with 24 layers, saved with separate matrices per expert. Each
run is its own process and is timed from opening the checkpoint to its statistics; runs alternate.
Memory is the peak above that of the interpreter with torch and transformers loaded. Bytes are those
that the process read, from /proc/self/io. With `--gram`, streamed runs are compared with streamed
runs that sum Gram matrices and cut the neurons of every layer as soon as it is complete.
"""

import argparse
import functools
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
from reap_driver import prune_width
from reap_driver.files.checkpoint import open_checkpoint
from reap_kernels import ExpertWeights, LayerGram, LayerStats

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
    """One run: `resident`, `streamed` or `gram`, which is streamed, too."""
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
    process = time.process_time()
    if mode == "resident":
        observer = observe(load_model(folder))
        loaded = time.perf_counter()
        run_resident(Run(observer, Batches(), range(len(ids)), Stop()))
    else:
        with open_streamed(folder) as streamed:
            observer, loaded = observe(streamed.model, gram=mode == "gram"), time.perf_counter()
            run = Run(observer, Batches(), range(len(ids)), Stop())
            if observer.gram:
                run.layer_done = functools.partial(observer.give_grams, sink=_cut)
            run_streamed(run, streamed, StateStore("device", streamed.device))
    stats, ended = observer.stats, time.perf_counter()
    stats.save(out)
    return {
        "seconds": ended - began,
        "process": time.process_time() - process,
        "load": loaded - began,
        "memory": _status("VmHWM") - before,
        "asked": _asked() - asked,
    }


def _cut(name: str, stats: LayerStats, gram: LayerGram, weights: ExpertWeights) -> None:
    """What is decided on a layer while its Gram matrices are there."""
    prune_width(weights.down, gram, weights.intermediate_size * 3 // 4)


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


Runs = dict[str, list[dict[str, float]]]


def _runs(options: argparse.Namespace, folder: Path, *modes: str) -> Runs:
    """Every mode's runs without their first, which fills the page cache; fails unless the
    statistics of both modes are bitwise identical.
    """
    taken: Runs = {mode: [] for mode in modes}
    for turn in range(options.rounds + 1):
        for mode, found in taken.items():
            found.append(_process(mode, options, folder, folder.parent / f"{mode}.safetensors"))
        if turn == 0 and not _same(*(folder.parent / f"{m}.safetensors" for m in taken)):
            raise SystemExit(f"{' and '.join(modes)} statistics differ: no figure")
    return {mode: found[1:] for mode, found in taken.items()}


def _middle(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(one[key] for one in runs)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """One row of a checkpoint that is written to `folder`."""
    dtype = getattr(torch, options.dtype)
    cpu_model.build(dtype, layers=options.layers).save_pretrained(folder, max_shard_size="500MB")
    source = open_checkpoint(folder)
    layer = sum(e.nbytes for key, e in source.tensors.items() if ".layers.0." in key)
    states = options.sequences * LENGTH * cpu_model.HIDDEN * dtype.itemsize
    return {
        "dtype": options.dtype,
        "layers": options.layers,
        "tokens": options.sequences * LENGTH,
        "batch": options.batch,
        "rounds": options.rounds,
        "checkpoint_gb": f"{source.nbytes / 1e9:.3f}",
        **(_with_gram if options.gram else _beside_resident)(
            options, folder, (source.nbytes, layer, states)
        ),
    }


def _beside_resident(
    options: argparse.Namespace, folder: Path, sizes: tuple[int, int, int]
) -> dict[str, object]:
    """Figures of resident and streamed runs; `sizes` of the checkpoint, a layer and the states."""
    whole, layer, states = sizes
    resident, streamed = _runs(options, folder, "resident", "streamed").values()
    ratios = [s["seconds"] / r["seconds"] for s, r in zip(streamed, resident, strict=True)]
    memory = _middle(streamed, "memory")
    return {
        "resident_s": f"{_middle(resident, 'seconds'):.2f}",
        "resident_load_s": f"{_middle(resident, 'load'):.2f}",
        "streamed_s": f"{_middle(streamed, 'seconds'):.2f}",
        "streamed/resident": f"{statistics.median(ratios):.3f}",
        "read/checkpoint": f"{_middle(streamed, 'asked') / whole:.4f}",
        "resident_memory_mb": round(_middle(resident, "memory") / 1e6),
        "streamed_memory_mb": round(memory / 1e6),
        "layer_mb": round(layer / 1e6),
        "states_mb": round(states / 1e6),
        "memory/bound": f"{memory / (2 * layer + states + 10**9):.3f}",
    }


def _with_gram(
    options: argparse.Namespace, folder: Path, sizes: tuple[int, int, int]
) -> dict[str, object]:
    """Figures of streamed runs without and with Gram matrices."""
    _, layer, states = sizes
    plain, summed = _runs(options, folder, "streamed", "gram").values()
    gram = LayerGram.nbytes_of(cpu_model.EXPERTS, cpu_model.INTERMEDIATE)
    memory = _middle(summed, "memory")
    return {
        "streamed_process_s": f"{_middle(plain, 'process'):.2f}",
        "gram_and_cut_process_s": f"{_middle(summed, 'process'):.2f}",
        "streamed_memory_mb": round(_middle(plain, "memory") / 1e6),
        "gram_memory_mb": round(memory / 1e6),
        "layer_mb": round(layer / 1e6),
        "layer_gram_mb": round(gram / 1e6),
        "states_mb": round(states / 1e6),
        "memory/bound": f"{memory / (2 * layer + gram + states + 10**9):.3f}",
    }


def main(arguments: list[str]) -> None:
    """Runs the benchmark and appends one row."""
    parser = argparse.ArgumentParser(prog="python -m bench stream_cpu", description=__doc__)
    parser.add_argument("--sequences", type=int, default=16, help="of 512 tokens")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--gram", action="store_true", help="streamed runs without and with Gram matrices"
    )
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
        rows.write("stream_gram_cpu" if options.gram else "stream_cpu", [row])
