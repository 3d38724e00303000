"""Generates the tables of README and docs from result rows; `python -m bench.tables` updates them.

A table is between `<!-- table NAME -->` and `<!-- end -->`. `tests/test_readme.py` fails if a table
differs from the one that its newest rows give.
"""

import re
import sys
from collections.abc import Callable

from bench.format_tables import formats
from bench.gram_tables import gram_cpu, obs_cpu, refit_cpu, stream_gram_cpu
from bench.host_tables import llm_compressor_cpu, vllm_cpu
from bench.method_tables import criteria_cpu, methods_cpu, methods_shift
from bench.rows import ROOT
from bench.table_parts import Row, markdown, newest

PAGES = (
    "README.md",
    "docs/methods.md",
    "docs/guides/data.md",
    "docs/figures.md",
    "docs/guides/llm-compressor.md",
    "docs/guides/live.md",
    "docs/versions.md",
    "docs/formats.md",
)
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def observe_cpu() -> str:
    """The observed forward, compared with transformers and the all-experts algorithm."""
    rows = newest("observe_cpu", "dtype", "batch")
    body = [
        [
            row["dtype"],
            row["batch"],
            f"{float(row['observed_s']):.1f} s",
            f"{float(row['fastest_unobserved_s']):.1f} s ({row['fastest_unobserved']})",
            f"**{float(row['observed/unobserved']):.2f}**",
            f"{float(row['all_experts_s']):.0f} s",
            f"**{float(row['all_experts/observed']):.1f}x**",
        ]
        for row in rows
    ]
    head = [
        "dtype",
        "batch",
        "observed",
        "fastest unobserved of transformers",
        "observed / unobserved",
        "all experts on all tokens",
        "we are faster by",
    ]
    first = rows[0]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    where = (
        f"\n{first['sequences']} x {first['length']} tokens, H=512, I=256, E=64, k=8, 4 layers; "
        f"{first['cpu']}, {first['threads']} thread, torch {first['torch']}, transformers "
        f"{first['transformers']}, commit {commits}; `python -m bench observe_cpu`.\n"
    )
    return markdown(head, body) + where


def accuracy_cpu() -> str:
    """Largest relative error of each sum against the float64 oracle."""
    fields = (
        "router_weight_sum",
        "norm_sum",
        "weighted_norm_sum",
        "norm_sq_sum",
        "weighted_norm_sq_sum",
    )
    body = [
        [row["dtype"], "exact" if row["counts_exact"] == "True" else "wrong"]
        + [row[field] for field in fields]
        for row in newest("accuracy_cpu", "dtype")
    ]
    return markdown(["dtype", "counts", *(f"`{field}`" for field in fields)], body)


def writer() -> str:
    """The checkpoint writer, compared with cp."""
    row = newest("writer", "cpu")[-1]
    return (
        f"Writing {row['written_gb']} GB out of {row['source_gb']} GB ({row['tensors']} tensors) "
        f"runs at {row['writer_mb_s']} MB/s beside {row['cp_mb_s']} MB/s of `cp` on the same disk "
        f"(ratio {row['ratio']}), with {row['memory_mb']} MB of memory above the interpreter and "
        "torch.\n"
    )


def stream_cpu() -> str:
    """Streamed observation, compared with resident."""
    rows = newest("stream_cpu", "dtype", "threads")
    body = [
        [
            row["threads"],
            f"{float(row['resident_s']):.1f} s",
            f"{float(row['streamed_s']):.1f} s",
            f"**{float(row['streamed/resident']):.2f}**",
            f"{float(row['read/checkpoint']):.2f}",
            f"{row['resident_memory_mb']} MB",
            f"{row['streamed_memory_mb']} MB",
        ]
        for row in rows
    ]
    head = ["threads", "resident", "streamed", "streamed / resident", "read / checkpoint"]
    first = rows[0]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    where = (
        f"\n{first['checkpoint_gb']} GB, {first['layers']} layers, {first['tokens']} tokens, from "
        f"the page cache, loading included; {first['cpu']}, 2 cores, commit {commits}; `python -m "
        "bench stream_cpu`.\n"
    )
    return markdown([*head, "memory, resident", "memory, streamed"], body) + where


def ranks_cpu() -> str:
    """Data parallelism, compared with one process."""
    rows = newest("ranks_cpu", "ranks", "cores")
    alone, *more = rows
    said = "; ".join(
        f"{row['ranks']} processes {row['seconds']} s ({row['speedup']}x)" for row in more
    )
    return (
        f"{alone['tokens']} tokens under torchrun, {alone['cores']} cores, one thread per process: "
        f"1 process {alone['seconds']} s; {said}; counts equal, sums within 1e-12; commit "
        f"{alone['commit']}; `python -m bench ranks_cpu`.\n"
    )


def large_checkpoint() -> str:
    """A checkpoint larger than memory."""
    row = newest("large_checkpoint", "layers", "scale")[-1]
    seconds = float(row["killed_s"]) + float(row["resumed_s"])
    return (
        f"{row['checkpoint_gb']} GB of Qwen3-30B-A3B's layer shape ({row['layers']} layers, bf16), "
        f"{row['tokens']} tokens, in a control group of {float(row['observe_limit_gb']):.0f} GB: "
        f"killed behind layer {row['killed_behind_layer']}, resumed, {seconds / 60:.0f} minutes in "
        f"all, {row['observe_anonymous_gb']} GB of memory at the peak, {row['read_gb']} GB read; "
        f"then pruned to half in a group of {float(row['prune_limit_gb']):.0f} GB with "
        f"{row['prune_anonymous_gb']} GB, in {row['prune_s']} s; commit {row['commit']}; "
        "`python -m bench large_checkpoint`.\n"
    )


def _spread(row: Row, key: str, unit: str = "") -> str:
    middle = f"{row[key]}{unit}"
    return (
        middle if row["seeds"] == "1" else f"{middle} ({row[key + '_min']} to {row[key + '_max']})"
    )


def demo() -> str:
    """What pruning the bundled model costs, by criterion."""
    body = [
        [
            row["criterion"] + (f", {row['seeds']} seeds" if row["seeds"] != "1" else ""),
            f"{float(row['ratio']):.0%}",
            row["experts"],
            _spread(row, "perplexity"),
            _spread(row, "agreement", " %"),
        ]
        for row in newest("demo", "criterion", "ratio")
    ]
    head = ["criterion", "removed", "experts", "held-out perplexity", "next-token agreement"]
    return markdown(head, body)


def aot() -> str:
    """Resource usage of the compiled Triton kernels, by architecture and Triton version: the newest
    run of each. Waits and barriers are those of a block of K, in loops of products on tensor cores
    whose rows are copied; runs before these were counted have none.
    """
    found = newest("aot", "arch", "triton", "kernel", "use", "operand", "activation", "blocks")
    body = []
    for arch, version in dict.fromkeys((row["arch"], row["triton"]) for row in found):
        rows = [row for row in found if (row["arch"], row["triton"]) == (arch, version)]
        last = max(row["run"] for row in rows)
        rows = [row for row in rows if row["run"] == last]
        products = [row for row in rows if row["operand"] in ("bf16", "fp16") and row["activation"]]
        products = [row for row in products if row["kernel"].startswith("grouped_product")]
        body.append(
            [
                arch,
                version,
                str(len(rows)),
                str(sum(int(row["spills"]) + int(row["local_bytes"]) for row in rows)),
                f"{sum(int(row['tensor_core_instructions']) > 0 for row in products)} of "
                f"{len(products)}",
                _in_loops(products, "loop_drains"),
                _in_loops(products, "loop_barriers"),
                str(max(int(row["registers"]) for row in rows)),
                f"{max(int(row['shared_bytes']) for row in rows) // 1024} KiB",
            ]
        )
    head = ["architecture", "Triton", "kernels", "spills", "16-bit products on tensor cores"]
    head += ["most waits that drain", "most barriers", "most registers", "most shared memory"]
    return markdown(head, body)


def _in_loops(products: list[Row], column: str) -> str:
    """The most of one thing for each block of K; empty where none was counted."""
    copied = [row for row in products if row["loop_length"] and row["loop_copies"] != "0"]
    counts = [int(row[column]) / int(row["loop_steps"]) for row in copied]
    return f"{max(counts):g}" if counts else ""


def ptxas() -> str:
    """Resource usage of the CUDA kernels by ptxas, by architecture: the newest run."""
    found = newest("ptxas", "arch", "kernel", "arguments")
    last = max(row["run"] for row in found)
    found = [row for row in found if row["run"] == last]
    body = []
    for arch in dict.fromkeys(row["arch"] for row in found):
        rows = [row for row in found if row["arch"] == arch]
        wide = [int(row["wide_loads"]) for row in rows if row["wide_loads"]]
        stacks = ("stack_bytes", "spill_store_bytes", "spill_load_bytes")
        body.append(
            [
                arch.replace("_", ""),
                str(len(rows)),
                str(sum(int(row[key]) for row in rows for key in stacks)),
                f"{sum(loads > 0 for loads in wide)} of {len(wide)}",
                str(max(int(row["registers"]) for row in rows)),
            ]
        )
    head = ["architecture", "kernels", "spills and stack", "wide combinations by 128-bit loads"]
    first = found[0]
    where = (
        f"\nAll in one module of {int(first['module_bytes']) / 1e6:.1f} MB, built from nothing in "
        f"{first['build_s']} s on {first['cores']} cores by nvcc {first['nvcc']}; commit "
        f"{first['commit']}; `python -m bench ptxas`.\n"
    )
    return markdown([*head, "most registers"], body) + where


def _measured_on(rows: list[Row]) -> str:
    """GPU and software of the rows of `bench.gpu`."""
    first = rows[0]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    gpus = ", ".join(dict.fromkeys(row["gpu"] for row in rows))
    software = f"driver {first['driver']}, CUDA {first['cuda']}, torch {first['torch']}, Triton "
    software += f"{first['triton']}, transformers {first['transformers']}"
    return f"\n{gpus}; {software}, commit {commits}; `python -m bench.gpu`.\n"


def gpu_layer() -> str:
    """One observed layer on a GPU, compared with transformers and the all-experts algorithm."""
    keys = ("shape", "tokens", "routing", "provider", "variant", "observed")
    rows = [row for row in newest("gpu_layer", *keys) if row["status"] == "timed"]
    body = []
    for ours in rows:
        if (ours["provider"], ours["variant"], ours["observed"]) != ("reap", "automatic", "yes"):
            continue
        same = [row for row in rows if all(row[key] == ours[key] for key in keys[:3])]
        theirs = [float(row["ms"]) for row in same if row["provider"] == "transformers"]
        everything = [float(row["ms"]) for row in same if row["provider"] == "all-experts"]
        body.append(
            [
                f"{ours['shape']} ({ours['E']}, {ours['k']}, {ours['H']}, {ours['I']})",
                ours["tokens"],
                f"{float(ours['ms']):.3g} ms",
                f"{float(ours['pct_peak']):.0f} %",
                f"{float(ours['observed/unobserved']):.3f}",
                f"{min(theirs):.3g} ms",
                f"**{float(ours['transformers/observed']):.2f}x**",
                f"{everything[0] + min(theirs):.4g} ms",
            ]
        )
    head = ["layer (E, k, H, I)", "tokens", "observed", "of dense peak", "observed / unobserved"]
    head += ["fastest of transformers, unobserved", "we are faster by", "all experts on all tokens"]
    return markdown(head, body) + _measured_on(rows)


def gpu_kernels() -> str:
    """Kernels around the matrix products on a GPU, one size each."""
    rows = newest("gpu_kernels", "shape", "tokens", "kernel", "variant")
    body = []
    for row in rows:
        first = (row["shape"], row["tokens"]) == ("Qwen3-30B-A3B", "16384")
        wanted = first or row["kernel"].startswith(("dequantize", "compare"))
        if not wanted or not row["ours/other"]:
            continue
        size = row["shape"] + (f", {row['tokens']} tokens" if first else "")
        share = f"{float(row['pct_copy']):.0f} %"
        ratio = f"{float(row['ours/other']):.3f}"
        body.append(
            [row["kernel"], size, row["variant"], f"{float(row['us']):.4g} us", share, ratio]
        )
    head = ["kernel", "size", "by", "time", "of copy bandwidth", "time / Triton's or torch's"]
    return markdown(head, body) + _measured_on(rows)


def gpu_end_to_end() -> str:
    """A whole model on a GPU."""
    rows = newest("gpu_end_to_end", "provider", "variant", "observed")
    timed = {(r["provider"], r["observed"]): r for r in rows if r["status"] == "timed"}
    ours, plain = timed["reap", "yes"], timed["transformers", "no"]
    everything = timed["all-experts", "yes"]
    ratio = float(everything["seconds"]) / float(ours["seconds"])
    return (
        f"{ours['sequences']} x {ours['length']} tokens of {ours['model']} ({ours['layers']} "
        f"layers, random weights, {ours['batch']} sequences at a time): observed in "
        f"**{float(ours['seconds']):.1f} s** ({int(ours['tokens_s']):,} tokens/s), "
        f"{float(ours['time/transformers']):.2f} of the {float(plain['seconds']):.1f} s that "
        f"transformers' fastest forward takes unobserved; every expert on every token would take "
        f"{float(everything['seconds']):.0f} s (extrapolated from two layers), **{ratio:.0f}x** as "
        "long.\n" + _measured_on(rows)
    )


def headline() -> str:
    """The main figures, for the README."""
    head = ["what", "reap-kernels", "compared with", "ratio"]
    return markdown(head, [_on_gpu(), _on_cpu(), *_on_disk(), _quality()])


def _observing(what: str, seconds: list[float], ratio: float, faster: float) -> list[str]:
    ours, plain, every = seconds
    return [
        f"observe {what}",
        f"{ours:.1f} s",
        f"{plain:.1f} s unobserved in transformers; {every:.0f} s with all experts on all tokens",
        f"**{ratio:.2f}**; **{faster:.1f}x** faster",
    ]


def _on_gpu() -> list[str]:
    rows = newest("gpu_end_to_end", "provider", "variant", "observed")
    timed = {(r["provider"], r["observed"]): r for r in rows if r["status"] == "timed"}
    ours = timed["reap", "yes"]
    keys = (("reap", "yes"), ("transformers", "no"), ("all-experts", "yes"))
    seconds = [float(timed[key]["seconds"]) for key in keys]
    what = f"{ours['sequences']} x {ours['length']} tokens, {ours['model']}, {ours['gpu']}"
    return _observing(what, seconds, float(ours["time/transformers"]), seconds[2] / seconds[0])


def _on_cpu() -> list[str]:
    row = next(row for row in newest("observe_cpu", "dtype", "batch") if row["dtype"] == "float32")
    seconds = [float(row[key]) for key in ("observed_s", "fastest_unobserved_s", "all_experts_s")]
    what = f"{row['sequences']} x {row['length']} tokens on a CPU, {row['dtype']}"
    ratios = float(row["observed/unobserved"]), float(row["all_experts/observed"])
    return _observing(what, seconds, *ratios)


def _on_disk() -> list[list[str]]:
    stream, copy = newest("stream_cpu", "dtype", "threads")[0], newest("writer", "cpu")[-1]
    streamed, resident = stream["streamed_memory_mb"], stream["resident_memory_mb"]
    share = f"**{int(streamed) / int(resident):.2f}**"
    what = f"memory of observing {stream['checkpoint_gb']} GB, streamed"
    rate, cp = f"{copy['writer_mb_s']} MB/s", f"{copy['cp_mb_s']} MB/s of `cp`"
    return [
        [what, f"{streamed} MB", f"{resident} MB resident", share],
        ["write a checkpoint", rate, cp, f"**{copy['ratio']}**"],
    ]


def _quality() -> list[str]:
    rows = newest("demo", "criterion", "ratio")
    whole = next(row for row in rows if row["criterion"] == "unpruned")
    quarter = {row["criterion"]: row for row in rows if float(row["ratio"]) == 0.25}
    reap, random = quarter["reap"]["perplexity"], quarter["random"]["perplexity"]
    return [
        "held-out perplexity of the bundled model without a quarter of its experts",
        reap,
        f"{whole['perplexity']} unpruned; {random} with experts removed at random",
        f"**{float(reap) / float(whole['perplexity']):.2f}**",
    ]


def versions() -> str:
    """Versions that the tests ran with, and the results: the newest run of each."""
    body = [
        [
            row["row"],
            row["python"],
            row["torch"],
            row["transformers"],
            row["safetensors"],
            row["accelerate"],
            row["triton"],
            row["tests"],
            f"{row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped",
            row["commit"],
        ]
        for row in newest("versions", "row", "tests")
    ]
    head = ["row", "Python", "torch", "transformers", "safetensors", "accelerate", "Triton"]
    return markdown([*head, "tests", "outcome", "commit"], body)


def record_formats() -> str:
    """Formats of records, in the order in which they are tried."""
    from reap_driver.data.record_formats import FORMATS

    def names(fields: tuple[str, ...]) -> str:
        return ", ".join(f"`{name}`" for name in fields)

    body = [[names(one.needed), names(one.more), one.becomes] for one in FORMATS]
    return markdown(["a record has", "and perhaps", "it becomes"], body)


TABLES: dict[str, Callable[[], str]] = {
    "observe_cpu": observe_cpu,
    "accuracy_cpu": accuracy_cpu,
    "aot": aot,
    "ptxas": ptxas,
    "criteria_cpu": criteria_cpu,
    "methods_cpu": methods_cpu,
    "methods_shift": methods_shift,
    "gram_cpu": gram_cpu,
    "obs_cpu": obs_cpu,
    "refit_cpu": refit_cpu,
    "stream_gram_cpu": stream_gram_cpu,
    "llm_compressor_cpu": llm_compressor_cpu,
    "vllm_cpu": vllm_cpu,
    "demo": demo,
    "writer": writer,
    "stream_cpu": stream_cpu,
    "ranks_cpu": ranks_cpu,
    "large_checkpoint": large_checkpoint,
    "gpu_layer": gpu_layer,
    "gpu_kernels": gpu_kernels,
    "gpu_end_to_end": gpu_end_to_end,
    "headline": headline,
    "versions": versions,
    "record_formats": record_formats,
    "formats": formats,
}


def rewritten(text: str) -> str:
    """`text` with every table generated from the newest rows."""
    return BLOCK.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def main() -> None:
    """Updates the pages; with `--check`, only reports whether they are current."""
    for name in PAGES:
        page = ROOT / name
        text = page.read_text()
        if rewritten(text) != text and "--check" in sys.argv:
            sys.exit(f"{name} has tables older than bench/results; run: python -m bench.tables")
        page.write_text(rewritten(text))


if __name__ == "__main__":
    main()
