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
