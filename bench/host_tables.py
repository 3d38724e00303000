"""Tables of our code inside other frameworks."""

from bench.table_parts import markdown, newest


def llm_compressor_cpu() -> str:
    """llm-compressor's REAP alone and with our modifier."""
    rows = newest("llm_compressor_cpu", "dtype", "pipeline", "all_experts")
    body = [
        [
            row["dtype"],
            f"`{row['pipeline']}`",
            row["all_experts"],
            f"{float(row['alone_s']):.1f} s",
            f"{float(row['ours_s']):.1f} s",
            f"**{float(row['alone/ours']):.1f}x**",
            row["layers_alike"],
        ]
        for row in rows
    ]
    head = [
        "dtype",
        "pipeline",
        "every expert for every token",
        "llm-compressor alone",
        "with our modifier",
        "faster by",
        "layers that keep the same",
    ]
    first = rows[0]
    where = (
        f"\n{first['sequences']} x {first['length']} tokens, the model of "
        f"[Figures](../figures.md), medians of {first['rounds']} rounds; {first['cpu']}, "
        f"{first['threads']} thread, torch {first['torch']}, transformers "
        f"{first['transformers']}, llm-compressor {first['llmcompressor']}, commit "
        f"{first['commit']}; `python -m bench llm_compressor_cpu`.\n"
    )
    return markdown(head, body) + where


def vllm_cpu() -> str:
    """A layer of vLLM under our plugin."""
    rows = newest("vllm_cpu", "tokens")
    kinds = ("again", "off", "opaque", "masked", "replace", "shadow")
    body = [
        [row["tokens"], f"{float(row['alone_us']) / 1e3:.2f} ms"]
        + [f"{float(row[f'{kind}/alone']):.2f}" for kind in kinds]
        + [f"{float(row['replace_added_us']) / 1e3:.2f} ms"]
        for row in rows
    ]
    head = ["tokens of a call", "vLLM's own", "vLLM's own, again", "off, `--enforce-eager`"]
    head += ["off, compiled", "masked", "observed, `replace`", "observed, `shadow`"]
    head += ["`replace` adds"]
    first, rounds = rows[0], sorted({int(row["rounds"]) for row in rows})
    span = " to ".join(map(str, dict.fromkeys((rounds[0], rounds[-1]))))
    where = (
        f"\nRatios of the CPU time of one layer call to vLLM's own, medians of {span} rounds in "
        "which all take turns; the first column of ratios is the noise. "
        f"H={first['hidden']}, I={first['intermediate']}, E={first['experts']}, "
        f"k={first['top_k']}, {first['dtype']}, a quarter of the experts masked; {first['cpu']}, "
        f"{first['threads']} thread, torch {first['torch']}, vLLM {first['vllm']} "
        f"({first['kernel']}), commit {first['commit']}; `python -m bench vllm_cpu`.\n"
    )
    return markdown(head, body) + where
