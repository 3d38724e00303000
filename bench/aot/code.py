"""Compiles a recorded launch, and reads what its machine code needs and does."""

import math
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource

from bench.aot.launches import Arch, Launched
from bench.aot.sass import Loop, main_loop


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
        loop: the main loop of a 16-bit product; None of other kernels, and of AMD code.
        seconds: compile time.
    """

    launch: Launched
    registers: int
    shared: int
    local: int
    spills: int
    tensor_cores: int
    loop: Loop | None
    seconds: float

    @property
    def steps(self) -> int:
        """How many blocks of K one pass through the main loop multiplies."""
        constants = dict(self.launch.constants)
        sizes = [constants.get(f"BLOCK_{name}") for name in "MNK"]
        if self.loop is None or None in sizes:
            return 1
        halves = 1 if constants.get("ACTIVATION", "none") in ("none", "relu2") else 2
        warps = dict(self.launch.options).get("num_warps", 4)
        return self.loop.steps(halves * math.prod(sizes), warps)


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


# Registers, shared and local bytes, spills, tensor-core instructions, main loop.
_Facts = tuple[int, int, int, int, int, Loop | None]


def _inspect_amd(arch: Arch, launch: Launched, compiled: Any) -> _Facts:
    """Facts of AMD assembly; its loops are not read."""
    code = compiled.asm["amdgcn"]

    def fact(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        assert found, name
        return int(found[1])

    local, spills = fact("private_segment_fixed_size"), fact("vgpr_spill_count")
    cores = len(re.findall(arch.tensor_cores, code))
    return fact("vgpr_count"), compiled.metadata.shared, local, spills, cores, None


def _inspect_nvidia(arch: Arch, launch: Launched, compiled: Any) -> _Facts:
    """Facts of a cubin."""
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
        code = "" if clean and not launch.uses_tensor_cores else dump("-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    return (
        int(found[1]),
        compiled.metadata.shared,
        int(found[2]) + int(found[3]),
        len(re.findall(r"\b(?:LDL|STL)\b", code)),
        len(re.findall(arch.tensor_cores, code)),
        main_loop(code, arch.tensor_cores) if launch.uses_tensor_cores else None,
    )


def row(arch: Arch, compiled: Compiled, run: str) -> dict[str, object]:
    """One row of bench/results/aot.csv; `run` identifies the run."""
    launch, loop = compiled.launch, compiled.loop
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
        "loop_steps": "" if loop is None else compiled.steps,
        "loop_drains": "" if loop is None else loop.drains,
        "loop_barriers": "" if loop is None else loop.barriers,
        "loop_copies": "" if loop is None else loop.copies,
        "loop_bulk_copies": "" if loop is None else loop.bulk,
        "loop_products": "" if loop is None else loop.shapes,
        "loop_length": "" if loop is None else loop.length,
        "compile_s": f"{compiled.seconds:.2f}",
    }
