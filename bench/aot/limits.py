"""What the machine code of a launch must not do: spill, wait or issue more than it has to.

Products of 16-bit operands are held twice: to stated limits, whichever Triton compiled them (not
where rows begin anywhere: they are loaded through registers and waited for), and to the newest
recorded run of the same architecture and Triton version. `python -m bench aot --record`
records a run, and with it accepts what it found.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.aot.code import Compiled
from bench.aot.launches import Arch

Row = dict[str, str]

# What a launch is found by in another run.
_KEY = ("kernel", "use", "operand", "activation", "blocks", "warps", "stages")
# Columns that may not rise, and those that may not change, in a row with a main loop.
_NOT_MORE = ("loop_drains", "loop_barriers", "loop_copies")
_SAME = ("loop_products", "loop_bulk_copies")
# Registers are allocated by eights, so fewer than eight more cost nothing.
_REGISTERS = 8


@dataclass(frozen=True)
class Limit:
    """What a block of K may cost in the main loop of a product.

    Attributes:
        drains: waits until no warp-group product is in flight.
        barriers: waits of the whole block.
        copies: asynchronous copies of a thread.
        bulk: copies by the tensor memory accelerator that there must be.
    """

    drains: int = 0
    barriers: int = 2
    copies: int = 12
    bulk: int = 0


# By architecture and kernel. Sums of one block of K of FP8 codes are drained before their scale is
# applied, those of gate and of up.
LIMITS = {
    ("sm90", "grouped_product"): Limit(),
    ("sm90", "grouped_product_tma"): Limit(barriers=4, copies=4, bulk=1),
    ("sm90", "grouped_product_fp8"): Limit(drains=2, barriers=5, copies=8),
}


def problems(arch: Arch, compiled: Compiled) -> list[str]:
    """What is wrong with the code of one launch by itself."""
    found = []
    if compiled.spills or compiled.local:
        found.append(f"{compiled.spills} local loads and stores, {compiled.local} bytes")
    if compiled.shared > arch.shared:
        found.append(f"{compiled.shared} bytes of shared memory, {arch.shared} are there")
    if compiled.launch.uses_tensor_cores and not compiled.tensor_cores:
        found.append(f"no tensor-core instruction ({arch.tensor_cores})")
    limit = LIMITS.get((arch.name, compiled.launch.kernel[1]))
    if limit and compiled.launch.uses_tensor_cores and compiled.launch.copies_rows:
        found += _over(limit, compiled)
    return found


def _over(limit: Limit, compiled: Compiled) -> list[str]:
    """What a block of K costs beyond a limit."""
    loop, steps = compiled.loop, compiled.steps
    if loop is None:
        return ["no loop with a tensor-core instruction"]
    most = {
        "loop_drains": (loop.drains, limit.drains),
        "loop_barriers": (loop.barriers, limit.barriers),
        "loop_copies": (loop.copies, limit.copies),
    }
    found = [
        f"{column} is {is_ / steps:g} for each block of K, at most {most_} is allowed"
        for column, (is_, most_) in most.items()
        if is_ > most_ * steps
    ]
    if loop.bulk < limit.bulk * steps:
        found.append(f"loop_bulk_copies is {loop.bulk / steps:g} for each block of K, at least "
                     f"{limit.bulk} is needed")  # fmt: skip
    return found


class Recorded:
    """The newest recorded run of one architecture and Triton version.

    Args:
        path: a file of rows; one that is not there has none.
        arch: name of the architecture.
        triton: version of Triton.
    """

    def __init__(self, path: Path, arch: str, triton: str) -> None:
        rows: list[Row] = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [
                    r for r in csv.DictReader(file) if (r["arch"], r["triton"]) == (arch, triton)
                ]
        newest = max((row["run"] for row in rows), default="")
        self._rows: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            if row["run"] == newest:
                self._rows.setdefault(_key(row), []).append(row)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def regressions(self, row: dict[str, object]) -> list[str]:
        """Columns of one row that became worse. Launches that differ in nothing the row says are
        held to the most lenient of theirs; a launch that was not recorded, to none.
        """
        now = {name: str(value) for name, value in row.items()}
        found = [_worse(before, now) for before in self._rows.get(_key(now), [])]
        return min(found, key=len, default=[])


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in _KEY)


def _worse(before: Row, now: Row) -> list[str]:
    """Columns of a product's row that became worse: their names, and what they were and are."""
    if not before["loop_length"] or not now["loop_length"]:
        return []
    most = {name: int(before[name]) * int(now["loop_steps"]) for name in _NOT_MORE}
    worse = [n for n in _NOT_MORE if int(now[n]) * int(before["loop_steps"]) > most[n]]
    worse += [name for name in _SAME if now[name] != before[name]]
    was, is_ = (-(-int(row["registers"]) // _REGISTERS) for row in (before, now))
    worse += ["registers"] * (is_ > was)
    return [f"{name} was {before[name] or 'none'}, is {now[name] or 'none'}" for name in worse]


def summary(kernel: Sequence[object], wrong: list[str]) -> list[str]:
    """One line for each thing that is wrong, beginning with what it is wrong with."""
    name = " ".join(str(part) for part in kernel if part != "")
    return [f"{name}: {what}" for what in wrong]
