"""The launch table: which tiles a grouped product uses, and the backend of each stage.

Nothing is timed while a model runs: equal calls get equal launches, so equal bits. A launch is
looked up by architecture, dtype, op, width of an expert and mean rows per expert, first in the file
`REAP_TUNING` names (`reap-kernels tune` writes one), then in `configs/`, and where neither has an
entry it follows from the architecture's shared memory by arithmetic. A line that is `off` is
kept but never chosen: it holds what no GPU has yet shown to be right and faster.
"""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from reap_kernels import device, env
from reap_kernels.documents import Format, to_json
from reap_kernels.errors import DataError
from reap_kernels.files import is_file, replaced
from reap_kernels.schema import Int, Kind, ListOf, Mismatch, OrNull, Record, Text

CONFIGS = Path(__file__).parent / "configs"

# gate_up: a gated product, two right operands and two accumulators. down: one of each.
PRODUCTS = ("gate_up", "down")
# Kernels of Triton's products: operands through pointers, or by TMA in a persistent launch.
KERNELS = ("pointer", "tma")
# The kernel of products that read FP8 codes, by the tiles of a `pointer` line: no table names it,
# the stage `quantized` asks for it.
FP8 = "fp8"
# Backends of each stage of a layer, the first where no table says: of the sort by expert; of
# combination and reduction; of the products, Triton's, torch's grouped_mm or CUDA's for Hopper; how
# products read quantized experts; then what surrounds the experts in a model, where "model" is the
# model's own modules.
STAGE_BACKENDS = {
    "sort": ("cuda", "triton"),
    "saliency": ("cuda", "triton"),
    "layer": ("triton", "grouped_mm", "wgmma"),
    "quantized": ("dequantize", "product"),
    "norm": ("model", "triton"),
    "rotary": ("model", "triton"),
    "attention": ("model", "cudnn"),
}


@dataclass(frozen=True)
class Launch:
    """Tiles of one grouped product, and how a program computes one.

    Attributes:
        block_m, block_n, block_k: tile of rows, columns and depth; powers of two.
        group_m: tiles of rows that share a column of the right operand before the next.
        num_warps: warps of a program.
        num_stages: blocks of K in flight.
        kernel: one of `KERNELS`, or `FP8`.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    kernel: str = KERNELS[0]

    def __str__(self) -> str:
        return ",".join(map(str, self.as_json().values()))

    def as_json(self) -> dict[str, Any]:
        """As a table file has it: without the kernel where it is the first, as older files are."""
        facts = asdict(self)
        if self.kernel == KERNELS[0]:
            del facts["kernel"]
        return facts

    def shared_bytes(self, op: str, itemsize: int) -> int:
        """Shared memory of the operands in flight."""
        operands = self.block_m + self.block_n * (2 if op == "gate_up" else 1)
        return operands * self.block_k * itemsize * self.num_stages

    def accumulators(self, op: str) -> int:
        """Registers of a thread that hold sums."""
        sums = self.block_m * self.block_n * (2 if op == "gate_up" else 1)
        return sums // (32 * self.num_warps)


@dataclass(frozen=True)
class Entry:
    """One line of a table; `width` and `rows` are upper bounds of its bucket, None for no bound;
    a `dtype` of None is any.

    A line has the launch of a product, or the backend of a stage (one of `STAGE_BACKENDS`). `off`
    is the reason why it is never chosen, or None.
    """

    op: str
    dtype: str | None
    width: int | None
    rows: int | None
    launch: Launch | None = None
    backend: str | None = None
    off: str | None = None

    def covers(self, op: str, dtype: str, width: int, rows: float) -> bool:
        """Whether a call falls in this bucket of a line that is not off."""
        return (
            self.off is None
            and self.op == op
            and self.dtype in (None, dtype)
            and (self.width is None or width <= self.width)
            and (self.rows is None or rows <= self.rows)
        )

    def as_json(self) -> dict[str, Any]:
        """As a table file has it."""
        bucket = {"op": self.op, "dtype": self.dtype, "width": self.width, "rows": self.rows}
        facts = {"backend": self.backend} if self.launch is None else self.launch.as_json()
        return bucket | facts | ({} if self.off is None else {"off": self.off})

    def __str__(self) -> str:
        limits = (("width", self.width), ("rows", self.rows))
        bounds = [f"{name} <= {bound}" for name, bound in limits if bound is not None]
        return f"{' '.join([self.op, self.dtype or 'any', *bounds])}: {self.launch or self.backend}"


@dataclass(frozen=True)
class Table:
    """Launches of one architecture.

    Attributes:
        arch: as `device.architecture` names it.
        origin: how the entries came about, for people.
        entries: the first that covers a call holds.
    """

    arch: str
    origin: str
    entries: tuple[Entry, ...]

    def save(self, path: Path) -> None:
        """Writes a file that `REAP_TUNING` can name."""
        lines = [entry.as_json() for entry in self.entries]
        facts = FORMAT.complete({"arch": self.arch, "origin": self.origin, "entries": lines})
        text = ",\n    ".join(map(to_json, facts.pop("entries")))
        head = to_json(facts, indent=2)[:-2]
        with replaced(path) as temporary:
            temporary.write_text(f'{head},\n  "entries": [\n    {text}\n  ]\n}}\n', "utf-8")

    @classmethod
    def load(cls, path: Path) -> "Table":
        """Reads a table.

        Raises:
            DataError: there is no such file, or it is not a table of this version; names the field.
        """
        facts = FORMAT.read(path)
        return cls(facts["arch"], facts["origin"], tuple(map(_entry, facts["entries"])))


@dataclass(frozen=True)
class _PowerOfTwo:
    """A power of two, `low` to `high`."""

    low: int
    high: int

    def check(self, value: Any, at: str) -> None:
        Int(self.low, self.high).check(value, at)
        if value & (value - 1):
            raise Mismatch(at, f"is {value}", "a power of two")


_BUCKET: dict[str, Kind] = {
    "op": Text(choices=(*STAGE_BACKENDS, *PRODUCTS)),
    "dtype": OrNull(Text(choices=("half", "float32", "float64", "int64"))),
    "width": OrNull(Int(1)),
    "rows": OrNull(Int(1)),
}
# Tensor cores multiply no less than 16, and tiles above 256 do not fit in registers.
_TILE = _PowerOfTwo(16, 256)
_LAUNCH: dict[str, Kind] = {
    **dict.fromkeys(("block_m", "block_n", "block_k"), _TILE),
    "group_m": Int(1, 1024),
    "num_warps": _PowerOfTwo(1, 32),
    "num_stages": Int(1, 16),
}
_KERNEL: dict[str, Kind] = {"kernel": Text(choices=KERNELS)}
_OFF: dict[str, Kind] = {"off": Text(500)}


class _Line:
    """A line of a table: the launch of a product, or the backend of a stage."""

    def check(self, value: Any, at: str) -> None:
        Record({"op": _BUCKET["op"]}, open=True).check(value, at)
        op = value["op"]
        if op in STAGE_BACKENDS:
            choices = Text(choices=STAGE_BACKENDS[op])
            Record({**_BUCKET, "backend": choices}, _OFF).check(value, at)
            return
        Record({**_BUCKET, **_LAUNCH}, _KERNEL | _OFF).check(value, at)
        launch = Launch(**{name: value[name] for name in _LAUNCH})
        size = launch.shared_bytes(op, 4 if value["dtype"] == "float32" else 2)
        if size > _SHARED:
            raise Mismatch(at, f"needs {size} bytes of shared memory", f"at most {_SHARED}")
        if launch.accumulators(op) > _REGISTERS:
            found = f"needs {launch.accumulators(op)} registers of a thread for its sums"
            raise Mismatch(at, found, f"at most {_REGISTERS}")


# What no GPU has more of: a kernel that needs more fails when it is launched, or spills for ever.
_SHARED = 1 << 18
_REGISTERS = 256

FORMAT = Format(
    "reap-launch-table",
    1,
    "launch table",
    {"arch": Text(100), "origin": Text(), "entries": ListOf(_Line(), longest=100_000)},
    DataError,
    "write one with `reap-kernels tune`, or unset REAP_TUNING",
)


def _entry(line: dict[str, Any]) -> Entry:
    """A line of a table that was checked."""
    facts = {name: line[name] for name in _BUCKET} | {"off": line.get("off")}
    if "backend" in line:
        return Entry(**facts, backend=line["backend"])
    launch = {name: line[name] for name in (*_LAUNCH, *_KERNEL) if name in line}
    return Entry(**facts, launch=Launch(**launch))


# What tables depend on: the architecture, the file `REAP_TUNING` names, and when it changed.
_Key = tuple[str, Path | None, int]


def tables(arch: str) -> tuple[Table, ...]:
    """Tables that hold for an architecture, first choice first.

    Raises:
        DataError: `REAP_TUNING` names a file that is no table, or one of another architecture.
    """
    return _tables(_key(arch))


def _key(arch: str) -> _Key:
    path = env.tuning()
    if path is None:
        return arch, None, 0
    return arch, path, path.stat().st_mtime_ns if is_file(path) else 0


@functools.cache
def _tables(key: _Key) -> tuple[Table, ...]:
    arch, path, _ = key
    shipped = CONFIGS / f"{arch}.json"
    found = [Table.load(shipped)] if shipped.exists() else []
    if path is not None:
        table = Table.load(path)
        if table.arch != arch:
            raise DataError(
                f"REAP_TUNING={path} is a launch table for {table.arch}, this device is {arch}; "
                "run `reap-kernels tune` here, or unset REAP_TUNING"
            )
        found.insert(0, table)
    return tuple(found)


def off_entries(arch: str) -> tuple[Entry, ...]:
    """Lines of an architecture's tables that are off: never chosen, but compiled and measured.

    Raises:
        DataError: see `tables`.
    """
    return tuple(
        entry for table in tables(arch) for entry in table.entries if entry.off is not None
    )


def table_dtype(dtype: torch.dtype) -> str:
    """`half` for bf16 and fp16, which launch alike; else the dtype's name."""
    half = dtype in (torch.bfloat16, torch.float16)
    return "half" if half else str(dtype).removeprefix("torch.")


def choose(
    where: torch.device,
    op: str,
    dtype: torch.dtype,
    width: int,
    rows: float,
    kernels: tuple[str, ...] = KERNELS,
) -> Launch:
    """The launch of one grouped product.

    Args:
        where: the device.
        op: one of `PRODUCTS`.
        dtype: of the operands.
        width: I, the experts' width.
        rows: mean rows per expert, T * k / E of the whole call.
        kernels: that can read the operands; lines of others are passed over.
    """
    key = _key(device.architecture(where))
    found = _launch(key, op, table_dtype(dtype), width, rows, kernels)
    return found or fallback(op, dtype, rows, device.shared_memory(where))


# Looked up several times per call, and for one model always the same.
@functools.lru_cache(maxsize=4096)
def _launch(
    key: _Key, op: str, dtype: str, width: int, rows: float, kernels: tuple[str, ...]
) -> Launch | None:
    """The first launch of one of these kernels that covers a call."""
    entries = (entry for table in _tables(key) for entry in table.entries)
    covering = (e.launch for e in entries if e.launch and e.covers(op, dtype, width, rows))
    return next((launch for launch in covering if launch.kernel in kernels), None)


@dataclass(frozen=True)
class Launches:
    """Launches of both products of a layer."""

    up: Launch
    down: Launch


@dataclass(frozen=True)
class Problem:
    """What the launches of a layer's products are chosen by.

    Attributes:
        device: where it runs.
        dtype: of the operands.
        activation: kind of the activation; only a fused gated product has two accumulators.
        hidden, intermediate: H and I.
        rows: mean rows per expert, T * k / E of the whole call.
        plain: no biases and no address table, which need registers of their own.
        kernels: that can read the operands.
    """

    device: torch.device
    dtype: torch.dtype
    activation: str
    hidden: int
    intermediate: int
    rows: float
    plain: bool
    kernels: tuple[str, ...] = KERNELS

    def launches(self) -> Launches:
        """Launches of both products."""
        if self.hidden * self.dtype.itemsize % 16 or self.intermediate * self.dtype.itemsize % 16:
            return Launches(*2 * (_UNALIGNED[self.dtype.itemsize],))
        fused = self.activation not in ("relu2", "opaque")
        up = self._choose("gate_up" if fused else "down")
        return Launches(up if self.plain or not fused else _roomier(up), self._choose("down"))

    def _choose(self, op: str) -> Launch:
        return choose(self.device, op, self.dtype, self.intermediate, self.rows, self.kernels)


# Rows that do not begin at 16 bytes are loaded element by element, through registers.
_UNALIGNED = {2: Launch(64, 32, 32, 8, 4, 2), 4: Launch(32, 16, 32, 8, 4, 2)}


def _roomier(launch: Launch) -> Launch:
    """Half as wide where two accumulators leave a thread no register for anything else."""
    if launch.accumulators("gate_up") < 128 or launch.block_n < 32:
        return launch
    return replace(launch, block_n=launch.block_n // 2)


def choose_backend(
    where: torch.device,
    op: str,
    dtype: torch.dtype,
    width: int,
    rows: float,
    among: tuple[str, ...] | None = None,
) -> str:
    """The backend of a stage: the first whose line covers a call; where none does, the first of
    `STAGE_BACKENDS[op]`.

    Args:
        where: the device.
        op: a key of `STAGE_BACKENDS`.
        dtype: of the operands.
        width: I, the experts' width; for `norm`, `rotary` and `attention` the hidden size.
        rows: mean rows per expert; for those three the tokens of a call.
        among: the only backends that are asked for; lines of others are passed over. Default all.
    """
    key = _key(device.architecture(where))
    known = STAGE_BACKENDS[op] if among is None else among
    return _backend(key, op, table_dtype(dtype), width, rows, known) or known[0]


@functools.lru_cache(maxsize=4096)
def _backend(
    key: _Key, op: str, dtype: str, width: int, rows: float, known: tuple[str, ...]
) -> str | None:
    """The first of these backends whose line covers a call."""
    entries = (entry for table in _tables(key) for entry in table.entries if entry.backend in known)
    return next((e.backend for e in entries if e.covers(op, dtype, width, rows)), None)


def fallback(op: str, dtype: torch.dtype, rows: float, shared_memory: int) -> Launch:
    """Tiles as large as registers allow, no taller than the mean number of rows per expert, and as
    many stages as fit in shared memory.
    """
    if dtype == torch.float32:  # no tensor cores: small tiles keep the product in registers
        gated = op == "gate_up"
        launch = Launch(64, 32 if gated else 64, 32, 8, 4, 3 if gated else 2)
    else:
        wide = 64 if op == "gate_up" else 128
        launch = Launch(64 if rows <= 64 else 128, wide, 64, 8, 8, 4)
    one = replace(launch, num_stages=1).shared_bytes(op, dtype.itemsize)
    return replace(launch, num_stages=max(1, min(launch.num_stages, shared_memory // one)))


def ordered(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """One entry per bucket and kernel or backend, the first of it, in the order given: the next one
    holds where the first cannot serve. Fewer rows come first, then narrower experts. Entries that
    are off come before those that hold, so that deleting `off` puts one in their place.
    """
    found: dict[tuple[Any, ...], Entry] = {}
    for entry in entries:
        bucket = (entry.op, entry.dtype, entry.width, entry.rows)
        serving = entry.backend if entry.launch is None else entry.launch.kernel
        offered = () if entry.off is None else (entry.launch,)
        found.setdefault((*bucket, serving, *offered), entry)
    unbounded = 1 << 62

    def place(e: Entry) -> tuple[str, str, int, int, bool]:
        return e.op, e.dtype or "", e.rows or unbounded, e.width or unbounded, e.off is None

    return tuple(sorted(found.values(), key=place))
