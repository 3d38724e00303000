"""What `bench ptxas` reads of a compiler's report, and what it does not let pass."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench import ptxas

PREFIX = "ptxas info    : "
COMBINE = "_ZN4reap12_GLOBAL__N_114combine_tokensINS_4bf16ELi8ELi8EEEvNS_7CombineE"
TILES = "_ZN4reap12_GLOBAL__N_110list_tilesENS_8ScheduleE"


def entry(symbol: str, arch: str, spill: int = 0) -> str:
    return (
        f"{PREFIX}Compiling entry function '{symbol}' for '{arch}'\n"
        f"{PREFIX}Function properties for {symbol}\n"
        f"    {spill} bytes stack frame, {spill} bytes spill stores, 0 bytes spill loads\n"
        f"{PREFIX}Used 86 registers, used 1 barriers, 64 bytes smem, 392 bytes cmem[0]\n"
    )


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
