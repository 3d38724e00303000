"""gpu.md: what one run found, as a page: the machine, the checks, the tables, what was skipped."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from bench.gpu.nvml import COLUMNS
from bench.table_parts import markdown

Row = dict[str, Any]
_MACHINE = ("gpu", "driver", "cuda", "torch", "triton", "transformers", "commit", "dirty", "date")


def page(facts: dict[str, str], stages: dict[str, Sequence[Row]]) -> str:
    """The whole page; `stages` holds the rows of those that ran, in order."""
    head = "# GPU run\n\n"
    if facts["smoke"] == "yes":
        head += "**Smoke run: tiny sizes; no figure here means anything.**\n\n"
    names = [[name, facts[name]] for name in _MACHINE]
    names.append(["dense bf16 product, 8192^3", f"{facts['peak_tflops']} TFLOP/s"])
    sustained = f"{facts['sustained_tflops']} TFLOP/s {facts['sustained_mhz']}".strip()
    names.append(["the same after 2 s, MHz and watts", sustained])
    names.append(["clock and power (NVML)", facts["nvml"]])
    names.append(["copy, read and written", f"{facts['copy_gb_s']} GB/s"])
    parts = [head + markdown(["", ""], names)]
    if "queue" in stages:
        parts.append("## Queue\n\n" + queue(stages["queue"]))
    if "checks" in stages:
        parts.append("## Checks\n\n" + checks(stages["checks"]))
    else:
        parts.append("The checks were not part of this run (`--only`).\n")
    if "kernels" in stages:
        parts.append("## Single kernels\n\n" + kernels(stages["kernels"]))
    if "layer" in stages:
        parts.append("## One layer\n\n" + layer(stages["layer"]))
    if "gram" in stages:
        parts.append("## Gram matrices\n\n" + grams(stages["gram"]))
    if "steps" in stages:
        parts.append("## Steps of a layer\n\n" + steps(stages["steps"]))
    if "choices" in stages:
        parts.append("## Backends of a layer's stages\n\n" + choices(stages["choices"]))
    if "short" in stages:
        parts.append("## Short calls\n\n" + short(stages["short"]))
    if "products" in stages:
        parts.append("## Products\n\n" + products(stages["products"]))
    if "end2end" in stages:
        parts.append("## End to end\n\n" + end_to_end(stages["end2end"]))
    if "profile" in stages:
        parts.append("## One batch, kernel by kernel\n\n" + profiled(stages["profile"]))
    if "vllm" in stages:
        parts.append("## Layers inside vLLM\n\n" + vllm(stages["vllm"]))
    if "streaming" in stages:
        parts.append("## Streaming\n\n" + streaming(stages["streaming"]))
    return "\n".join(parts)


def choices(rows: Sequence[Row]) -> str:
    """CUDA's sort and saliency beside Triton's in whole layers, then what was not timed and why."""
    keys = ("ms_cuda", "ms_triton", "cuda/triton", "low", "high", "noise", "verdict")
    body = [
        [row["shape"], str(row["tokens"]), row["routing"], row["op"], *(row[key] for key in keys)]
        for row in rows
        if row["status"] == "timed"
    ]
    head = ["shape", "tokens", "routing", "op", "cuda, ms", "triton, ms", "cuda / triton"]
    head += ["99 % from", "to", "noise", "faster"]
    return (markdown(head, body) if body else "") + _untimed(
        rows,
        lambda row: f"{row['shape']} T={row['tokens']} {row['routing']}",
        lambda row: row["op"],
    )


def queue(rows: Sequence[Row]) -> str:
    """What became of each item of the queue."""
    keys = ("item", "answers", "result", "about_s", "seconds", "detail")
    head = ["item", "answers", "result", "estimate, s", "took, s", "what was found"]
    return markdown(head, [[str(row[key]) for key in keys] for row in rows])


def checks(rows: Sequence[Row]) -> str:
    """How many checks passed, and every one that did not."""
    counts = Counter(row["result"] for row in rows)
    text = ", ".join(f"{number} {result}" for result, number in sorted(counts.items())) + ".\n"
    others = [row for row in rows if row["result"] != "pass"]
    # One line a reason: a limit of a backend refuses many checks alike.
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in sorted(others, key=lambda row: row["result"]):
        key = (row["result"], row["backend"], row["detail"])
        reasons.setdefault(key, []).append(f"{row['check']} ({row['dtype']})")
    body = [[*key, _some(names)] for key, names in reasons.items()]
    if body:
        text += "\n" + markdown(["result", "backend", "why", "checks"], body)
    return text


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def kernels(rows: Sequence[Row]) -> str:
    """Figures of single kernels beside their goals, then what was not timed and why."""
    from bench.gpu.kernels import GOALS

    timed = [row for row in rows if row["status"] == "timed"]
    body = [
        [
            row["shape"],
            _length(row),
            row["kernel"],
            row["variant"],
            *(row[key] for key in ("us", "us_queued", "gb_s", "pct_copy")),
            *(row[key] for key in ("observed/unobserved", "ours/other")),
        ]
        for row in timed
    ]
    head = ["shape", "size", "kernel", "variant", "us", "us, launched one by one", "GB/s"]
    head += ["% of copy", "observed / unobserved", "time / other's"]
    goals = "; ".join(f"{name}: {goal}" for name, goal in GOALS.items())
    text = f"Goals of the CUDA kernels: {goals}.\n\n" + (markdown(head, body) if body else "")
    return text + _untimed(
        rows,
        lambda row: f"{row['shape']} {_length(row)} {row['kernel']}",
        lambda row: str(row["variant"]),
    )


def _length(row: Row) -> str:
    """Tokens of a layer's part, or experts and matrix of a dequantization."""
    if row["kernel"].startswith("dequantize"):
        return f"{row['E']} x {row['I']} x {row['H']}"
    if row["k"] == 1:
        return f"{row['tokens']} x {row['H']}"
    return f"T={row['tokens']}, k={row['k']}"


def layer(rows: Sequence[Row]) -> str:
    """Figures of one layer, then what was not timed and why."""
    body = [
        [
            f"{row['shape']} (E={row['E']}, k={row['k']}, H={row['H']}, I={row['I']})",
            str(row["tokens"]),
            row["routing"],
            f"{row['provider']}: {row['variant']}",
            row["observed"],
            row["ms"],
            row["tflops"],
            row["pct_peak"],
            row["pct_copy"],
            row["observed/unobserved"],
            row["transformers/observed"],
            *(row[key] for key in COLUMNS),
        ]
        for row in rows
        if row["status"] == "timed"
    ]
    head = ["shape", "tokens", "routing", "provider", "observed", "ms", "TFLOP/s", "% of peak"]
    head += ["% of copy", "observed / unobserved", "fastest transformers / ours observed"]
    head += ["MHz", "watts", "throttled"]
    return (markdown(head, body) if body else "") + _untimed(
        rows, lambda row: f"{row['shape']} T={row['tokens']} {row['routing']}"
    )


def grams(rows: Sequence[Row]) -> str:
    """What Gram matrices add to an observed layer, then what was not timed and why."""
    from bench.gpu.grams import GOAL, RATIO

    body = [
        [
            f"{row['shape']} (E={row['E']}, H={row['H']}, I={row['I']})",
            str(row["tokens"]),
            row["routing"],
            f"{row['provider']}: {row['variant']}",
            *(row[key] for key in ("ms", "ms_p20", "ms_p80", RATIO, "note")),
        ]
        for row in rows
        if row["status"] == "timed"
    ]
    head = ["shape", "tokens", "routing", "provider", "ms", "p20", "p80", "with / without", "note"]
    goal = f"Goal: at most {GOAL:.2f} of the observed pass at Qwen3-30B-A3B's shape.\n\n"
    return (
        goal
        + (markdown(head, body) if body else "")
        + _untimed(rows, lambda row: f"{row['shape']} T={row['tokens']} {row['routing']}")
    )


def steps(rows: Sequence[Row]) -> str:
    """Where the time of a layer goes, then what was not timed and why."""
    keys = ("step", "ms", "share", "pct_peak", "pct_copy", "sum_ms", "layer_ms")
    body = [
        [row["shape"], str(row["tokens"]), row["routing"], row["variant"], *(row[k] for k in keys)]
        for row in rows
        if row["status"] == "timed"
    ]
    head = ["shape", "tokens", "routing", "around the products", "step", "ms", "% of all steps"]
    head += ["% of peak", "% of copy", "all steps, ms", "without events, ms"]
    return (markdown(head, body) if body else "") + _untimed(
        rows,
        lambda row: f"{row['shape']} T={row['tokens']} {row['routing']}",
        lambda row: str(row["variant"]),
    )


def short(rows: Sequence[Row]) -> str:
    """Short calls by four clocks, then what was not timed and why."""
    from bench.gpu.short import FIGURES, RATIO

    body = [
        [
            row["shape"],
            str(row["tokens"]),
            f"{row['provider']}: {row['variant']}",
            row["observed"],
            *(row[key] for key in (*FIGURES, RATIO, "note")),
        ]
        for row in rows
        if row["status"] == "timed"
    ]
    head = ["shape", "tokens", "provider", "observed", "host's clock, ms", "until it returns, ms"]
    head += ["queued, ms", "CUDA graph, ms", "queued / fastest transformers", "note"]
    return (markdown(head, body) if body else "") + _untimed(
        rows, lambda row: f"{row['shape']} T={row['tokens']}"
    )


def products(rows: Sequence[Row]) -> str:
    """Kernels of both products side by side, then what was not timed and why."""
    from bench.gpu.products import RATIO

    keys = ("product", "provider", "ms", "ms_p20", "ms_p80", "tflops", "pct_peak", RATIO)
    keys += (*COLUMNS, "note")
    body = [
        [row["shape"], str(row["tokens"]), row["routing"], *(row[key] for key in keys)]
        for row in rows
        if row["status"] == "timed"
    ]
    head = ["shape", "tokens", "routing", "product", "kernel", "ms", "p20", "p80", "TFLOP/s"]
    head += ["% of peak", RATIO.replace("/", " / "), "MHz", "watts", "throttled", "note"]
    return (markdown(head, body) if body else "") + _untimed(
        rows,
        lambda row: f"{row['product']} of {row['shape']} T={row['tokens']} {row['routing']}",
        lambda row: str(row["provider"]),
    )


def end_to_end(rows: Sequence[Row]) -> str:
    """Figures of the whole model, then what was not timed and why."""
    timed = [row for row in rows if row["status"] == "timed"]
    body = [
        [
            f"{row['provider']}: {row['variant']}",
            row["observed"],
            f"{row['sequences']} x {row['length']}",
            str(row["batch"]),
            f"{row['seconds']} s",
            row["tokens_s"],
            f"{row['peak_gb']} GB" if row["peak_gb"] else "",
            row["time/transformers"],
            row["observed/unobserved"],
            row["note"],
        ]
        for row in timed
    ]
    head = ["provider", "observed", "tokens", "batch", "time", "tokens/s", "peak memory"]
    head += ["time / fastest transformers", "observed / unobserved", "note"]
    return (markdown(head, body) if body else "") + _untimed(rows, lambda row: str(row["model"]))


def profiled(rows: Sequence[Row]) -> str:
    """Kernels of one batch of the whole model, then why there are none."""
    keys = ("observed", "kernel", "calls", "ms", "share", "batch_ms")
    body = [[str(row[key]) for key in keys] for row in rows if row["status"] == "timed"]
    head = ["observed", "kernel", "calls", "ms", "% of the batch", "batch, ms"]
    return (markdown(head, body) if body else "") + _untimed(
        rows, lambda row: str(row["model"]), lambda row: "torch.profiler"
    )


def vllm(rows: Sequence[Row]) -> str:
    """Layers of vLLM under our plugin, then what was not timed and why."""
    from bench.gpu.vllm_layers import KINDS

    figures = [f"{kind}_ms" for kind in KINDS] + [f"{kind}/alone" for kind in KINDS[1:]]
    body = [
        [
            f"{row['shape']} (E={row['E']}, k={row['k']}, H={row['H']}, I={row['I']})",
            str(row["tokens"]),
            row["kernel"],
            *(row[key] for key in figures),
            row["note"],
        ]
        for row in rows
        if row["status"] == "timed"
    ]
    head = ["shape", "tokens", "kernel", *(key.replace("_", ", ") for key in figures), "note"]
    return (markdown(head, body) if body else "") + _untimed(
        rows, lambda row: f"{row['shape']} T={row['tokens']}", lambda row: f"vLLM {row['vllm']}"
    )


def streaming(rows: Sequence[Row]) -> str:
    """Layers loaded, computed and both at once; projected totals; then what was not timed."""
    from bench.gpu.streaming import GOAL

    text = f"Goal: overlapped within {GOAL:g} of the longer of loading and computing.\n\n"
    layers = [row for row in rows if row["status"] == "timed"]
    keys = ("format", "what", "gb", "load_s", "compute_s", "rounds", "overlapped_s")
    keys += ("overlapped/longer", "device_gb", "host_gb", "pinned_gb", "note")
    head = ["format", "layer", "GB read", "load, s", "compute, s", "times computed beside a load"]
    head += ["overlapped, s", "overlapped / longer", "device, GB", "host, GB", "pinned, GB", "note"]
    if layers:
        text += markdown(head, [[str(row[key]) for key in keys] for row in layers])
    totals = [row for row in rows if row["status"] == "projected"]
    keys = ("model", "sequences", "layers", "total_gb", "gb", "load_s", "compute_s")
    keys += ("overlapped_s", "total_s", "goal_s", "note")
    head = ["projected", "sequences", "layers", "GB", "GB per layer", "load, s per layer"]
    head += ["compute, s per layer", "overlapped, s per layer", "total, s", "goal, s", "how"]
    if totals:
        text += "\n" + markdown(head, [[str(row[key]) for key in keys] for row in totals])
    others = [row for row in rows if row["status"] not in ("timed", "projected")]
    return text + _untimed(others, lambda row: str(row["what"]), lambda row: str(row["model"]))


def _provider(row: Row) -> str:
    return f"{row['provider']}: {row['variant']}"


def _untimed(
    rows: Sequence[Row], where: Callable[[Row], str], who: Callable[[Row], str] = _provider
) -> str:
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "timed":
            reasons.setdefault((row["status"], who(row), row["note"]), []).append(where(row))
    body = [[*key, _some(list(dict.fromkeys(names)))] for key, names in reasons.items()]
    if not body:
        return ""
    return "\nNot timed:\n\n" + markdown(["status", "what", "why", "where"], body)
