"""What docs/gpu-status.md leaves open and one machine with one GPU can answer, weightiest first.

`python -m bench.gpu --queue --budget SECONDS` runs these items (`bench.gpu.queue_run` says how);
a test holds them equal to the page: a line that is open there ends with the items that answer it,
`*(queue: NAME, NAME)*`, or with what else it takes, `*(needs: two GPUs)*`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.gpu.clock import Deadline
from bench.gpu.machine import Machine
from bench.gpu.selection import PLANNED, Selection

Row = dict[str, object]
PAGE = Path(__file__).parent.parent.parent / "docs" / "gpu-status.md"
# What a line of the page may need instead of an item.
NEEDS = (
    "a published checkpoint",
    "a server of vLLM",
    "an AMD GPU",
    "an item",  # one machine with one GPU could, and nothing in the queue does yet
    "another GPU",
    "llm-compressor",
    "two GPUs",
)
_SECTION = "## Never run on a GPU"
_MARK = re.compile(r"\*\(((?:queue|needs): [^()]*)\)\*$")


@dataclass(frozen=True)
class At:
    """Where and until when an item runs.

    Attributes:
        machine: the device, its peaks, and whether sizes are tiny.
        deadline: by when it starts nothing more.
        folder: where files are written; None is the system's temporary folder.
        selection: what timings are narrowed to.
    """

    machine: Machine
    deadline: Deadline
    folder: Path | None = None
    selection: Selection = PLANNED


@dataclass(frozen=True)
class Item:
    """One question to a GPU.

    Attributes:
        name: what the page calls it.
        answers: how the page's lines begin.
        seconds: what it is thought to take on an H200, compilation included; measured nowhere.
        stage: whose file of rows (`bench.gpu.command.FILES`) and part of gpu.md it fills.
        run: its rows, as that stage has them; imports what it needs.
    """

    name: str
    answers: tuple[str, ...]
    seconds: float
    stage: str
    run: Callable[[At], list[Row]]


@dataclass(frozen=True)
class Line:
    """An open line of the page: its text without the mark, and what the mark names."""

    text: str
    items: tuple[str, ...]
    needs: tuple[str, ...]


def _checks(module: str, at: At) -> list[Row]:
    """Every check of a module of `tests.gpu`, in processes as `pytest -m gpu` runs them; one where
    all would be interpreted.
    """
    from importlib import import_module

    from tests.gpu import processes

    plan = import_module(f"tests.gpu.{module}").plan(at.machine.smoke)
    plan = plan[:1] if at.machine.smoke else plan
    return processes.run(at.machine.device, plan, at.deadline)


def _group(module: str, groups: tuple[str, ...], at: At) -> list[Row]:
    """Groups of checks of a module of `tests.gpu`; the first where the CPU would only be compared
    with itself.
    """
    from importlib import import_module

    from tests.gpu import models, processes

    here = import_module(f"tests.gpu.{module}")
    every = [check for name in groups for check in models.checks(getattr(here, name))]
    return processes.run(at.machine.device, every[: 1 if at.machine.smoke else None], at.deadline)


def _layer_checks(at: At) -> list[Row]:
    """Of the layer's checks and the GPU's own facts, those in bf16."""
    import torch

    from tests.gpu import checks, facts, processes

    every = [*facts.plan(False), *checks.plan(False)]
    some = [check for check in every if check.dtype == torch.bfloat16]
    if at.machine.smoke:
        some = checks.plan(smoke=True)[:1]
    return processes.run(at.machine.device, some, at.deadline)


def _sanitized(tool: str, at: At) -> list[Row]:
    """One tool of compute-sanitizer on one small variant of each CUDA kernel."""
    import time

    from tests.gpu import sanitize

    start, reason = time.perf_counter(), sanitize.absent()
    result, detail = "skipped", reason or ""
    if reason is None:
        clean, detail, output = sanitize.checked(tool, True, max(1.0, at.deadline.left()))
        result = "pass" if clean else "failed"
        detail += "" if clean else f": {' '.join(output.split())[:400]}"
    row: Row = {"check": tool, "backend": "cuda", "dtype": "", "result": result, "detail": detail}
    return [{**row, "seconds": f"{time.perf_counter() - start:.2f}"}]


def _gram_time(at: At) -> list[Row]:
    from bench.gpu import grams

    backends = grams.BACKENDS[-1:] if at.machine.smoke else grams.BACKENDS
    return grams.run(at.machine, at.deadline, at.selection, backends)


def _steps(at: At) -> list[Row]:
    from bench.gpu import steps

    return steps.run(at.machine, at.deadline, at.selection)


def _norm_time(at: At) -> list[Row]:
    from bench.gpu import kernels, norms

    rounds = at.selection.rounds or kernels.ROUNDS
    return kernels.measure(norms.of_norms(at.machine), at.machine, at.deadline, rounds)


def _fp8_time(at: At) -> list[Row]:
    from bench.gpu import fp8

    return fp8.run(at.machine, at.deadline, at.selection)


def _choices(at: At) -> list[Row]:
    from bench.gpu import choices

    return choices.run(at.machine, at.deadline)


def _products(at: At) -> list[Row]:
    from bench.gpu import products

    return products.run(at.machine, at.deadline, at.selection)


def _layers(at: At) -> list[Row]:
    """Layers of the shapes that goals are set for, by the kernels they are set for and what those
    are compared with.
    """
    from bench.gpu import layer

    names = ("tma", "wgmma") if at.machine.smoke else ("triton", "tma", "wgmma", "grouped_mm")
    providers = [one for one in layer.PROVIDERS if one.variant in names]
    shapes = ("Qwen3-30B-A3B", "DeepSeek-V3", "Qwen3.5-397B", "Mixtral-8x7B")
    planned = layer.plan(at.machine.smoke)
    if not at.machine.smoke:
        planned = [case for case in planned if case.name in shapes and case.skew == "balanced"]
    rounds = at.selection.rounds or layer.ROUNDS
    return layer.run(at.machine, at.selection.cases(planned), at.deadline, providers, rounds)


def _end_to_end(at: At) -> list[Row]:
    from bench.gpu import end_to_end

    return end_to_end.run(at.machine, at.deadline, at.selection)


def _profile(at: At) -> list[Row]:
    from bench.gpu import profile

    return profile.run(at.machine, at.deadline, at.selection)


def _short(at: At) -> list[Row]:
    from bench.gpu import short

    return short.run(at.machine, at.deadline, at.selection)


def _few_rows(at: At) -> list[Row]:
    from bench.gpu import tiles

    return tiles.run(at.machine, at.deadline, rows_of=tiles.FEW_ROWS)


def _streaming(at: At) -> list[Row]:
    from bench.gpu import streaming

    return streaming.run(at.machine, at.deadline, at.folder)


def _vllm(at: At) -> list[Row]:
    from bench.gpu import vllm_layers

    return vllm_layers.run(at.machine, at.deadline)


_TMA = "Triton's products by TMA"
_NORMS = "RMS norms and rotary embeddings"
_GRAMS = "Gram matrices and cross moments"
# New kernels first: whether they are right, then how fast, in a layer and in a whole pass; if each
# takes its estimate, 480 s hold these and little else. Then the rest: correctness before time.
ITEMS: tuple[Item, ...] = (
    Item(
        "product checks", ("CUDA products for Hopper",), 30, "checks", partial(_checks, "products")
    ),
    Item("TMA checks", (_TMA,), 45, "checks", partial(_checks, "tma")),
    Item("FP8 checks", ("Products that read FP8",), 30, "checks", partial(_checks, "fp8")),
    Item("norm checks", (_NORMS,), 30, "checks", partial(_checks, "norms")),
    Item("fused", ("Norms, residual sums",), 40, "checks", partial(_checks, "fusing")),
    Item("attention", ("cuDNN's attention",), 20, "checks", partial(_checks, "attention")),
    Item("layers", ("Whole layers by the new products",), 75, "layer", _layers),
    Item("end to end", ("Qwen3-30B-A3B on all 231",), 150, "end2end", _end_to_end),
    Item("products", ("Kernels of the products", _TMA), 75, "products", _products),
    Item("layer checks", ("The call object of the layer op",), 60, "checks", _layer_checks),
    Item(
        "observed models",
        (
            "What observing has done in addition",
            "Checks of layers' first calls",
            "Multi-token-prediction layers",
            "Records with images",
            "`device_map` with weights",
        ),
        30,
        "checks",
        partial(_group, "models", ("OBSERVING",)),
    ),
    Item(
        "plans",
        (
            "`rd.masked_experts`, `search` and `compare`",
            "Plans that remove neurons",
            "Several plans compared",
            "`rd.observe_vectors`",
        ),
        30,
        "checks",
        partial(_group, "models", ("PLANS",)),
    ),
    Item(
        "streamed bits",
        ("Streamed statistics equal", "FP8 blocks and the matrices"),
        20,
        "checks",
        partial(_group, "jobs", ("STREAMED",)),
    ),
    Item(
        "commands",
        ("Recording a GPU's name", "`rd.masked_experts`, `search` and `compare`"),
        40,
        "checks",
        partial(_group, "jobs", ("COMMANDS",)),
    ),
    Item("gram checks", (_GRAMS,), 45, "checks", partial(_checks, "grams")),
    Item("mask in a graph", ("a mask inside a captured",), 10, "checks", partial(_checks, "masks")),
    *(
        Item(tool, ("compute-sanitizer's racecheck",), 60, "checks", partial(_sanitized, tool))
        for tool in ("racecheck", "synccheck", "initcheck")
    ),
    Item("short calls", ("Calls of 2,048 tokens",), 45, "short", _short),
    Item("steps", ("Where a layer's time goes", "65,536 tokens"), 75, "steps", _steps),
    Item("norm time", (_NORMS,), 15, "kernels", _norm_time),
    Item("FP8 time", ("Whether products that read FP8",), 45, "layer", _fp8_time),
    Item("choices", ("CUDA's or Triton's sort",), 90, "choices", _choices),
    Item("gram time", (_GRAMS,), 45, "gram", _gram_time),
    Item("profile", ("What one batch of a whole model",), 45, "profile", _profile),
    Item("tune", ("`reap-kernels tune`",), 60, "checks", partial(_group, "jobs", ("TUNED",))),
    Item("few rows", ("Launch tables for few rows per expert",), 60, "tiles", _few_rows),
    Item(
        "vllm layers",
        ("vLLM's Triton kernel", "removed experts have the lowest", "cost of a step"),
        90,
        "vllm",
        _vllm,
    ),
    Item(
        "streaming",
        ("Layers loaded on a side stream", "Reading into pinned", "Hidden states", "Time for each"),
        240,
        "streaming",
        _streaming,
    ),
)


def open_lines(page: str) -> list[Line]:
    """The open lines of docs/gpu-status.md: entries of lists and rows of tables below its heading.

    Raises:
        ValueError: a line ends with no mark.
    """
    text = page.partition(f"\n{_SECTION}\n")[2]
    entries: list[str] = []
    for line in text.splitlines():
        if line.startswith("- "):
            entries.append(line[2:])
        elif line.startswith("  ") and entries:
            entries[-1] += f" {line.strip()}"
        elif line.startswith("| ") and not line.startswith("| what "):
            entries.append(line.strip("| "))
    return [_line(entry) for entry in entries]


def _line(entry: str) -> Line:
    mark = _MARK.search(entry)
    if mark is None:
        raise ValueError(f"no *(queue: NAME)* or *(needs: WHAT)* ends the line {entry[:60]!r}")
    found: dict[str, Sequence[str]] = {"queue": (), "needs": ()}
    for part in mark[1].split("; "):
        kind, _, names = part.partition(": ")
        found[kind] = names.split(", ")
    return Line(entry[: mark.start()].strip(), tuple(found["queue"]), tuple(found["needs"]))
