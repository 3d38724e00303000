"""`python -m bench.gpu`: checks, then timings, then rows and a page; nothing is timed on red."""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench import gpu, rows
from bench.gpu import selection
from bench.gpu.clock import Deadline
from bench.gpu.queue import ITEMS, Item
from reap_kernels import cuda

STAGES = (
    "checks",
    "kernels",
    "layer",
    "gram",
    "end2end",
    "steps",
    "choices",
    "short",
    "products",
    "profile",
    "tiles",
    "vllm",
    "streaming",
)
# Left out unless asked for: those from steps to tiles are for who looks for time, vllm needs vLLM,
# and streaming fills tens of GB.
DEFAULT = STAGES[:5]
FILES = {
    "checks": "gpu_checks",
    "kernels": "gpu_kernels",
    "layer": "gpu_layer",
    "gram": "gpu_gram",
    "end2end": "gpu_end_to_end",
    "steps": "gpu_steps",
    "choices": "gpu_choices",
    "short": "gpu_short",
    "products": "gpu_products",
    "profile": "gpu_profile",
    "tiles": "gpu_tiles",
    "vllm": "gpu_vllm",
    "streaming": "gpu_streaming",
}
QUEUE_FILE = "gpu_queue"
# Modules of stages that are named otherwise.
_MODULES = {"gram": "grams", "end2end": "end_to_end", "vllm": "vllm_layers"}
# Seconds for all stages but streaming, for streaming, which comes on top, and for the queue.
BUDGET, STREAMING, QUEUE = 440, 240, 480
# Shares of the budget by whose end a stage starts nothing more; the last one may take what is left.
_LAST = 0.97
_ENDS = {
    "checks": 0.46,
    "kernels": 0.56,
    "layer": 0.73,
    "gram": 0.79,
    "end2end": 0.97,
    **dict.fromkeys(("steps", "choices", "short", "products", "profile", "tiles", "vllm"), _LAST),
}
RED, NO_GPU = 1, 4

Rows = list[dict[str, object]]


def _parser() -> argparse.ArgumentParser:
    """All options."""
    from bench.gpu import streaming

    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=gpu.__doc__, epilog=streaming.help_text()
    )
    parser.add_argument(
        "--only",
        help=f"stages, comma-separated, of {', '.join(STAGES)}; "
        f"default all but {', '.join(STAGES[5:-1])} and streaming",
    )
    parser.add_argument(
        "--budget",
        type=float,
        help=f"seconds for everything; default {BUDGET}, and {STREAMING} more for streaming; "
        f"{QUEUE} with --queue",
    )
    parser.add_argument(
        "--queue",
        action="store_true",
        help="instead of stages, what docs/gpu-status.md leaves open, weightiest first, as far as "
        "the budget reaches",
    )
    parser.add_argument(
        "--items",
        help="with --queue, some of its items, comma-separated: "
        + ", ".join(item.name for item in ITEMS),
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
    selection.add(parser)
    return parser


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """The parsed command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.queue and options.only is not None:
        parser.error(f"--queue runs items, no stages, so --only {options.only} has no meaning")
    only = ",".join(DEFAULT) if options.only is None else options.only
    options.only = [stage for stage in only.split(",") if stage]
    unknown = set(options.only) - set(STAGES)
    if unknown or not options.only:
        parser.error(
            f"--only takes {', '.join(STAGES)}; got {', '.join(sorted(unknown)) or 'none'}"
        )
    if options.budget is not None and not 0 < options.budget < math.inf:
        parser.error(f"--budget takes seconds, a number above 0; got {options.budget:g}")
    options.items = _items(parser, options)
    options.selection = selection.of(parser, options)
    if options.folder is not None and not options.folder.is_dir():
        parser.error(f"--folder {options.folder}: no such folder")
    return options


def _items(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Item]:
    """The items asked for, in the order of the queue."""
    if options.items is None:
        return list(ITEMS)
    if not options.queue:
        parser.error(f"--items {options.items} takes --queue as well")
    names = [name.strip() for name in options.items.split(",") if name.strip()]
    unknown = set(names) - {item.name for item in ITEMS}
    if unknown or not names:
        known = ", ".join(item.name for item in ITEMS)
        parser.error(f"--items takes {known}; got {', '.join(sorted(unknown)) or 'none'}")
    return [item for item in ITEMS if item.name in names]


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
    found = Found(options.out or rows.RESULTS)
    return _queue(options, device, found) if options.queue else _stages(options, device, found)


def _stages(options: argparse.Namespace, device: torch.device, found: "Found") -> int:
    """Runs stages; nothing is timed on red."""
    from bench.gpu.machine import survey

    budget = deadlines(options.only, options.budget)
    machine = survey(device, options.smoke, options.commit)
    print("  ".join(f"{key}={value}" for key, value in machine.facts.items()), flush=True)
    for stage in STAGES:
        if stage in options.only:
            own = _stage(stage, machine, budget[stage], options)
            found.add(stage, machine.facts, own)
            if any(_status(row) == "failed" for row in own):
                return RED
    return 0


def _queue(options: argparse.Namespace, device: torch.device, found: "Found") -> int:
    """Runs the queue; RED where an item failed, whatever ran after it."""
    from bench.gpu import queue_run

    budget = float(QUEUE if options.budget is None else options.budget)
    print(queue_run.plan(options.items, budget), flush=True)
    if device.type == "cuda" and (reason := cuda.refusal(device)) is not None:
        print(f"without CUDA kernels, whose checks and times are skipped: {reason}", flush=True)
    own = queue_run.Options(
        device, options.smoke, options.commit, options.folder, options.selection
    )
    try:
        outcomes = queue_run.run(options.items, budget, own, found.add)
    except queue_run.Lost as error:
        print(f"the queue could not begin: {error}", file=sys.stderr)
        return RED
    names = queue_run.rest(outcomes)
    if names:
        seconds = sum(item.seconds for item in options.items if item.name in names)
        again = f'python -m bench.gpu --queue --items "{",".join(names)}"'
        print(f"still in the queue, about {seconds:.0f} s: {again}", flush=True)
    return RED if any(row["result"] == "failed" for row in outcomes) else 0


def _device(smoke: bool) -> torch.device | None:
    """The current CUDA device; in smoke mode else the CPU, with Triton interpreted."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if torch.cuda.is_available() and not interpreted:
        return torch.device("cuda", torch.cuda.current_device())
    if not smoke:
        return None
    os.environ["TRITON_INTERPRET"] = "1"
    return torch.device("cpu")


def _stage(stage: str, machine: Any, deadline: Deadline, options: argparse.Namespace) -> Rows:
    """Rows of one stage."""
    if stage == "checks":
        from tests.gpu import processes, running

        return processes.run(machine.device, running.plan(machine.smoke), deadline)
    module: Any = import_module(f"bench.gpu.{_MODULES.get(stage, stage)}")
    if stage == "layer":
        cases, rounds = module.plan(machine.smoke), options.selection.rounds or module.ROUNDS
        return module.run(machine, options.selection.cases(cases), deadline, rounds=rounds)
    if stage == "streaming":
        return module.run(machine, deadline, options.folder)
    if stage in ("choices", "tiles", "vllm"):
        return module.run(machine, deadline)
    return module.run(machine, deadline, options.selection)


def _status(row: dict[str, object]) -> object:
    return row["result"] if "result" in row else row["status"]


class Found:
    """Rows of a run, written as they come.

    Args:
        folder: of the rows' files and of gpu.md.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stages: dict[str, Rows] = {}

    def add(self, stage: str, facts: dict[str, str], own: Rows) -> None:
        """Appends a stage's rows, rewrites gpu.md, prints what is not green."""
        from bench.gpu import choices, report

        self._stages.setdefault(stage, []).extend(own)
        echo = stage not in ("checks", "kernels", "layer", "steps", "short", "products", "profile")
        file = FILES.get(stage, QUEUE_FILE)
        rows.write(file, own, folder=self.folder, facts=facts, echo=echo)
        (self.folder / "gpu.md").write_text(report.page(facts, self._stages))
        if stage == "choices" and facts["smoke"] == "no":
            choices.propose(self.folder, facts, own)
        for row in own:
            if stage != "queue" and _status(row) == "failed":
                print("FAILED  " + "  ".join(f"{k}={v}" for k, v in row.items() if v), flush=True)
        if stage == "checks":
            print(report.checks(own), flush=True)
        elif stage == "end2end":
            print(report.end_to_end(own), flush=True)
        elif stage == "streaming":
            print(report.streaming(own), flush=True)
