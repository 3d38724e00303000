"""The products of csrc/grouped.cuh in several orders of threads, and mutants of them.

Each mutant makes one mistake that a run on a GPU need not show. The emulation must show every one
in at least one order; else it would not show the same mistake in the kernel either.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.csrc.programs import CSRC, HERE, ORDERS, compile_cpp, run


@dataclass(frozen=True)
class Mutant:
    """Replacements in grouped.cuh: each first text occurs there exactly once."""

    name: str
    changes: tuple[tuple[str, str], ...]


def mutant(name: str, *texts: str) -> Mutant:
    """Of texts that alternate: what is there, and what takes its place."""
    return Mutant(name, tuple(zip(texts[::2], texts[1::2], strict=True)))


# Orders that let one warp run ahead catch most mutants, and come first.
CATCHING = sorted(ORDERS, key=lambda order: (order + 1) % 3)

FREES = "if (speaks) barrier_arrive(at.empty(before.stage));"
FREES_LAST = f"    products_wait<0>();\n    keep<N>(sum);\n    {FREES}\n"
STAGED = "group_sync(1 + consumer);  // everyone has read what was here before"
READ = "group_sync(1 + consumer);\n        if (column"
FENCE = "if (gather) generic_writes_to_async_reads();"

MUTANTS = (
    mutant("tokens are not swizzled", "(chunk ^ sub % CHUNK) * 16", "chunk * 16"),
    mutant(
        "results are not swizzled where they are read",
        "staging.at(token, chunk)",
        "staging.base + token * Place::BYTES + chunk * 16",
    ),
    mutant(
        "gate and up are swapped",
        "gated(d[0], d[2]), gated(d[1], d[3])",
        "gated(d[2], d[0]), gated(d[3], d[1])",
    ),
    mutant("too many bytes expected", "WEIGHT_BYTES + columns * ROW", "WEIGHT_BYTES + 256 * ROW"),
    mutant("too few bytes expected", "WEIGHT_BYTES + columns", "WEIGHT_BYTES / 2 + columns"),
    mutant("a stage is freed under products", "products_wait<1>", "products_wait<2>"),
    mutant(
        "the last stage is freed under products",
        FREES_LAST,
        f"    {FREES}\n    products_wait<0>();\n    keep<N>(sum);\n",
    ),
    mutant(
        "one thread of a group frees a stage",
        "speaks = threadIdx.x % WARP == 0",
        "speaks = threadIdx.x % GROUP == 0",
        "CONSUMERS * GROUP / WARP",
        "CONSUMERS",
    ),
    mutant("rows past a tile's end are stored", "if (row >= tile.stop) break;", ""),
    mutant("rows past a tile's end are gathered", "row < tile.stop ? row : tile.first", "row"),
    mutant("results are staged over others", STAGED, ""),
    mutant("results are read before they are staged", READ, "if (column"),
    mutant("products do not see copies", FENCE, ""),
    mutant(
        "one consumer does not see copies", FENCE, FENCE.replace("gather", "gather && consumer")
    ),
    mutant(
        "a stage is read before it is full", "barrier_wait(at.full(ring.stage), ring.parity);", ""
    ),
    mutant(
        "a stage is filled before it is free",
        "barrier_wait(at.empty(ring.stage), ring.parity ^ 1);",
        "",
    ),
    mutant("sums are read before their products", FREES_LAST, f"    {FREES}\n"),
    mutant("copies are handed over before they land", "barrier_arrive_copies", "barrier_arrive"),
    mutant("barriers are not ready for TMA", "barriers_ready();", ""),
    mutant("barriers are used before they begin", "__syncthreads();", ""),
    mutant("the ring's parity stays", "parity ^= 1;", ""),
    mutant("warp groups take too many registers", "fewer_registers<40>", "fewer_registers<48>"),
    mutant("idle threads wait for stages", "(!gather && threadIdx.x != 0)", "false"),
)


@dataclass(frozen=True)
class Common:
    """What every program of this file is made of: all but the products.

    Attributes:
        header: includes what grouped.cuh does, and lies beside its precompiled form.
        objects: to be linked.
    """

    header: Path
    objects: list[Path]


@pytest.fixture(scope="module")
def common(emulation: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Common:
    folder, built = tmp_path_factory.mktemp("grouped"), list(emulation)
    for source in (HERE / "grouped_test.cpp", CSRC / "tensor_map.cpp"):
        built.append(folder / f"{source.stem}.o")
        compile_cpp(built[-1], "-O1", "-c", source)
    header = folder / "common.h"
    header.write_text('#include "hopper.cuh"\n#include "launch.cuh"\n')
    compile_cpp(folder / "common.h.gch", "-x", "c++-header", header)
    return Common(header, built)


def compile_products(folder: Path, common: Common, changed: Mutant) -> Path:
    """The test's program with the products as `changed`. Nothing is optimized: to compile takes
    longer than to run.
    """
    text = (CSRC / "grouped.cuh").read_text()
    for old, new in changed.changes:
        assert text.count(old) == 1, f"mutant '{changed.name}': grouped.cuh has not one '{old}'"
        text = text.replace(old, new)
    (folder / "grouped.cuh").write_text(text)
    shutil.copy(CSRC / "grouped.cu", folder / "grouped.cpp")
    compile_cpp(folder / "grouped.o", "-include", common.header, "-c", folder / "grouped.cpp")
    compile_cpp(folder / "test", folder / "grouped.o", *common.objects)
    return folder / "test"


@pytest.fixture(scope="module")
def program(common: Common, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_products(tmp_path_factory.mktemp("products"), common, Mutant("none", ()))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("order", ORDERS)
def test_products_match_float64(program: Path, dtype: str, order: int) -> None:
    done = run(program, dtype, order)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("changed", MUTANTS, ids=lambda changed: changed.name)
def test_mutants_are_caught(changed: Mutant, common: Common, tmp_path: Path) -> None:
    built = compile_products(tmp_path, common, changed)
    assert any(run(built, "bf16", order).returncode for order in CATCHING), "no order shows it"
