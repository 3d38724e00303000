"""The checkpoint writer, with one thread and with its default, compared with `cp`: rate and memory.

The checkpoint is synthetic, in the layout of a Qwen3-MoE in FP8 with scales: two large tensors
(embedding and head), thousands of expert matrices of 1.5 MB, and thousands of scales of 384 bytes,
in shards of 2 GB of incompressible random bytes. `cp -r` of the whole source and the writer at a
ratio of 0.5, with one thread and with its default, alternate. Each starts with the source dropped
from the page cache and ends when every byte is flushed to disk. The writer runs in its own process
and is timed from the call of `apply_plan` to its return (including reading headers, deriving the
layout and verifying, but not importing). Its memory is the peak above that of the interpreter with
torch imported.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import Qwen3MoeConfig

from bench import rows
from reap_driver.compat.model_config import config_digest, load_config
from reap_driver.files.safetensors_file import encode_header, tensor_bytes
from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.writer.stream import DEFAULT_THREADS

HIDDEN, INTERMEDIATE, EXPERTS, HEADS, HEAD_DIM, VOCAB, BLOCK = 2048, 768, 128, 32, 128, 151936, 128
SHARD_BYTES = 2 << 30
LAYER_BYTES = EXPERTS * 3 * HIDDEN * INTERMEDIATE
Shapes = dict[str, tuple[str, tuple[int, ...]]]

_WRITER = """
import json, re, sys, time
from pathlib import Path
import torch


def peak():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status).group(1)) * 1024


with_torch = peak()
from reap_driver.writer import apply_plan
from reap_driver.planning.plan import Plan

plan = Plan.load(sys.argv[2])
start = time.perf_counter()
report = apply_plan(sys.argv[1], plan, sys.argv[3], threads=json.loads(sys.argv[4]))
seconds = time.perf_counter() - start
memory = peak() - with_torch
found = {"bytes": report.bytes_written, "files": report.shards, "memory": memory}
print(json.dumps({"seconds": seconds, **found}))
"""


def main(arguments: list[str]) -> None:
    """Makes the checkpoint, measures in turns, appends rows of medians, removes all files."""
    parser = argparse.ArgumentParser(prog="python -m bench bench_writer", description=__doc__)
    parser.add_argument("--dir", help="folder on the disk to measure (default: the system's)")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    layers = max(1, round((options.gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / LAYER_BYTES))
    with tempfile.TemporaryDirectory(prefix="reap-bench-", dir=options.dir) as name:
        work = Path(name)
        size = make_checkpoint(work / "full", layers)
        make_plan(work / "full", layers).save(work / "plan.json")
        copies, single, writes = [], [], []
        for _ in range(options.rounds):
            copies.append(size / copy_seconds(work))
            single.append(write_once(work, 1))
            writes.append(write_once(work, None))
        row = summary(size, layers, copies, writes)
        beside = threads_summary(size, single, writes)
    rows.write("writer", [row])
    rows.write("writer_threads", [beside])


def summary(
    size: int, layers: int, copies: list[float], writes: list[dict[str, float]]
) -> dict[str, object]:
    """The row of `cp` and the writer: medians and their ratio."""
    copied = statistics.median(copies)
    written = statistics.median(run["bytes"] / run["seconds"] for run in writes)
    return {
        "source_gb": f"{size / 1e9:.2f}",
        "written_gb": f"{writes[0]['bytes'] / 1e9:.2f}",
        "tensors": len(shapes(layers)),
        "rounds": len(writes),
        "cp_mb_s": f"{copied / 1e6:.0f}",
        "cp_mb_s_min_max": f"{min(copies) / 1e6:.0f}-{max(copies) / 1e6:.0f}",
        "writer_mb_s": f"{written / 1e6:.0f}",
        "writer_s": f"{statistics.median(run['seconds'] for run in writes):.2f}",
        "ratio": f"{written / copied:.2f}",
        "memory_mb": f"{max(run['memory'] for run in writes) / 1e6:.0f}",
    }


def threads_summary(
    size: int, single: list[dict[str, float]], writes: list[dict[str, float]]
) -> dict[str, object]:
    """The row of one thread and the default number: medians and their ratio."""
    speeds = [[run["bytes"] / run["seconds"] / 1e6 for run in runs] for runs in (single, writes)]
    one, several = (statistics.median(found) for found in speeds)
    return {
        "source_gb": f"{size / 1e9:.2f}",
        "written_gb": f"{writes[0]['bytes'] / 1e9:.2f}",
        "files": writes[0]["files"],
        "cores": os.cpu_count(),
        "rounds": len(writes),
        "writers": min(DEFAULT_THREADS, int(writes[0]["files"])),
        "one_mb_s": f"{one:.0f}",
        "one_mb_s_min_max": f"{min(speeds[0]):.0f}-{max(speeds[0]):.0f}",
        "several_mb_s": f"{several:.0f}",
        "several_mb_s_min_max": f"{min(speeds[1]):.0f}-{max(speeds[1]):.0f}",
        "ratio": f"{several / one:.2f}",
        "one_memory_mb": f"{max(run['memory'] for run in single) / 1e6:.0f}",
        "several_memory_mb": f"{max(run['memory'] for run in writes) / 1e6:.0f}",
    }


def shapes(layers: int) -> Shapes:
    """Every tensor of the checkpoint."""
    found: Shapes = {"model.embed_tokens.weight": ("BF16", (VOCAB, HIDDEN))}
    for number in range(layers):
        layer = f"model.layers.{number}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}{norm}.weight"] = ("BF16", (HIDDEN,))
        attention = f"{layer}self_attn."
        for name, out in (("q", HEADS), ("k", 4), ("v", 4)):
            found[f"{attention}{name}_proj.weight"] = ("BF16", (out * HEAD_DIM, HIDDEN))
        found[f"{attention}o_proj.weight"] = ("BF16", (HIDDEN, HEADS * HEAD_DIM))
        for norm in ("q_norm", "k_norm"):
            found[f"{attention}{norm}.weight"] = ("BF16", (HEAD_DIM,))
        found[f"{layer}mlp.gate.weight"] = ("BF16", (EXPERTS, HIDDEN))
        for expert in range(EXPERTS):
            for name in ("gate", "up", "down"):
                matrix = (INTERMEDIATE, HIDDEN) if name != "down" else (HIDDEN, INTERMEDIATE)
                key = f"{layer}mlp.experts.{expert}.{name}_proj.weight"
                found[key] = ("F8_E4M3", matrix)
                found[f"{key}_scale_inv"] = ("F32", (matrix[0] // BLOCK, matrix[1] // BLOCK))
    found["model.norm.weight"] = ("BF16", (HIDDEN,))
    found["lm_head.weight"] = ("BF16", (VOCAB, HIDDEN))
    return found


def make_checkpoint(folder: Path, layers: int) -> int:
    """Writes the checkpoint; returns the bytes of its files."""
    folder.mkdir()
    Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=4,
        head_dim=HEAD_DIM,
        num_experts=EXPERTS,
        architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(folder)
    shards: list[Shapes] = [{}]
    held = 0
    for key, (dtype, shape) in shapes(layers).items():
        if held > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][key] = (dtype, shape)
        held += tensor_bytes(dtype, shape)
    weight_map = {}
    noise = os.urandom(64 << 20)
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(shard, name))
        with (folder / name).open("wb") as file:
            file.write(encode_header(shard, {"format": "pt"}))
            left = sum(tensor_bytes(dtype, shape) for dtype, shape in shard.values())
            while left:
                left -= file.write(noise[: min(left, len(noise))])
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    flush(folder)
    return sum(path.stat().st_size for path in folder.iterdir())


def make_plan(folder: Path, layers: int) -> Plan:
    """A plan that keeps every other expert, which needs the most and the shortest copies."""
    model = {"id": "bench/synthetic", "config_digest": config_digest(load_config(folder))}
    kept = LayerPlan.keeping(EXPERTS, tuple(range(0, EXPERTS, 2)))
    entries = {f"model.layers.{number}.mlp.experts": kept for number in range(layers)}
    return Plan(model, "random", "uniform", 0.5, entries, "none")


def copy_seconds(work: Path) -> float:
    """Seconds of `cp -r` of the source, flushed."""
    forget(work / "full")
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(work / "full"), str(work / "copy")], check=True)
    flush(work / "copy")
    seconds = time.perf_counter() - start
    shutil.rmtree(work / "copy")
    return seconds


def write_once(work: Path, threads: int | None) -> dict[str, float]:
    """One run of the writer in its own process."""
    forget(work / "full")
    command = [
        sys.executable,
        "-c",
        _WRITER,
        *(str(work / n) for n in ("full", "plan.json", "out")),
        json.dumps(threads),
    ]
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    shutil.rmtree(work / "out")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def forget(folder: Path) -> None:
    """Drops a folder's files from the page cache, if the system supports that."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def flush(folder: Path) -> None:
    """Flushes a folder's files to disk, as the writer does with its own."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


if __name__ == "__main__":
    main(sys.argv[1:])
