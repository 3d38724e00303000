"""Builds reap_kernels._C for every architecture without a GPU, and inspects the reports of ptxas.

No kernel may spill or use a stack frame, every `__global__` function of csrc/ must exist for every
architecture, wide combine kernels must use 16-byte loads, kernels of `DEMANDS` must have the
instructions that make them fast, the build must take less than two minutes on two cores, and the
module must import on a machine without a driver.
"""

import argparse
import datetime
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from bench import roles, rows

BUILD = rows.ROOT / "out/cuda"
SOURCES = rows.ROOT / "csrc"
# Processor seconds of all processes, because elapsed time depends on other work on the machine.
MOST_SECONDS = 240
# Bytes that the wide variants of the combine kernel load at once.
WIDE = 16
SIZES = {"double": 8, "float": 4, "fp16": 2, "bf16": 2}
# What ptxas says where products of one warp group wait for each other.
SERIALIZED = "Potential Performance Loss"

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_KERNEL = re.compile(
    r"__global__\s+void\s+(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\("
)
_EDGE = re.compile(r"^\[\d+/\d+\] (.*)$", re.MULTILINE)
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")
_WIDE_LOAD = re.compile(r"\bLDG\.E[\w.]*\.128\b")

IMPORT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "cudaErrorInvalidValue" in module.error(1), module.error(1)
print(module.CUDA_VERSION)
"""


@dataclass(frozen=True)
class Took:
    """Duration of a clean build: elapsed seconds, and processor seconds of all processes."""

    clock: float
    processors: float


@dataclass(frozen=True)
class Demand:
    """What a kernel's code on one architecture must have.

    Attributes:
        registers: most registers per thread.
        instructions: how often each text must be in the code at least.
        given: registers left to warps that give some up.
        taken: registers of those that take more.
    """

    registers: int
    instructions: dict[str, int]
    given: int
    taken: int


# By architecture and kernel. Eight widths of a tile, each with a loop of four products, whose wait
# leaves one group under way; elsewhere the kernel has no code.
DEMANDS = {
    ("sm_90a", "multiply_tiles"): Demand(
        168,
        {
            "HGMMA.64x256x16": 4,
            "HGMMA.": 32,
            "WARPGROUP.DEPBAR.LE gsb0, 0x1": 8,
            "UTMALDG.5D": 1,
            "UTMALDG.2D": 1,
            "LDGSTS.E.BYPASS.128": 16,
            "USETMAXREG.DEALLOC.CTAPOOL 0x28": 1,
            "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8": 1,
            "STSM.16.MT88.4": 8,
        },
        given=40,
        taken=232,
    )
}


@dataclass(frozen=True)
class Built:
    """One kernel on one architecture, as ptxas reports it.

    Attributes:
        arch: such as sm_90a.
        symbol: its mangled name.
        kernel: the function's name.
        arguments: its template arguments.
        registers: registers per thread.
        shared: bytes of static shared memory per block.
        stack, stores, loads: bytes per thread, of the stack frame and of spills.
        wide_loads: number of 128-bit loads in its code; None if it was not disassembled.
        lacks: what its code has too little or too much of, by its demand.
    """

    arch: str
    symbol: str
    kernel: str
    arguments: tuple[str, ...]
    registers: int
    shared: int
    stack: int
    stores: int
    loads: int
    wide_loads: int | None = None
    lacks: tuple[str, ...] = ()

    @property
    def demand(self) -> Demand | None:
        """What its code must have, where anything is stated."""
        return DEMANDS.get((self.arch, self.kernel))

    @property
    def wide(self) -> bool:
        """Whether it is a combine kernel that should use 16-byte loads."""
        if self.kernel != "combine_tokens":
            return False
        element, _, vector = self.arguments
        return SIZES[element] * int(vector) == WIDE


def nvcc() -> str | None:
    """The CUDA compiler that setup.py finds, else that of the PyPI wheels (extra `nvcc`)."""
    home = os.environ.get("CUDA_HOME")
    named = os.environ.get("CUDACXX") or (f"{home}/bin/nvcc" if home else "nvcc")
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin/nvcc"
    return shutil.which(named) or shutil.which(wheels)


def nvcc_version(compiler: str) -> str:
    """The compiler's version, such as 13.0.88."""
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"\bV(\d+\.\d+\.\d+)", said.stdout)
    return found[1] if found else "unknown"


def kernels_of_sources() -> set[str]:
    """Every `__global__` function of csrc/."""
    found: set[str] = set()
    for path in sorted(SOURCES.glob("*.cu*")):
        text = _COMMENT.sub("", path.read_text())
        names = _KERNEL.findall(text)
        if len(names) != text.count("__global__"):
            raise SystemExit(f"{path}: not every __global__ function could be read; see _KERNEL")
        found |= set(names)
    return found


def _processors() -> float:
    """Processor seconds of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def build(compiler: str, afresh: bool) -> Took | None:
    """Brings the module and the reports of its kernels up to date.

    Returns:
        The duration of a clean build; None if the build was incremental.
    """
    path = os.pathsep.join((os.environ["PATH"], sysconfig.get_path("scripts")))
    variables = {**os.environ, "CUDACXX": compiler, "PATH": path}
    configure = [f"-DPython_EXECUTABLE={sys.executable}", "-UREAP_ARCHS", "--log-level=WARNING"]
    # CMake would use the compiler in its cache instead of CUDACXX.
    cache = BUILD / "CMakeCache.txt"
    if not cache.exists() or f"CUDA_COMPILER:FILEPATH={compiler}\n" not in cache.read_text():
        configure.append("--fresh")
    clock, processors = time.perf_counter(), _processors()
    _cmake(variables, "-G", "Ninja", "-S", str(rows.ROOT), "-B", str(BUILD), *configure)
    afresh = afresh or not _reported()
    first = ("--clean-first",) if afresh else ()
    said = _cmake(variables, "--build", str(BUILD), *first)
    took = Took(time.perf_counter() - clock, _processors() - processors)
    for edge, text in _outputs(said):
        source = re.search(r"Building CUDA object \S+/(\w+\.cu)\.o", edge)
        if source:
            (BUILD / f"{source[1]}.txt").write_text(text)
    return took if afresh else None


def _cmake(variables: dict[str, str], *arguments: str) -> str:
    """Runs CMake and returns what it prints."""
    command = [sys.executable, "-m", "cmake", *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\n{' '.join(command)} failed")
    return done.stdout


def _outputs(said: str) -> list[tuple[str, str]]:
    """The steps of a Ninja build, each with its output."""
    parts = _EDGE.split(said)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def _reported() -> bool:
    """Whether every object file has a report of the same build; a manual build writes none."""
    for source in SOURCES.glob("*.cu"):
        made = BUILD / "CMakeFiles/_C.dir/csrc" / f"{source.name}.o"
        report = BUILD / f"{source.name}.txt"
        if not (made.exists() and report.exists()):
            return False
        if report.stat().st_mtime < made.stat().st_mtime:
            return False
    return True


def architectures() -> list[str]:
    """The architectures with machine code, from CMakeLists.txt."""
    found = re.search(
        r"^REAP_ARCHS:\w+=(.*)$", (BUILD / "CMakeCache.txt").read_text(), re.MULTILINE
    )
    assert found, "CMakeLists.txt sets no REAP_ARCHS"
    return [f"sm_{name[:-5]}" for name in found[1].split(";") if name.endswith("-real")]


def reported() -> tuple[list[Built], list[str]]:
    """Every kernel in the reports, and the warnings among them."""
    text = "".join((BUILD / f"{path.name}.txt").read_text() for path in SOURCES.glob("*.cu"))
    warnings = [
        line for line in text.splitlines() if "warning" in line.lower() or SERIALIZED in line
    ]
    parts = _ENTRY.split(text)
    entries = list(zip(parts[1::3], parts[2::3], parts[3::3], strict=True))
    names = dict(zip(parts[1::3], _readable(parts[1::3]), strict=True))
    found = []
    for symbol, arch, said in entries:
        stacks, used = _STACK.findall(said), _USED.search(said)
        if not stacks or not used:
            raise SystemExit(f"ptxas' report of {symbol} could not be read:\n{said}")
        # Reports of the functions that a kernel calls follow its own.
        stack, stores, loads = (sum(map(int, column)) for column in zip(*stacks, strict=True))
        usage = (int(used[1]), int(used[2] or 0), stack, stores, loads)
        found.append(Built(arch, symbol, *names[symbol], *usage))
    return found, warnings


def _readable(symbols: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Name and template arguments of mangled kernels."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    found = []
    for line in done.stdout.splitlines():
        plain = line.replace("(anonymous namespace)::", "").removeprefix("void ")
        plain = re.sub(r"\breap::(?:\w+::)*", "", plain)
        match = re.fullmatch(r"(\w+)(?:<(.*)>)?\(.*\)", plain)
        if not match:
            raise SystemExit(f"{line} could not be read as a kernel")
        # A comma inside nested template arguments is no separator.
        arguments = re.split(r", (?![^<]*>)", match[2]) if match[2] else []
        found.append((match[1], tuple(arguments)))
    return found


def module_path() -> Path:
    """The built module."""
    (found,) = BUILD.glob("_C*.so")
    return found


def disassembled(found: list[Built]) -> list[Built]:
    """The kernels, with what only the disassembly tells: the 128-bit loads of wide combine kernels,
    and what kernels with a demand lack.
    """
    wanted: dict[str, list[str]] = {}
    for built in found:
        if built.wide or built.demand:
            wanted.setdefault(built.arch, []).append(built.symbol)
    # The disassembler takes seconds, on one processor.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pairs = list(pool.map(_disassembled, wanted, wanted.values()))
    codes = {
        (arch, symbol): code
        for arch, own in zip(wanted, pairs, strict=True)
        for symbol, code in own
    }
    return [inspected(built, codes.get((built.arch, built.symbol), "")) for built in found]


def inspected(built: Built, code: str) -> Built:
    """A kernel with what its machine code tells."""
    lacks = () if built.demand is None else _missed(built.demand, code)
    wide_loads = len(_WIDE_LOAD.findall(code)) if built.wide else None
    return replace(built, wide_loads=wide_loads, lacks=lacks)


def _missed(demand: Demand, code: str) -> tuple[str, ...]:
    """What of a demand the code does not meet."""
    missed = [
        f"{code.count(text)} of {least} {text}"
        for text, least in demand.instructions.items()
        if code.count(text) < least
    ]
    try:
        few, many = roles.registers_after_giving(code), roles.registers(code)
    except ValueError as error:
        return (*missed, str(error))
    missed += [f"{few} registers where {demand.given} are left"] * (few > demand.given)
    missed += [f"{many} registers of {demand.taken}"] * (many > demand.taken)
    return tuple(missed)


def _disassembled(arch: str, symbols: list[str]) -> list[tuple[str, str]]:
    """Machine code of some kernels, by the disassembler that comes with Triton."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise SystemExit("cuobjdump comes with Triton, which is absent; run: pip install triton")
    tool = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "-sass", "-arch", arch, "-fun", ",".join(symbols), str(module_path())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    parts = re.split(r"Function : (\w+)", done.stdout)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def imported() -> str | None:
    """The error of importing the module without a GPU; None if there is none."""
    command = [sys.executable, "-c", IMPORT, str(module_path())]
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    return f"the module does not import: {done.stderr}" if done.returncode else None


def problems(built: Built) -> list[str]:
    """The problems in the report of one kernel."""
    found = []
    if built.stack or built.stores or built.loads:
        found.append(
            f"a stack of {built.stack} bytes, spills of {built.stores} and {built.loads} bytes"
        )
    if built.wide and not built.wide_loads:
        found.append("no 128-bit load")
    if built.demand and built.registers > built.demand.registers:
        found.append(f"more than {built.demand.registers} registers")
    if built.lacks:
        found.append(f"its code has {', '.join(built.lacks)}")
    return found


def missing(found: list[Built], archs: list[str]) -> list[str]:
    """Kernels or variants that an architecture lacks, and kernels that were not compiled."""
    there = {(built.arch, built.kernel) for built in found}
    lacking = [
        f"{arch} {kernel}: absent from ptxas' report"
        for arch in archs
        for kernel in sorted(kernels_of_sources())
        if (arch, kernel) not in there
    ]
    variants = {(built.kernel, built.arguments) for built in found}
    there_too = {(built.arch, built.kernel, built.arguments) for built in found}
    lacking += [
        f"{arch} {kernel}<{', '.join(arguments)}>: absent, and compiled for another architecture"
        for arch in archs
        for kernel, arguments in sorted(variants)
        if (arch, kernel) in there and (arch, kernel, arguments) not in there_too
    ]
    return lacking


def row(built: Built, version: str, took: Took | None, run: str) -> dict[str, object]:
    """One row of bench/results/ptxas.csv; `run` identifies the run."""
    return {
        "run": run,
        "nvcc": version,
        "arch": built.arch,
        "kernel": built.kernel,
        "arguments": " ".join(built.arguments),
        "registers": built.registers,
        "shared_bytes": built.shared,
        "stack_bytes": built.stack,
        "spill_store_bytes": built.stores,
        "spill_load_bytes": built.loads,
        "wide_loads": "" if built.wide_loads is None else built.wide_loads,
        "module_bytes": module_path().stat().st_size,
        "cores": os.cpu_count(),
        "build_s": "" if took is None else f"{took.clock:.0f}",
        "build_cpu_s": "" if took is None else f"{took.processors:.0f}",
    }


def main(arguments: list[str]) -> None:
    """Builds, prints one line per kernel, and fails if there is any problem."""
    parser = argparse.ArgumentParser(prog="python -m bench ptxas", description=__doc__)
    parser.add_argument(
        "--record", action="store_true", help="clean build, append rows to bench/results"
    )
    options = parser.parse_args(arguments)
    compiler = nvcc()
    if compiler is None:
        print(
            "skipped: no nvcc by CUDACXX, CUDA_HOME or PATH, and none of PyPI's, which `make cuda` "
            "would have installed"
        )
        return
    run = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    took = build(compiler, afresh=options.record)
    found, wrong = reported()
    found = disassembled(found)
    lines = [row(built, nvcc_version(compiler), took, run) for built in found]
    if options.record:
        rows.write("ptxas", lines, echo=False)
    for built, line in zip(found, lines, strict=True):
        bad = "; ".join(problems(built))
        print("  ".join(str(value) for value in list(line.values())[2:11]), bad, flush=True)
        wrong += [f"{built.arch} {built.kernel}<{', '.join(built.arguments)}>: {bad}"] * bool(bad)
    archs = architectures()
    wrong += missing(found, archs)
    failed = imported()
    wrong += [failed] if failed else []
    if took is not None and took.processors > MOST_SECONDS:
        wrong.append(f"the build took {took.processors:.0f} s of processors, over {MOST_SECONDS}")
    if wrong:
        raise SystemExit("\n".join(wrong))
    print(
        f"{len(archs)} architectures: every kernel of csrc/ compiles without spills and stack, and "
        f"the module ({module_path().stat().st_size / 1e6:.1f} MB) imports without a GPU"
    )
