"""What `bench aot` reads of a product's machine code, and what it does not let pass."""

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from bench import rows
from bench.aot.code import Compiled, row
from bench.aot.launches import ARCHS, Launched
from bench.aot.limits import LIMITS, Limit, Recorded, problems, summary
from bench.aot.sass import Loop, main_loop

HGMMA = r"\bHGMMA\."
SM90 = ARCHS["sm90"]

# Of a 64x128x64 product without activation in 8 warps and 4 stages, by Triton 3.9: waits, barriers,
# copies, products and branches, as cuobjdump prints them, without most of what is before the loop.
CODE = """
        Function : grouped_product
    .headerflags    @"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0100*/               @P0 EXIT ;                             /* 0x000000000000094d */
        /*0c20*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR14][R18.64], P0 ;
        /*0d80*/                   LDGDEPBAR ;                        /* 0x00000000000079af */
        /*0dd0*/              @!P0 BRA 0x17d0 ;                       /* 0x0000000800fc8947 */
        /*1240*/                   DEPBAR.LE SB0, 0x4 ;               /* 0x000081000000791a */
        /*1250*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;      /* 0x0000000000007b1d */
        /*1540*/                   WARPGROUP.ARRIVE ;                 /* 0x00000000000079c5 */
        /*1570*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*15c0*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*1610*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*1660*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*1670*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;    /* 0x00008000000079c5 */
        /*1680*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;      /* 0x0000000000007b1d */
        /*16c0*/                   LDGSTS.E.BYPASS.128 [R56+0x10000], desc[UR14][R16.64], !P0 ;
        /*16d0*/                   LDGSTS.E.BYPASS.128 [R56+0x11000], desc[UR14][R18.64], !P0 ;
        /*16e0*/                   LDGDEPBAR ;                        /* 0x00000000000079af */
        /*1700*/                   LDGSTS.E.BYPASS.128 [R57], desc[UR14][R58.64], !P0 ;
        /*1730*/                   LDGSTS.E.BYPASS.128 [R57+0x1000], desc[UR14][R60.64], !P0 ;
        /*1760*/                   LDGSTS.E.BYPASS.128 [R57+0x2000], desc[UR14][R16.64], !P0 ;
        /*1780*/                   LDGSTS.E.BYPASS.128 [R57+0x3000], desc[UR14][R18.64], !P0 ;
        /*17a0*/                   LDGDEPBAR ;                        /* 0x00000000000079af */
        /*17c0*/              @!P6 BRA 0x1240 ;                       /* 0xfffffff8009ce947 */
        /*17d0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;    /* 0x00008000000079c5 */
        /*17e0*/                   DEPBAR.LE SB0, 0x0 ;               /* 0x000080000000791a */
        /*1870*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;      /* 0x0000000000007b1d */
        /*1c30*/                   EXIT ;                             /* 0x000000000000794d */
        /*1c40*/                   BRA 0x1c40;                        /* 0xfffffffc00fc7947 */
"""
LOOP = Loop(0, 2, 6, 0, ((64, 16),) * 4, 18)
BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}


def product(
    loop: Loop | None = LOOP, registers: int = 90, activation: str | None = "none"
) -> Compiled:
    constants = {**BLOCKS} if activation is None else {"ACTIVATION": activation, **BLOCKS}
    options = (("num_stages", 4), ("num_warps", 8))
    launch = Launched(
        ("reap_kernels.experts.kernel_triton", "grouped_product"),
        "table, bfloat16",
        (("a_ptr", "*bf16"), ("K", "i32"), *((name, "constexpr") for name in constants)),
        tuple(constants.items()),
        (0, 1),
        options,
    )
    return Compiled(launch, registers, 1024, 0, 0, 4, loop, 1.0)


def test_the_main_loop_is_read() -> None:
    assert main_loop(CODE, HGMMA) == LOOP
    assert LOOP.shapes == "64x64x16"
    assert product().steps == 1


def test_an_inner_loop_is_the_main_loop() -> None:
    # A persistent kernel: another branch, from behind the epilogue to before the first copies.
    outer = CODE.replace("/*1c30*/                   EXIT", "/*1c30*/   @P5 BRA.U 0x0c20")
    assert main_loop(outer, HGMMA) == LOOP
    # Without its own branch, the inner loop is part of the outer one.
    flat = main_loop(outer.replace("@!P6 BRA 0x1240", "NOP"), HGMMA)
    assert flat is not None
    assert (flat.drains, flat.barriers, flat.copies) == (1, 3, 7)


def test_a_step_jumps_over_the_epilogue_but_not_over_products() -> None:
    outer = CODE.replace("/*1c30*/                   EXIT", "/*1c30*/   @P5 BRA 0x1240")
    flat = outer.replace("@!P6 BRA 0x1240", "@!P6 BRA 0x1c30")
    loop = main_loop(flat, HGMMA)
    assert loop == replace(LOOP, length=LOOP.length + 1)
    always = main_loop(flat.replace("@!P6 BRA 0x1c30", "NOP"), HGMMA)
    assert always is not None
    assert (always.drains, always.barriers) == (1, 3)
    jumped = main_loop(flat.replace("DEPBAR.LE SB0, 0x4", "@P1 BRA 0x17c0"), HGMMA)
    assert jumped == loop


def test_a_block_behind_the_end_is_no_loop() -> None:
    cold = CODE.replace("BRA 0x1c40", "BRA 0x1250")  # it waits again, and comes back
    assert main_loop(cold.replace("@!P6 BRA 0x1240", "@!P6 BRA 0x0c20"), HGMMA) == Loop(
        0, 2, 7, 0, LOOP.products, LOOP.length + 3
    )


def test_code_without_a_loop_of_products_has_none() -> None:
    assert main_loop(CODE.replace("HGMMA", "FFMA"), HGMMA) is None
    assert main_loop(CODE.replace("BRA 0x1240", "BRA 0x17d0"), HGMMA) is None
    assert problems(SM90, product(loop=None)) == ["no loop with a tensor-core instruction"]


def test_offsets_begin_anew_in_each_function() -> None:
    small = "Function : helper\n /*0000*/ NOP ;\n /*1300*/ BAR.SYNC 0x0 ;\n"
    assert main_loop(small + CODE + small, HGMMA) == LOOP


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("gsb0, 0x1", "gsb0, 0x0", "loop_drains is 1 for each block of K, at most 0 is allowed"),
        ("LDGDEPBAR ;     ", "BAR.SYNC 0x0 ;", "loop_barriers is 4 for each block of K, at most 2"),
    ],
)
def test_waits_in_the_loop_are_seen(before: str, after: str, said: str) -> None:
    assert problems(SM90, product(main_loop(CODE, HGMMA))) == []
    (found,) = problems(SM90, product(main_loop(CODE.replace(before, after), HGMMA)))
    assert found.startswith(said)


def test_rows_that_begin_anywhere_may_be_waited_for() -> None:
    waits = product(replace(LOOP, drains=1))
    assert problems(SM90, waits) != []
    assert problems(SM90, replace(waits, launch=replace(waits.launch, divisible=(0,)))) == []


def test_an_unrolled_loop_is_held_to_its_blocks() -> None:
    twice = Loop(0, 4, 24, 0, ((64, 16),) * 8, 40)
    assert product(twice).steps == 2
    assert problems(SM90, product(twice)) == []
    (found,) = problems(SM90, product(replace(twice, copies=26)))
    assert found == "loop_copies is 13 for each block of K, at most 12 is allowed"
    # A gated product multiplies twice as much in a block of K; another kernel has no activation.
    assert product(twice, activation="silu").steps == 1
    assert product(twice, activation=None).steps == 2


def test_bulk_copies_that_must_be_there_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIMITS, ("sm90", "grouped_product"), Limit(bulk=1))
    (found,) = problems(SM90, product())
    assert found == "loop_bulk_copies is 0 for each block of K, at least 1 is needed"
    assert problems(SM90, product(replace(LOOP, bulk=1))) == []


def recorded(folder: Path, compiled: Iterable[Compiled], run: str = "1") -> Recorded:
    lines = [row(SM90, one, run) for one in compiled]
    return Recorded(rows.write("aot", lines, folder=folder, echo=False), "sm90", version(lines))


def version(lines: list[dict[str, object]]) -> str:
    return str(lines[0]["triton"])


@pytest.mark.parametrize(
    ("worse", "said"),
    [
        (product(replace(LOOP, drains=1)), "loop_drains was 0, is 1"),
        (product(replace(LOOP, barriers=3)), "loop_barriers was 2, is 3"),
        (product(replace(LOOP, copies=8)), "loop_copies was 6, is 8"),
        (product(replace(LOOP, bulk=1)), "loop_bulk_copies was 0, is 1"),
        (
            product(replace(LOOP, products=((32, 16),) * 8)),
            "loop_products was 64x64x16, is 64x32x16",
        ),
        (product(registers=97), "registers was 90, is 97"),
    ],
)
def test_a_column_that_became_worse_is_named(tmp_path: Path, worse: Compiled, said: str) -> None:
    before = recorded(tmp_path, [product()])
    assert before
    assert before.regressions(row(SM90, product(registers=96), "2")) == []  # allocated by eights
    assert before.regressions(row(SM90, worse, "2")) == [said]
    assert summary(("sm90", "grouped_product", "", "64x128x64"), [said]) == [
        f"sm90 grouped_product 64x128x64: {said}"
    ]


def test_the_newest_run_of_the_same_compiler_counts(tmp_path: Path) -> None:
    recorded(tmp_path, [product()])
    newest = recorded(tmp_path, [product(registers=120)], run="2")
    assert newest.regressions(row(SM90, product(registers=120), "3")) == []
    assert newest.regressions({**row(SM90, product(registers=200), "3"), "use": "other"}) == []
    assert not Recorded(tmp_path / "aot.csv", "sm90", "0.1")
    assert not Recorded(tmp_path / "none.csv", "sm90", "3.9.0")


def test_equal_rows_are_held_to_the_most_lenient(tmp_path: Path) -> None:
    both = recorded(tmp_path, [product(), product(registers=128)])
    assert both.regressions(row(SM90, product(registers=128), "2")) == []
    assert both.regressions(row(SM90, product(registers=160), "2")) == ["registers was 90, is 160"]


COMPILED = """
import torch
from bench.aot.code import compile_one
from bench.aot.limits import problems
from bench.aot.launches import ARCHS, recording
from reap_kernels.experts.product import product
from reap_kernels.experts.operands import Operand
from reap_kernels.sort.gpu import schedule
from reap_kernels.sort.slots import SortedSlots
from reap_kernels.tuning import Launch

index, a = torch.zeros(64, dtype=torch.int64), torch.zeros(64, 64, dtype=torch.bfloat16)
rows = SortedSlots(index, index, index[:9], 8, schedule)
for stages in (3, 1):
    found = []
    with recording("", found):
        product(a, Operand.of(a.expand(8, 64, 64), None), rows, Launch(64, 64, 64, 8, 4, stages))
    (launch,) = [one for one in found if one.kernel[1] == "grouped_product"]
    print(problems(ARCHS["sm90"], compile_one(ARCHS["sm90"], launch)))
"""


def test_a_launch_without_stages_does_not_pass() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    staged, single = done.stdout.splitlines()
    assert staged == "[]"
    assert "loop_drains is 1 for each block of K, at most 0 is allowed" in single
