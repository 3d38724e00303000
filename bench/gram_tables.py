"""Tables of Gram matrices and of what they are summed for: time and memory."""

from bench.table_parts import markdown, newest


def gram_cpu() -> str:
    """The observed forward with Gram matrices, compared with that without."""
    rows = newest("gram_cpu", "dtype", "sequences")
    body = [
        [
            row["dtype"],
            f"{int(row['sequences']) * int(row['length']):,}",
            f"{float(row['observed_s']):.1f} s",
            f"{float(row['with_gram_s']):.1f} s",
            f"**{float(row['with_gram/observed']):.2f}** ({float(row['least_ratio']):.2f} to "
            f"{float(row['most_ratio']):.2f})",
        ]
        for row in rows
    ]
    first = rows[0]
    commits, rounds = (dict.fromkeys(row[key] for row in rows) for key in ("commit", "rounds"))
    where = (
        f"\nThe same model at batches of {first['batch']} x {first['length']} tokens, seconds of "
        f"the process, medians of {', '.join(rounds)} rounds; with few tokens it shows that "
        f"{first['gram_mb']} MB of sums are set up and returned; "
        f"statistics bitwise equal; {first['cpu']}, {first['threads']} thread, torch "
        f"{first['torch']}, commit {', '.join(commits)}; `python -m bench gram_cpu`.\n"
    )
    head = ["dtype", "tokens", "observed", "with Gram matrices", "with / without (least and most)"]
    return markdown(head, body) + where


def obs_cpu() -> str:
    """What the removal of neurons takes."""
    rows = {row["model"]: row for row in newest("obs_cpu", "model")}
    small, large = rows["bundled"], rows["Qwen3-30B-A3B"]
    return (
        f"Removing neurons by Optimal Brain Surgeon takes {small['model_s']} s of one CPU thread "
        f"for all {int(small['experts']) * int(small['layers'])} experts of the bundled model "
        f"({small['width']} to {small['keep']} neurons). An expert of {large['model']}'s shape "
        f"({large['width']} to {large['keep']} neurons, hidden size {large['hidden']}) takes "
        f"{float(large['expert_s']):.2f} s (measured on {large['measured_experts']}), so a layer "
        f"of {large['experts']} experts {float(large['layer_s']):.0f} s, and {large['layers']} "
        f"layers {float(large['model_s']) / 60:.0f} minutes; "
        f"commit {large['commit']}; `python -m bench obs_cpu`.\n"
    )


def stream_gram_cpu() -> str:
    """Memory of a streamed run with Gram matrices."""
    row = newest("stream_gram_cpu", "dtype")[-1]
    return (
        f"Streamed observation of the same {row['layers']} layers with Gram matrices, and with "
        f"the neurons of every layer removed as soon as it is complete, peaks at "
        f"{row['gram_memory_mb']} MB; without them at {row['streamed_memory_mb']} MB. A layer has "
        f"{row['layer_mb']} MB of weights and {row['layer_gram_mb']} MB of Gram matrices; "
        f"commit {row['commit']}; `python -m bench stream_cpu --gram`.\n"
    )


def refit_cpu() -> str:
    """A re-fit, in observing passes."""
    row = newest("refit_cpu", "tokens")[-1]
    return (
        f"Re-fitting the same model without {int(row['experts']) - int(row['kept'])} of its "
        f"{row['experts']} experts per layer takes {float(row['refit/observed']):.1f} times an "
        f"observing pass of the same {row['tokens']} tokens; commit {row['commit']}; `python -m "
        "bench refit_cpu`.\n"
    )
