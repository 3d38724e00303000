"""Compiles every launch of the launch tables without a GPU, and inspects the machine code.

The launches are those of the real host code, which runs on CPU tensors while every kernel launch is
recorded instead of executed. So arguments and specializations are those a GPU would get, and host
code that reads a kernel's result would read garbage. Each recorded kernel is compiled for an
architecture and its code is inspected: no spills, no local memory, and tensor-core instructions for
16-bit operands.
"""

import argparse
import contextlib
import datetime
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import reap_kernels as rk
from bench import rows
from reap_kernels import device, tuning
from reap_kernels.compare import gpu as compare
from reap_kernels.cross import gpu as cross
from reap_kernels.experts import triton_backend
from reap_kernels.experts.gpu import activated
from reap_kernels.gram.gpu import outer_launch
from reap_kernels.layer import gpu
from reap_kernels.layer.call import LayerCall
from reap_kernels.saliency.stage_kernels import accumulate, stage_kernels
from reap_kernels.sort.gpu import schedule
from reap_kernels.sort.slots import SortedSlots
from reap_kernels.testing import ACTIVATIONS, Case, make_experts, make_inputs
from reap_kernels.tuning import Launch, Launches


@dataclass(frozen=True)
class Arch:
    """An architecture: its compile target, the required instructions, shared memory per program."""

    name: str
    target: GPUTarget
    tensor_cores: str
    shared: int


ARCHS = {
    arch.name: arch
    for arch in (
        Arch("sm80", GPUTarget("cuda", 80, 32), r"\bHMMA\.", 163 * 1024),
        Arch("sm89", GPUTarget("cuda", 89, 32), r"\bHMMA\.", 99 * 1024),
        Arch("sm90", GPUTarget("cuda", 90, 32), r"\bHGMMA\.", 227 * 1024),
        Arch("sm100", GPUTarget("cuda", 100, 32), r"\bUTCHMMA\b", 227 * 1024),
        Arch("sm120", GPUTarget("cuda", 120, 32), r"\bHMMA\.", 99 * 1024),
        Arch("gfx942", GPUTarget("hip", "gfx942", 64), r"\bv_mfma_", 64 * 1024),
    )
}
# Architectures with a launch table, which are compiled by default.
TABLED = tuple(name for name in ARCHS if name.startswith("sm"))

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launched:
    """One recorded launch, reduced to what its machine code depends on.

    Attributes:
        kernel: module and function.
        why: the use of the library that launched it.
        signature: (name, type) of every parameter; "constexpr" for constants.
        constants: (name, value) of every constant.
        divisible: indices of parameters that are multiples of 16.
        options: (name, value) of compiler options.
    """

    kernel: tuple[str, str]
    why: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def code(self) -> tuple[Any, ...]:
        """The key under which launches have the same code."""
        return (self.kernel, self.signature, self.constants, self.divisible, self.options)


def _described(function: JITFunction, why: str, args: tuple[Any, ...], kwargs: Any) -> Launched:
    """A launch as Triton specializes it, for arguments equal to 1 or divisible by 16."""
    names = function.arg_names
    options = tuple(sorted((k, v) for k, v in kwargs.items() if k not in names))
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    if set(values) != set(names):
        raise SystemExit(f"{function.__name__}: arguments {set(names) ^ set(values)} do not match")
    constexpr = {param.name for param in function.params if param.is_constexpr}
    plain = {param.name for param in function.params if param.do_not_specialize}
    signature, constants, divisible = [], [], []
    for index, name in enumerate(names):
        value = values[name]
        if isinstance(value, Tensor):
            signature.append((name, "*" + _TYPES[value.dtype]))
            if value.data_ptr() % 16 == 0:
                divisible.append(index)
        elif name in constexpr or (value == 1 and type(value) is int and name not in plain):
            signature.append((name, "constexpr"))
            constants.append((name, value))
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and name not in plain:
                divisible.append(index)
    return Launched(
        (function.fn.__module__, function.__name__),
        why,
        tuple(signature),
        tuple(constants),
        tuple(divisible),
        options,
    )


@contextlib.contextmanager
def recording(why: str, into: list[Launched]) -> Iterator[None]:
    """Inside the context, kernels do not run; each distinct launch is added to `into`."""
    before = JITFunction.run
    known = {launch.code for launch in into}

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = _described(self, why, args, kwargs)
        if launch.code not in known:
            known.add(launch.code)
            into.append(launch)

    JITFunction.run = record
    try:
        yield
    finally:
        JITFunction.run = before


# Sizes divisible by every block size; multiples of 16 bytes divisible by none; and odd sizes.
EVEN = Case("even", "sizes of models", 256, 8, 8, hidden=1024, intermediate=512)
UNEVEN = Case("uneven", "H and I of 1040 and 528", 256, 8, 8, hidden=1040, intermediate=528)
ODD = Case("odd", "no size is a multiple of a block", 37, 6, 3, hidden=135, intermediate=77)


def _observe(
    case: Case,
    dtype: torch.dtype,
    layout: str = "stacked",
    activation: rk.Activation | None = None,
    observed: bool = True,
    launches: Launches | None = None,
) -> None:
    """One call of the layer through the host code, which chooses the launches unless given."""
    inputs = make_inputs(case, dtype)
    experts = make_experts(case, layout, activation, dtype)
    stats = rk.LayerStats(case.experts, case.groups) if observed else None
    arguments = (inputs.hidden, inputs.topk_ids, inputs.topk_weights, experts, stats)
    gram = rk.LayerGram(case.experts, case.intermediate) if observed else None
    call = LayerCall(*arguments, inputs.mask, inputs.group, gram=gram)
    launches = launches or triton_backend.launches(call.request)
    gpu.prepared(gpu.TRITON, stage_kernels("triton", "triton"), launches, call.request)(call)
    if observed:
        _cross(call, launches)


def _cross(call: LayerCall, launches: Launches) -> None:
    """Cross moments of the same call, with its input as targets."""
    experts = call.experts
    outer = outer_launch(call.request, experts.hidden_size, experts.intermediate_size)
    shape = (experts.num_experts, experts.hidden_size, experts.intermediate_size)
    routed = (call.hidden, call.topk_ids, call.topk_weights, experts)
    kernels = cross.CrossKernels(launches.up, outer)
    cross.cross(kernels, *routed, call.hidden, torch.zeros(shape))


def _compare(vocabulary: int, dtype: torch.dtype) -> None:
    """Comparisons of logits: contiguous, as in a search, and with large column strides."""
    logits = torch.zeros(2, vocabulary, dtype=dtype)
    for known in (None, torch.zeros(2)):
        compare.compare_logits(logits, logits, known)
    spread = torch.zeros(vocabulary, 2, dtype=dtype).T
    compare.compare_logits(spread, spread, None)
    compare.compare_logits(logits.float(), logits, None)


def _pairs(arch: Arch, dtype: torch.dtype) -> list[Launches]:
    """Every launch of the architecture's table, and the computed fallback launches."""
    found: dict[str, list[Launch]] = {op: [] for op in tuning.PRODUCTS}
    for table in tuning.tables(arch.name):
        for entry in table.entries:
            if entry.dtype == tuning.table_dtype(dtype) and entry.launch is not None:
                found[entry.op].append(entry.launch)
    for op in tuning.PRODUCTS:
        for many in (16, 1024):
            found[op].append(tuning.fallback(op, dtype, many, arch.shared))
    longest = max(len(launches) for launches in found.values())
    ups, downs = (found[op] for op in tuning.PRODUCTS)
    return [Launches(ups[i % len(ups)], downs[i % len(downs)]) for i in range(longest)]


def launches_of(arch: Arch) -> list[Launched]:
    """Every distinct kernel launch of the library on an architecture."""
    found: list[Launched] = []
    with _pretending(arch):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            short = str(dtype).removeprefix("torch.")
            # fp16 differs from bf16 only in the type of an instruction, so one launch is enough.
            for pair in _pairs(arch, dtype)[: 1 if dtype == torch.float16 else None]:
                with recording(f"table, {short}", found):
                    _observe(EVEN, dtype, launches=pair)
            with recording(f"sizes of no block, {short}", found):
                _observe(UNEVEN, dtype)
            with recording(f"odd sizes, {short}", found):
                _observe(ODD, dtype)
            with recording(f"accumulate, {short}", found):
                y, ids, weights = (
                    torch.zeros(64, 256, dtype=dtype),
                    torch.zeros(64),
                    torch.ones(64),
                )
                accumulate(
                    stage_kernels("triton", "triton"),
                    y,
                    ids.long(),
                    weights,
                    rk.LayerStats(8),
                    None,
                    0,
                )
            for vocabulary in (151936, 50257):
                with recording(f"compare, V = {vocabulary}, {short}", found):
                    _compare(vocabulary, dtype)
        _variants(found)
    return found


@contextlib.contextmanager
def _pretending(arch: Arch) -> Iterator[None]:
    """Inside the context, host code chooses launches as on `arch`."""
    before = device.architecture, device.shared_memory
    device.architecture, device.shared_memory = lambda _: arch.name, lambda _: arch.shared
    try:
        yield
    finally:
        device.architecture, device.shared_memory = before


def _variants(found: list[Launched]) -> None:
    """Launches that tables do not vary, in bf16: formulas, layouts, groups, around grouped_mm."""
    half = torch.bfloat16
    for activation in ACTIVATIONS:
        with recording(f"activation {activation.kind}", found):
            _observe(EVEN, half, "ungated" if activation.kind == "relu2" else "stacked", activation)
    for layout in ("transposed", "interleaved-biased", "per-expert"):
        with recording(f"layout {layout}", found):
            _observe(EVEN, half, layout)
    with recording("gpt-oss", found):
        _observe(EVEN, half, "interleaved-biased", rk.Activation("swiglu_oai", limit=7.0))
    opaque = rk.Activation("opaque", fn=rk.Activation("silu").apply)
    with recording("opaque gate", found):
        _observe(EVEN, half, activation=opaque)
    with recording("groups and mask", found):
        _observe(replace(EVEN, groups=3, masked=0.5), half)
    with recording("unobserved", found):
        _observe(EVEN, half, observed=False)
    with recording("k = 16", found):
        _observe(replace(EVEN, experts=1024, top_k=16, hidden=128, intermediate=128), half)
    with recording("k = 1", found):
        _observe(replace(EVEN, top_k=1), half)
    with recording("grouped_mm", found):
        up, index = torch.zeros(64, 128, dtype=half), torch.zeros(64, dtype=torch.int64)
        slots = SortedSlots(index, index, index[:9], 8, schedule)
        activated(up, up, rk.Activation("silu"), slots)


@dataclass(frozen=True)
class Compiled:
    """Facts about the machine code of one launch.

    Attributes:
        launch: the launch.
        registers: registers per thread.
        shared: bytes of shared memory per program.
        local: bytes of stack and local memory per thread, from spills or indexed arrays.
        spills: number of loads and stores of local memory.
        tensor_cores: number of tensor-core instructions.
        seconds: compile time.
    """

    launch: Launched
    registers: int
    shared: int
    local: int
    spills: int
    tensor_cores: int
    seconds: float


def compile_one(arch: Arch, launch: Launched) -> Compiled:
    """Compiles one launch and inspects its code."""
    module, name = launch.kernel
    function = getattr(__import__(module, fromlist=[name]), name)
    source = ASTSource(
        function,
        dict(launch.signature),
        dict(launch.constants),
        {(index,): [["tt.divisibility", 16]] for index in launch.divisible},
    )
    began = time.perf_counter()
    compiled = triton.compile(source, target=arch.target, options=dict(launch.options))
    seconds = time.perf_counter() - began
    inspect = _inspect_nvidia if arch.target.backend == "cuda" else _inspect_amd
    return Compiled(launch, *inspect(arch, launch, compiled), seconds)


def _inspect_amd(arch: Arch, launch: Launched, compiled: Any) -> tuple[int, int, int, int, int]:
    """Registers, shared and local bytes, spills and tensor-core instructions of AMD assembly."""
    code = compiled.asm["amdgcn"]

    def fact(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        assert found, name
        return int(found[1])

    local, spills = fact("private_segment_fixed_size"), fact("vgpr_spill_count")
    cores = len(re.findall(arch.tensor_cores, code))
    return fact("vgpr_count"), compiled.metadata.shared, local, spills, cores


def _inspect_nvidia(arch: Arch, launch: Launched, compiled: Any) -> tuple[int, int, int, int, int]:
    """Registers, shared and local bytes, spills and tensor-core instructions of a cubin."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(option: str) -> str:
            command = [str(tools / "cuobjdump"), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dump("--dump-resource-usage")
        # Disassembly takes as long as compilation, so it is skipped where the usage is enough.
        clean = "STACK:0 " in usage and "LOCAL:0 " in usage
        code = "" if clean and not _uses_tensor_cores(launch) else dump("-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    return (
        int(found[1]),
        compiled.metadata.shared,
        int(found[2]) + int(found[3]),
        len(re.findall(r"\b(?:LDL|STL)\b", code)),
        len(re.findall(arch.tensor_cores, code)),
    )


def problems(arch: Arch, compiled: Compiled) -> list[str]:
    """The problems in the code of one launch."""
    found = []
    if compiled.spills or compiled.local:
        found.append(f"{compiled.spills} local loads and stores, {compiled.local} bytes")
    if compiled.shared > arch.shared:
        found.append(f"{compiled.shared} bytes of shared memory, {arch.shared} are there")
    if _uses_tensor_cores(compiled.launch) and not compiled.tensor_cores:
        found.append(f"no tensor-core instruction ({arch.tensor_cores})")
    return found


def _uses_tensor_cores(launch: Launched) -> bool:
    """Whether the code should use tensor cores: it has products of 16-bit operands."""
    operand = dict(launch.signature).get("a_ptr")  # of products only
    return operand in ("*bf16", "*fp16")


def row(arch: Arch, compiled: Compiled, run: str) -> dict[str, object]:
    """One row of bench/results/aot.csv; `run` identifies the run."""
    launch = compiled.launch
    constants = dict(launch.constants)
    blocks = [str(constants[key]) for key in constants if key.startswith("BLOCK")]
    options = dict(launch.options)
    operand = next(kind for _, kind in launch.signature if kind.startswith("*"))
    return {
        "run": run,
        "arch": arch.name,
        "triton": triton.__version__,
        "kernel": launch.kernel[1],
        "use": launch.why,
        "operand": operand.removeprefix("*"),
        "activation": constants.get("ACTIVATION", ""),
        "blocks": "x".join(blocks),
        "warps": options.get("num_warps", 4),
        "stages": options.get("num_stages", 3),
        "registers": compiled.registers,
        "shared_bytes": compiled.shared,
        "local_bytes": compiled.local,
        "spills": compiled.spills,
        "tensor_core_instructions": compiled.tensor_cores,
        "compile_s": f"{compiled.seconds:.2f}",
    }


def main(arguments: list[str]) -> None:
    """Compiles, prints one line per kernel, and fails if any has a problem."""
    parser = argparse.ArgumentParser(prog="python -m bench aot", description=__doc__)
    parser.add_argument(
        "--arch", choices=ARCHS, action="append", help="default: those with a table"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="append rows to bench/results")
    options = parser.parse_args(arguments)
    if device.interpreted():
        parser.error("TRITON_INTERPRET=1 is set, so nothing would be compiled; unset it")
    bad, run = 0, datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    work = {ARCHS[name]: launches_of(ARCHS[name]) for name in options.arch or TABLED}
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        queued = {
            arch: [pool.submit(compile_one, arch, launch) for launch in launches]
            for arch, launches in work.items()
        }
        for arch, futures in queued.items():
            done = [future.result() for future in futures]
            lines = [row(arch, compiled, run) for compiled in done]
            if options.record:
                rows.write("aot", lines)
            for line, compiled in zip(lines, done, strict=True):
                wrong = problems(arch, compiled)
                bad += bool(wrong)
                if wrong or not options.record:
                    print("  ".join(str(v) for v in line.values()), "; ".join(wrong), flush=True)
    if bad:
        raise SystemExit(f"{bad} kernels have problems")
    print(f"{len(work)} architectures: every kernel compiles without spills")
