"""Tables of methods of pruning, and of criteria, on the bundled model."""

from bench.table_parts import Row, markdown, newest

TITLES = {
    "random": "experts at random",
    "frequency": "frequency",
    "ean_sum": "EAN",
    "hc_smoe": "HC-SMoE, experts merged",
    "m_smoe": "M-SMoE, experts merged",
    "reap": "REAP",
    "reap_constants": "REAP, constants for removed experts",
    "obs_width": "neurons only",
    "obs": "experts and neurons",
    "obs_auto": "experts and neurons, shape chosen by `auto`",
    "reap_refit": "REAP, re-fitted",
    "obs_refit": "experts and neurons, re-fitted",
    "reap_searched": "REAP, budgets searched",
}


def _interval(row: Row, name: str, scale: float, digits: int) -> str:
    """Mean and half the 95 % interval; nothing for what was not recorded."""
    if name not in row:
        return ""
    middle, half = (scale * float(row[key]) for key in (name, f"{name}_half"))
    return f"{middle:.{digits}f} ± {half:.{digits}f}"


def criteria_cpu() -> str:
    """Criteria and allocations, by expected acceptance."""
    rows = newest("criteria_cpu", "criterion", "allocation", "ratio")
    body = [
        [
            f"{float(row['ratio']):.0%}",
            row["criterion"],
            row["allocation"],
            _interval(row, "acceptance", 100, 2) + " %",
            _interval(row, "perplexity", 1, 2),
            _interval(row, "same_top", 100, 1) + " %",
        ]
        for row in _by_acceptance(rows)
    ]
    head = ["removed", "criterion", "allocation", "expected acceptance", "perplexity"]
    searched = [row["evaluations"] for row in rows if row["evaluations"]]
    where = f"\nMeans of {rows[0]['seeds']} draws of the calibration text and 95 % intervals; "
    where += f"{', '.join(dict.fromkeys(searched))} candidates a search; " if searched else ""
    where += f"commit {rows[0]['commit']}; `python -m bench criteria_cpu`.\n"
    return markdown([*head, "same most likely token"], body) + where


def methods_cpu() -> str:
    """Methods, by expected acceptance; searched budgets from the rows of criteria."""
    rows = [row for row in _methods() if row["text"] == "held out"]
    searched = [
        {**row, "method": "reap_searched", "checkpoint": "transformers only"}
        for row in newest("criteria_cpu", "criterion", "allocation", "ratio")
        if row["allocation"] == "searched"
    ]
    body = [
        [
            f"{float(row['ratio']):.0%}",
            TITLES[row["method"]],
            row.get("shape", "by layer"),
            _interval(row, "acceptance", 100, 2) + " %",
            _interval(row, "kl", 1, 3),
            _interval(row, "perplexity", 1, 2),
            row.get("mb", ""),
            row.get("cpu_s", ""),
            row["checkpoint"],
        ]
        for row in _by_acceptance([*rows, *searched])
    ]
    head = ["removed", "method", "experts (x neurons)", "expected acceptance", "KL", "perplexity"]
    head += ["file, MB", "CPU s", "checkpoint"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    where = f"\nMeans of {rows[0]['draws']} draws of the calibration text and 95 % intervals; CPU "
    where += f"seconds of one thread without the observation; commit {commits}; `python -m bench "
    return markdown(head, body) + where + "methods_cpu`.\n"


def methods_shift() -> str:
    """Methods on the domains of the calibration text, and on others."""
    rows = [row for row in _methods() if row["text"] != "held out"]
    found = {(row["method"], row["text"]): row for row in rows}
    body = []
    for name in dict.fromkeys(row["method"] for row in rows):
        line = [TITLES[name], found[name, "seen"]["shape"]]
        for text in ("seen", "unseen"):
            own, reap = (float(found[key, text]["acceptance"]) for key in (name, "reap"))
            line += [_interval(found[name, text], "acceptance", 100, 2) + " %"]
            line += [f"{100 * (own - reap):+.2f}" if name != "reap" else ""]
        body.append(line)
    head = ["method", "experts (x neurons)", "acceptance, seen", "over REAP", "acceptance, unseen"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    where = f"\n50 % removed; means over {rows[0]['draws']} pairs of domains and 95 % intervals; "
    where += f"commit {commits}; `python -m bench methods_cpu --shift`.\n"
    return markdown([*head, "over REAP"], body) + where


def _methods() -> list[Row]:
    return newest("methods_cpu", "method", "ratio", "text")


def _by_acceptance(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (float(row["ratio"]), -float(row["acceptance"])))
