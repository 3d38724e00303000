"""`python -m bench.gpu`: checks, then timings, then rows and a page; nothing is timed on red."""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import gpu, rows
from bench.gpu.clock import Deadline

STAGES = ("checks", "kernels", "layer", "gram", "end2end", "tiles", "vllm", "streaming")
# Left out unless asked for: tiles is for who writes a launch table, vllm needs vLLM, and streaming
# fills tens of GB.
DEFAULT = STAGES[:-3]
FILES = {
    "checks": "gpu_checks",
    "kernels": "gpu_kernels",
    "layer": "gpu_layer",
    "gram": "gpu_gram",
    "end2end": "gpu_end_to_end",
    "tiles": "gpu_tiles",
    "vllm": "gpu_vllm",
    "streaming": "gpu_streaming",
}
# Seconds for all stages but streaming, and for streaming, which comes on top.
BUDGET, STREAMING = 440, 240
# Shares of the budget by whose end a stage starts nothing more; the last one may take what is left.
_ENDS = {
    "checks": 0.46,
    "kernels": 0.56,
    "layer": 0.73,
    "gram": 0.79,
    "end2end": 0.97,
    "tiles": 0.97,
    "vllm": 0.97,
}
_LAST = 0.97
RED, NO_GPU = 1, 4

Rows = list[dict[str, object]]


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """The parsed command line."""
    from bench.gpu import streaming

    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=gpu.__doc__, epilog=streaming.help_text()
    )
    parser.add_argument(
        "--only",
        default=",".join(DEFAULT),
        help=f"stages, comma-separated, of {', '.join(STAGES)}; "
        "default all but tiles, vllm and streaming",
    )
    parser.add_argument(
        "--budget",
        type=float,
        help=f"seconds for everything; default {BUDGET}, and {STREAMING} more for streaming",
    )
    parser.add_argument(
        "--folder", type=Path, help="where streaming writes; default the system's temporary folder"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for rows and gpu.md; default bench/results, and with --smoke, whose rows are "
        "no results, a new temporary folder",
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, also without a GPU")
    parser.add_argument("--commit", help="what to record where git cannot say")
    options = parser.parse_args(arguments)
    options.only = [stage for stage in options.only.split(",") if stage]
    unknown = set(options.only) - set(STAGES)
    if unknown or not options.only:
        parser.error(
            f"--only takes {', '.join(STAGES)}; got {', '.join(sorted(unknown)) or 'none'}"
        )
    if options.folder is not None and not options.folder.is_dir():
        parser.error(f"--folder {options.folder}: no such folder")
    return options


def deadlines(only: Sequence[str], budget: float | None) -> dict[str, Deadline]:
    """When each of the stages asked for starts nothing more, from now on."""
    others = [stage for stage in only if stage != "streaming"]
    planned = (BUDGET if others else 0) + (STREAMING if "streaming" in only else 0)
    scale = 1.0 if budget is None else budget / planned
    ends = {stage: share * BUDGET * scale for stage, share in _ENDS.items()}
    if others:
        ends[max(others, key=STAGES.index)] = _LAST * BUDGET * scale
    ends["streaming"] = _LAST * planned * scale
    return {stage: Deadline(seconds) for stage, seconds in ends.items()}


def main(arguments: Sequence[str]) -> int:
    """Runs the stages asked for; 0, RED or NO_GPU."""
    options = options_of(arguments)
    device = _device(options.smoke)
    if device is None:
        print(
            "python -m bench.gpu needs a CUDA device, and torch "
            f"{torch.__version__} sees none (or TRITON_INTERPRET=1 is set, which is for the CPU); "
            "run it on a GPU, or with --smoke to see that everything runs",
            file=sys.stderr,
        )
        return NO_GPU
    if options.smoke and options.out is None:
        options.out = Path(tempfile.mkdtemp(prefix="reap-smoke-"))
        print(f"--smoke: rows go to {options.out}, not to bench/results", flush=True)
    from bench.gpu.machine import survey

    budget = deadlines(options.only, options.budget)
    machine = survey(device, options.smoke, options.commit)
    print("  ".join(f"{key}={value}" for key, value in machine.facts.items()), flush=True)
    stages: dict[str, Rows] = {}
    for stage in STAGES:
        if stage in options.only:
            stages[stage] = _stage(stage, machine, budget[stage], options.folder)
            _report(options.out or rows.RESULTS, stage, machine.facts, stages)
            if any(_status(row) == "failed" for row in stages[stage]):
                return RED
    return 0


def _device(smoke: bool) -> torch.device | None:
    """The current CUDA device; in smoke mode else the CPU, with Triton interpreted."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if torch.cuda.is_available() and not interpreted:
        return torch.device("cuda", torch.cuda.current_device())
    if not smoke:
        return None
    os.environ["TRITON_INTERPRET"] = "1"
    return torch.device("cpu")


def _stage(stage: str, machine: Any, deadline: Deadline, folder: Path | None) -> Rows:
    """Rows of one stage."""
    from bench.gpu import end_to_end, grams, kernels, layer, streaming, tiles, vllm_layers

    if stage == "checks":
        from tests.gpu import running

        return running.run(machine.device, running.plan(machine.smoke), deadline)
    if stage == "kernels":
        return kernels.run(machine, deadline)
    if stage == "layer":
        return layer.run(machine, layer.plan(machine.smoke), deadline)
    if stage == "gram":
        return grams.run(machine, deadline)
    if stage == "end2end":
        return end_to_end.run(machine, deadline)
    if stage == "tiles":
        return tiles.run(machine, deadline)
    if stage == "vllm":
        return vllm_layers.run(machine, deadline)
    return streaming.run(machine, deadline, folder)


def _status(row: dict[str, object]) -> object:
    return row["result"] if "result" in row else row["status"]


def _report(folder: Path, stage: str, facts: dict[str, str], stages: dict[str, Rows]) -> None:
    """Appends the stage's rows, rewrites gpu.md, prints what is not green."""
    from bench.gpu import report

    echo = stage in ("gram", "end2end", "tiles", "vllm", "streaming")
    rows.write(FILES[stage], stages[stage], folder=folder, facts=facts, echo=echo)
    (folder / "gpu.md").write_text(report.page(facts, stages))
    for row in stages[stage]:
        if _status(row) == "failed":
            print("FAILED  " + "  ".join(f"{k}={v}" for k, v in row.items() if v), flush=True)
    if stage == "checks":
        print(report.checks(stages[stage]), flush=True)
    elif stage == "end2end":
        print(report.end_to_end(stages[stage]), flush=True)
    elif stage == "streaming":
        print(report.streaming(stages[stage]), flush=True)
