"""What `bench ptxas` reads of a compiler's report, and what it does not let pass."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench import ptxas, roles

PREFIX = "ptxas info    : "
COMBINE = "_ZN4reap12_GLOBAL__N_114combine_tokensINS_4bf16ELi8ELi8EEEvNS_7CombineE"
PRODUCT = "_ZN4reap7grouped14multiply_tilesINS_4bf16ELb1EEEvNS0_4CallENS_3MapES4_"
TILES = "_ZN4reap12_GLOBAL__N_110list_tilesENS_8ScheduleE"


def entry(symbol: str, arch: str, spill: int = 0) -> str:
    return (
        f"{PREFIX}Compiling entry function '{symbol}' for '{arch}'\n"
        f"{PREFIX}Function properties for {symbol}\n"
        f"    {spill} bytes stack frame, {spill} bytes spill stores, 0 bytes spill loads\n"
        f"{PREFIX}Used 86 registers, used 1 barriers, 64 bytes smem, 392 bytes cmem[0]\n"
    )


def machine_code(*instructions: str) -> str:
    """As cuobjdump prints it."""
    lines = (
        f"        /*{16 * i:04x}*/  {words} ;  /* 0x0 */" for i, words in enumerate(instructions)
    )
    return "\n".join(lines)


@pytest.fixture
def report(tmp_path: Path, monkeypatch):
    """Writes one report for each source; all but the first are empty."""
    monkeypatch.setattr(ptxas, "BUILD", tmp_path)

    def write(text: str) -> tuple[list[ptxas.Built], list[str]]:
        for number, source in enumerate(ptxas.SOURCES.glob("*.cu")):
            (tmp_path / f"{source.name}.txt").write_text("" if number else text)
        return ptxas.reported()

    return write


def test_reports_are_read(report) -> None:
    found, warnings = report(entry(COMBINE, "sm_80") + entry(TILES, "sm_90a"))
    assert warnings == []
    assert [(built.arch, built.kernel, built.arguments) for built in found] == [
        ("sm_80", "combine_tokens", ("bf16", "8", "8")),
        ("sm_90a", "list_tiles", ()),
    ]
    assert {(built.registers, built.shared, built.stack) for built in found} == {(86, 64, 0)}
    assert [built.wide for built in found] == [True, False]


def test_a_report_of_another_form_ends_the_run(report) -> None:
    with pytest.raises(SystemExit, match="could not be read"):
        report(entry(TILES, "sm_80").replace("bytes stack frame", "bytes of stack"))


def test_spills_and_warnings_are_seen(report) -> None:
    text = "x.cu(3): warning #177-D: a variable was never used\n"
    (built,), warnings = report(entry(TILES, "sm_80", spill=8) + text)
    assert len(warnings) == 1
    assert ptxas.problems(built) == ["a stack of 8 bytes, spills of 8 and 0 bytes"]
    assert ptxas.problems(replace(built, stack=0, stores=0)) == []


def test_wide_combinations_need_wide_loads(report) -> None:
    (built,), _ = report(entry(COMBINE, "sm_80"))
    assert ptxas.problems(replace(built, wide_loads=0)) == ["no 128-bit load"]
    assert ptxas.problems(replace(built, wide_loads=8)) == []


def test_kernels_with_a_demand_need_its_instructions(report) -> None:
    found, _ = report(entry(PRODUCT, "sm_90a") + entry(PRODUCT, "sm_80"))
    names = (
        text
        for text, least in ptxas.DEMANDS["sm_90a", "multiply_tiles"].instructions.items()
        for _ in range(least)
    )
    code = machine_code(*names, "MOV R39, R2", "EXIT", "MOV R90, R3")
    fast, elsewhere = (ptxas.inspected(built, code) for built in found)
    assert ptxas.problems(fast) == ptxas.problems(elsewhere) == []
    assert ptxas.problems(replace(fast, registers=176)) == ["more than 168 registers"]
    waits = ptxas.inspected(fast, code.replace("gsb0, 0x1", "gsb0, 0x0"))
    assert ptxas.problems(waits) == ["its code has 0 of 8 WARPGROUP.DEPBAR.LE gsb0, 0x1"]
    greedy = ptxas.inspected(fast, code.replace("R39", "R40"))
    assert ptxas.problems(greedy) == ["its code has 41 registers where 40 are left"]
    greedy = ptxas.inspected(fast, code.replace("R90", "R232"))
    assert ptxas.problems(greedy) == ["its code has 233 registers of 232"]
    assert len(ptxas.inspected(fast, "").lacks) == 10


def test_registers_of_a_role_are_those_that_can_be_reached() -> None:
    code = machine_code(
        "MOV R99, R98",
        "@P0 BRA 0x60",
        "USETMAXREG.DEALLOC.CTAPOOL 0x18",
        "MOV R7, R6",
        "@!P1 BRA 0x30",
        "BRA 0x80",
        "MOV R50, R50",
        "EXIT",
        "MOV R8, R1",
        "EXIT",
        "MOV R60, R60",
    )
    assert roles.registers_after_giving(code) == 9
    assert roles.registers(code) == 100
    for jump in ("BRX R2 -0x80", "@P0 BRXU UR4 -0x80"):
        with pytest.raises(ValueError, match="in a table"):
            roles.registers_after_giving(code.replace("BRA 0x80", jump))
    with pytest.raises(ValueError, match="DEALLOC"):
        roles.registers_after_giving(machine_code("EXIT"))


def test_serialized_products_are_seen(report) -> None:
    line = f"{PREFIX}(C7510) Potential Performance Loss: wgmma.mma_async are serialized\n"
    _, (warning,) = report(line + entry(PRODUCT, "sm_90a"))
    assert "serialized" in warning


def test_no_kernel_of_the_sources_may_be_absent(report) -> None:
    names = ptxas.kernels_of_sources()
    assert {"combine_tokens", "list_tiles", "place_slots", "sum_tiles", "dequantize"} <= names
    found, _ = report(entry(TILES, "sm_80") + entry(TILES, "sm_90a") + entry(COMBINE, "sm_80"))
    lacking = ptxas.missing(found, ["sm_80", "sm_90a"])
    assert len(lacking) == 2 * len(names) - 3
    assert "sm_90a combine_tokens: absent from ptxas' report" in lacking
    assert not any("list_tiles" in line for line in lacking)
    other = COMBINE.replace("Li8ELi8", "Li4ELi8")
    found, _ = report(entry(COMBINE, "sm_80") + entry(other, "sm_90a") + entry(COMBINE, "sm_90a"))
    (one,) = [line for line in ptxas.missing(found, ["sm_80", "sm_90a"]) if "<" in line]
    assert one.startswith("sm_80 combine_tokens<bf16, 4, 8>: absent, and compiled for another")
