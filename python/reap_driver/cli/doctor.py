"""`reap-kernels doctor`: what this machine offers, for choosing a backend and for bug reports."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from reap_driver.base.units import row
from reap_driver.workflow.console import Console

NAME = "doctor"
SUMMARY = "show versions, devices, and which kernels serve here and why"
DESCRIPTION = """\
Shows what a bug report needs: versions, CPU features, GPUs, and for each device and dtype the
kernel backend that serves, with the reason why the others do not. On a GPU it runs the kernels'
self-checks that are due and shows what they found.
"""
EXAMPLES = """\
examples:
  reap-kernels doctor
  reap-kernels doctor --json > machine.json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Takes no arguments of its own."""


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Collects and shows the report."""
    from reap_driver.base.requirements import installation
    from reap_kernels.doctor import report

    facts = {**report(), "installation": installation()}
    cpu = facts["cpu"]
    rows = [("python", facts["python"]), ("platform", facts["platform"])]
    rows += [(name, version or "not installed") for name, version in facts["packages"].items()]
    installed = facts["installation"]
    rows += [(name, installed[name]["folder"]) for name in ("reap_kernels", "reap_driver")]
    rows += [("PROBLEM", text) for text in installed["problems"]]
    rows += [("nvcc", facts["nvcc"] or "not found")]
    kernels = facts["cuda_kernels"]
    rows += [("CUDA kernels", kernels["reason"] or f"built with CUDA {kernels['cuda']}")]
    rows += [("CPU", f"{cpu['capability']}, {cpu['threads']} threads")]
    rows += [
        ("", f"computes {dtype} in {used.removeprefix('torch.')}")
        for dtype, used in cpu["computes"].items()
    ]
    rows += [
        (
            "GPU",
            f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_bytes'] / 1e9:.0f} GB",
        )
        for gpu in facts["gpus"]
    ] or [("GPU", "none")]
    console.say("\n".join(row(name, value, 14) for name, value in rows))
    for device in dict.fromkeys(b["device"] for b in facts["backends"]):
        console.say("\n" + "\n".join(_kernels(device, facts["backends"])))
    for arch, origins in facts["launch_tables"].items():
        said = "; then ".join(origins) or "by arithmetic, no table"
        console.say(f"\nlaunches on {arch}: {said}")
        reasons: dict[str, list[str]] = {}  # reason -> lines
        for line, reason in facts["launches_off"][arch].items():
            reasons.setdefault(reason, []).append(line)
        for reason, lines in reasons.items():
            console.say("\n".join([f"  off, {reason}:", *(f"    {line}" for line in lines)]))
    checks = facts["selfcheck"]
    console.say(f"\nself-checks of compiled kernels\n{row('  in', checks['file'], 10)}")
    for what, reason in checks["verdicts"].items():
        console.say(row("  passed" if reason is None else "  FAILED", what, 10))
        if reason is not None:
            console.say(row("", reason, 10))
    if not checks["verdicts"]:
        console.say("  none yet: each runs once, before its kernel first serves a GPU")
    return dict(facts)


def _kernels(device: str, backends: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each op, and one for each reason why backends do not serve. Dtypes are named where
    they differ.
    """
    own = [b for b in backends if b["device"] == device]
    dtypes = list(dict.fromkeys(b["dtype"] for b in own))
    serves: dict[str, dict[str, list[str]]] = {}  # op -> what serves -> its dtypes
    refused: dict[str, dict[tuple[str, str], list[str]]] = {}  # reason -> backend, op -> dtypes
    for op in dict.fromkeys(b["op"] for b in own):
        for dtype in dtypes:
            each = {b["backend"]: b["reason"] for b in own if (b["op"], b["dtype"]) == (op, dtype)}
            chosen = next((name for name, reason in each.items() if reason is None), "none")
            behind = [name for name, reason in each.items() if reason == f"{chosen} comes first"]
            text = f"{chosen}; else {', '.join(behind)}" if behind else chosen
            serves.setdefault(op, {}).setdefault(text, []).append(dtype)
            for name, reason in each.items():
                if reason is not None and name not in behind:
                    refused.setdefault(reason, {}).setdefault((name, op), []).append(dtype)
    lines = [f"kernels on {device}: the backend that serves; else what could be named"]
    for op, found in serves.items():
        lines += [row(f"  {op}", text + _of(named, dtypes), 14) for text, named in found.items()]
    for reason, which in refused.items():
        ops: dict[str, list[str]] = {}
        for (name, op), named in which.items():
            ops.setdefault(name, []).append(op + _of(named, dtypes))
        each_of = (f"{name} ({', '.join(own_ops)})" for name, own_ops in ops.items())
        lines.append(row("  not", f"{', '.join(each_of)}: {reason}", 14))
    return lines


def _of(named: Sequence[str], every: Sequence[str]) -> str:
    """The dtypes that something holds for, where they are not all."""
    return "" if len(named) == len(every) else f" ({', '.join(named)})"
