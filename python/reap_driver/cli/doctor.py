"""`reap-kernels doctor`: what this machine offers, for choosing a backend and for bug reports."""

import argparse
from typing import Any

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
    console.say("\n".join(f"{name:<14}{value}" for name, value in rows))
    console.say("\nbackends (op, backend: chosen, or why not)")
    for device, dtype in dict.fromkeys((b["device"], b["dtype"]) for b in facts["backends"]):
        console.say(f"  {device} {dtype}")
        for b in facts["backends"]:
            if (b["device"], b["dtype"]) == (device, dtype):
                console.say(f"    {b['op']:<10}{b['backend']:<11}{b['reason'] or 'chosen'}")
    for arch, origins in facts["launch_tables"].items():
        console.say(f"\nlaunches on {arch}: {'; then '.join(origins) or 'by arithmetic, no table'}")
    checks = facts["selfcheck"]
    console.say(f"\nself-checks of compiled kernels, kept in {checks['file']}")
    for what, reason in checks["verdicts"].items():
        console.say(f"  {'passed' if reason is None else 'FAILED'}  {what}")
        if reason is not None:
            console.say(f"          {reason}")
    if not checks["verdicts"]:
        console.say("  none yet: each runs once, before its kernel first serves a GPU")
    return dict(facts)
