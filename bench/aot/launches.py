"""Every kernel launch of the library on an architecture, recorded instead of run.

The launches are those of the real host code, which runs on CPU tensors while every kernel launch is
recorded instead of executed. So arguments and specializations are those a GPU would get, and host
code that reads a kernel's result would read garbage.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import reap_kernels as rk
from bench.aot import norms
from reap_kernels import device, tuning
from reap_kernels.compare import gpu as compare
from reap_kernels.cross import gpu as cross
from reap_kernels.dispatch import Request
from reap_kernels.experts import triton_backend
from reap_kernels.experts.gpu import activated
from reap_kernels.gram.gpu import outer_launch
from reap_kernels.layer import gpu
from reap_kernels.layer.call import LayerCall
from reap_kernels.saliency.stage_kernels import accumulate, stage_kernels
from reap_kernels.sort.gpu import schedule
from reap_kernels.sort.slots import SortedSlots
from reap_kernels.testing import (
    ACTIVATIONS,
    Case,
    make_experts,
    make_inputs,
    make_quantized_experts,
)
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
    torch.float8_e4m3fn: "fp8e4nv",
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

    @property
    def uses_tensor_cores(self) -> bool:
        """Whether the code should use tensor cores: it has products of 16-bit operands."""
        operand = dict(self.signature).get("a_ptr")  # of products only
        return operand in ("*bf16", "*fp16")

    @property
    def copies_rows(self) -> bool:
        """Whether rows of K elements begin at multiples of 16 elements; those of other products may
        begin anywhere, and are loaded through registers.
        """
        names = [name for name, _ in self.signature]
        return "K" not in names or names.index("K") in self.divisible


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
    codes: bool = False,
) -> None:
    """One call of the layer through the host code, which chooses the launches unless given; with
    experts in FP8 blocks where `codes`.
    """
    inputs = make_inputs(case, dtype)
    if codes:
        experts = make_quantized_experts(case, "fp8_block", layout, activation)
    else:
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
            for name, call in norms.calls(dtype):
                with recording(f"{name}, {short}", found):
                    call()
        _variants(found)
        _boxed(arch, found)
        _codes(arch, found)
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


def _boxed(arch: Arch, found: list[Launched]) -> None:
    """What the kernel `tma` is launched for beyond the pairs of a table that names it, on or off,
    in bf16.
    """
    half, tables = torch.bfloat16, tuning.tables(arch.name)
    entries = (entry for table in tables for entry in table.entries)
    lines = {e.op: e.launch for e in entries if e.launch is not None and e.launch.kernel == "tma"}
    if not lines:
        return
    pair = Launches(*(lines[op] for op in tuning.PRODUCTS))
    one = Launches(pair.down, pair.down)  # of products without a gate half
    narrow = Launches(replace(pair.up, block_n=pair.up.block_n // 2), pair.down)
    oai = rk.Activation("swiglu_oai", limit=7.0)
    opaque = rk.Activation("opaque", fn=rk.Activation("silu").apply)
    for case, layout, activation, launches in (
        (EVEN, "stacked", rk.Activation("silu_clamped_in", limit=7.0), pair),
        (EVEN, "interleaved-biased", oai, narrow),
        (EVEN, "ungated", rk.Activation("relu2"), one),
        (EVEN, "stacked", opaque, one),
        (UNEVEN, "stacked", None, pair),
    ):
        with recording(f"tma, {case.name} {layout}", found):
            _observe(case, half, layout, activation, launches=launches)


def _codes(arch: Arch, found: list[Launched]) -> None:
    """Products that read FP8 codes, where the architecture converts them, by all tiles of bf16."""
    half = torch.bfloat16
    asked = Request("layer", torch.device("cpu"), half, layout="quantized", block=(128, 128))
    if triton_backend.code_limits(asked) is not None:
        return

    def made(pair: Launches, gated: bool = True, plain: bool = True) -> Launches:
        first = pair.up if gated else pair.down
        up = triton_backend.for_codes(first, 128, gated=gated, plain=plain)
        return Launches(up, triton_backend.for_codes(pair.down, 128, gated=False))

    by_pointers = [p for p in _pairs(arch, half) if p.up.kernel == p.down.kernel == "pointer"]
    shared = arch.name in ("sm90", "sm100")
    for pair in by_pointers:
        with recording("fp8, table", found):
            _observe(EVEN, half, launches=made(pair, plain=shared), codes=True)
    oai = rk.Activation("swiglu_oai", limit=7.0)
    for case, layout, activation in (
        (EVEN, "interleaved-biased", oai),
        (EVEN, "ungated", rk.Activation("relu2")),
        (UNEVEN, "stacked", rk.Activation("silu")),
        (ODD, "blocks", rk.Activation("silu")),
    ):
        sizes = (case.hidden, case.intermediate, 256.0)
        plain = layout != "interleaved-biased"
        problem = tuning.Problem(
            asked.device, half, activation.kind, *sizes, plain=plain, kernels=("pointer",)
        )
        plain = plain and shared and case is EVEN
        launches = made(problem.launches(), layout != "ungated", plain)
        with recording(f"fp8, {case.name} {layout}", found):
            _observe(case, half, layout, activation, launches=launches, codes=True)


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
