"""`python -m bench aot`: compiles, prints one line per kernel, and fails if any has a problem."""

import argparse
import datetime
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import triton

from bench import aot, rows
from bench.aot.code import compile_one, row
from bench.aot.launches import ARCHS, TABLED, Arch, Launched, launches_of
from bench.aot.limits import Recorded, problems, summary
from reap_kernels import device

FILE = "aot"
_NAMED = ("arch", "kernel", "use", "operand", "activation", "blocks", "warps", "stages")


def main(arguments: list[str]) -> None:
    """Compiles every launch and prints what is wrong with it.

    Raises:
        SystemExit: something is, one line for each.
    """
    parser = argparse.ArgumentParser(prog="python -m bench aot", description=aot.__doc__)
    parser.add_argument(
        "--arch", choices=ARCHS, action="append", help="default: those with a table"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--record",
        action="store_true",
        help="append rows to bench/results, to which later runs are held; this one is only to "
        "stated limits",
    )
    options = parser.parse_args(arguments)
    if device.interpreted():
        parser.error("TRITON_INTERPRET=1 is set, so nothing would be compiled; unset it")
    run = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    work = {ARCHS[name]: launches_of(ARCHS[name]) for name in options.arch or TABLED}
    wrong, unrecorded = inspected(work, run, options.workers, record=options.record)
    if wrong:
        raise SystemExit("\n".join(wrong))
    print(f"{len(work)} architectures: every kernel compiles without spills")
    if unrecorded:
        print(
            f"{', '.join(unrecorded)}: no run of Triton {triton.__version__} is recorded, so "
            "products were held to stated limits only; record one with --record"
        )


def inspected(
    work: dict[Arch, list[Launched]], run: str, workers: int, *, record: bool
) -> tuple[list[str], list[str]]:
    """Compiles all launches, prints a line for each, and with `record` appends the rows.

    Returns:
        What is wrong, a line for each; names of architectures without a recorded run.
    """
    wrong: list[str] = []
    unrecorded: list[str] = []
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        queued = {
            arch: [pool.submit(compile_one, arch, launch) for launch in launches]
            for arch, launches in work.items()
        }
        for arch, futures in queued.items():
            recorded = Recorded(rows.RESULTS / f"{FILE}.csv", arch.name, triton.__version__)
            if not recorded:
                unrecorded.append(arch.name)
            done = [future.result() for future in futures]
            lines = [row(arch, compiled, run) for compiled in done]
            for line, compiled in zip(lines, done, strict=True):
                worse = recorded.regressions(line)
                bad = problems(arch, compiled) + ([] if record else worse)
                wrong += summary([line[name] for name in _NAMED], bad)
                said = "; ".join(bad or worse)
                print("  ".join(str(value) for value in line.values()), said, flush=True)
            if record:
                rows.write(FILE, lines, echo=False)
    return wrong, [] if record else unrecorded
