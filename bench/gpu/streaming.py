"""Stage 5, streaming: true-shape layers from files, each loaded while the one before computes.

Three figures per layer: loading alone, computing alone, both overlapped. All are taken around
`run_streamed` itself, by a stand-in for the streamed model that looks at the clock whenever a
layer is asked for or let go. Before that, small files must give the bits of a resident run; after
it, the overlapped pass must have given the bits of the pass that loaded and computed in turn.

transformers and reap_driver are imported inside functions: a machine without them runs the rest.
"""

import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu import end_to_end, projected, streamed_files
from bench.gpu.clock import Deadline
from bench.gpu.layer import release
from bench.gpu.machine import Machine
from bench.gpu.stopwatch import Stopwatch
from bench.gpu.streamed_files import FORMATS, TINY, TRUE, Shape
from bench.gpu.verify import CheckFailed, NotHere, stage_outcome
from reap_kernels.errors import ResourceError

Row = dict[str, object]
GOAL = 1.2  # overlapped over the longer of loading and computing
# The overlapped pass repeats its sequences until computing takes as long as loading, where
# overlapping is hardest, but no more than a calibration set of 1,360 sequences would.
_MOST_ROUNDS = 21
# Bytes that must stay free on the disk.
_MARGIN = 1 << 30
_FIGURES = ("sequences", "length", "batch", "offload", "gb", "load_s", "compute_s", "rounds")
_FIGURES += ("overlapped_s", "overlapped/longer", "read_gb_s", "disk_gb_s", "device_gb", "host_gb")
_FIGURES += ("pinned_gb", "layers", "total_gb", "total_s", "goal_s")


@dataclass(frozen=True)
class Sizes:
    """What is run.

    Attributes:
        shape: of the files.
        sequences: how many there are.
        length: tokens in each.
    """

    shape: Shape
    sequences: int
    length: int


TRUE_RUN, TINY_RUN = Sizes(TRUE, 64, 2048), Sizes(TINY, 2, 32)


@dataclass(frozen=True)
class Data:
    """Batches of random token ids, again from the first after the last."""

    ids: Sequence[Tensor]

    def group(self, number: int) -> str:
        """All are of one group."""
        return "all"

    def inputs(self, number: int) -> dict[str, Tensor]:
        """`input_ids` [batch, length] int64."""
        return {"input_ids": self.ids[number % len(self.ids)]}


def disk_bytes(sizes: Sizes, format: str) -> int:
    """Free bytes needed for the files of a format, which are deleted before the next one's."""
    return streamed_files.nbytes(sizes.shape, format) + _MARGIN


def help_text() -> str:
    """What the stage is and takes, for --help."""
    fewer = replace(TRUE_RUN, shape=replace(TRUE, num_hidden_layers=2))
    asked = ((TRUE_RUN, "fp8"), (TRUE_RUN, "bf16"), (fewer, "bf16"))
    fp8, bf16, two = (math.ceil(disk_bytes(*one) / 1e9) for one in asked)
    return (
        f"`streaming` writes files of 3 layers to --folder and deletes them: {fp8} GB free are "
        f"needed for FP8, then {bf16} GB for bf16 ({two} GB with 2 layers, where that is all there "
        "is); it takes about 4 minutes"
    )


def run(machine: Machine, deadline: Deadline, folder: Path | None = None) -> list[Row]:
    """Rows of every layer of every format, then of the projected totals."""
    sizes = TINY_RUN if machine.smoke else TRUE_RUN
    reason = end_to_end.missing() or (deadline.reason if deadline.passed() else None)
    if reason is not None:
        return [_row(sizes, format, "skipped", reason) for format in FORMATS]
    rows: list[Row] = []
    measured: dict[str, projected.Measured] = {}
    for format in FORMATS:
        with tempfile.TemporaryDirectory(prefix="reap-streaming-", dir=folder) as name:
            own = _attempt(machine, sizes, format, Path(name), deadline, measured)
        rows += own
        if any(row["status"] == "failed" for row in own):
            return rows
    return rows + _totals(machine, measured.get(FORMATS[0]))


def _attempt(
    machine: Machine,
    sizes: Sizes,
    format: str,
    folder: Path,
    deadline: Deadline,
    measured: dict[str, projected.Measured],
) -> list[Row]:
    """Rows of one format; one row that says why, where there are no figures."""
    from reap_driver.base.interrupts import Interrupted

    try:
        sizes = _fitting(sizes, format, folder)
        checked = verify(machine.device, format, folder / "small")
        bench = Bench(machine, sizes, format, folder, deadline)
        bench.write([one.load_rate for one in measured.values()])
        rows, measured[format] = bench.measure(checked)
        return rows
    except (NotHere, ResourceError) as error:
        return [_row(sizes, format, "skipped", str(error))]
    except Interrupted:
        return [_row(sizes, format, "skipped", deadline.reason)]
    except Exception as error:  # noqa: BLE001  what earlier stages found must not be lost
        return [_row(sizes, format, *stage_outcome(error))]
    finally:
        release(machine)


def _fitting(sizes: Sizes, format: str, folder: Path) -> Sizes:
    """The same with as many layers as the disk holds, at least two: one must load beside another.

    Raises:
        NotHere: the disk is too small.
    """
    free = shutil.disk_usage(folder).free
    for layers in range(sizes.shape.num_hidden_layers, 1, -1):
        fewer = replace(sizes, shape=replace(sizes.shape, num_hidden_layers=layers))
        need = disk_bytes(fewer, format)
        if need <= free:
            return fewer
    raise NotHere(
        f"2 layers in {format} need {need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free "
        "there; give another disk with --folder"
    )


def verify(device: torch.device, format: str, folder: Path) -> str:
    """Small files streamed, states waiting in every place, against the same files resident.

    Raises:
        CheckFailed: a statistic has other bits.
    """
    from reap_driver.base.interrupts import Stop
    from reap_driver.load.resident import load_model
    from reap_driver.observation.observer import observe
    from reap_driver.observation.run import Run, run_resident

    streamed_files.write(TINY, format, folder, device)
    data = Data(_ids(TINY_RUN, 1))
    numbers = range(2 * len(data.ids))
    resident = observe(load_model(folder, device=device))
    run_resident(Run(resident, data, numbers, Stop()))
    want = resident.stats
    for offload in ("device", "host", "file"):
        with _observed(folder, device, data, numbers, offload) as (observer, _):
            got = observer.stats
        for name, layer in want.layers.items():
            for field_name, value in layer.fields().items():
                if not torch.equal(value, got.layers[name].fields()[field_name]):
                    raise CheckFailed(
                        f"{format}, hidden states on the {offload}: {field_name} of {name} has "
                        "other bits than in a resident run"
                    )
    return "the bits of a resident run at a small size"


@contextmanager
def _observed(
    folder: Path,
    device: torch.device,
    data: Data,
    numbers: Sequence[int],
    offload: Any,
    watch: Stopwatch | None = None,
) -> Iterator[tuple[Any, Any]]:
    """The observer and the states behind the last layer, after one streamed pass."""
    from reap_driver.base.interrupts import Stop
    from reap_driver.load.streamed_model import open_streamed
    from reap_driver.observation.observer import observe
    from reap_driver.observation.run import Run, run_streamed
    from reap_driver.observation.state_store import StateStore

    states = folder / "states"
    store = StateStore(offload, device, states)
    try:
        with open_streamed(folder, device=device) as streamed:
            observer = observe(streamed.model)
            stop = Stop()
            run, watched = Run(observer, data, numbers, stop), streamed
            if watch is not None:
                run.done, watched = watch.batch, watch.on(streamed, stop)
            run_streamed(run, watched, store)
            yield observer, store
    finally:
        store.close()
        shutil.rmtree(states, ignore_errors=True)


def _ids(sizes: Sizes, batch: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    shape = (sizes.sequences, sizes.length)
    return list(torch.randint(0, sizes.shape.vocab_size, shape, generator=rng).split(batch))


@dataclass
class Bench:
    """One format of the true shape.

    Attributes:
        folder: where its files are.
        disk: bytes a second one reader got from them, and where they came from, in words.
    """

    machine: Machine
    sizes: Sizes
    format: str
    root: Path
    deadline: Deadline
    disk: tuple[float, str] = (0.0, "")
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.root / "model"

    def write(self, rates: Sequence[float]) -> None:
        """Writes the files; `rates` are bytes a second that formats before this one loaded with.

        Raises:
            NotHere: writing them, or reading them three times, would take longer than is left.
        """
        from reap_driver.memory.rates import disk_rate

        total, began = streamed_files.nbytes(self.sizes.shape, self.format), time.perf_counter()

        def wrote(done: int) -> None:
            expected = (time.perf_counter() - began) * (total - done) / done
            self._need(expected, f"writing {total / 1e9:.0f} GB")

        streamed_files.write(self.sizes.shape, self.format, self.folder, self.machine.device, wrote)
        files = sorted(self.folder.glob("*.safetensors"))
        rate = disk_rate(files[0])
        self.disk = (rate.per_second, rate.how)
        self._forget()
        # Alone, then overlapped behind a first layer that nothing hides.
        self._need(
            3 * total / max([rate.per_second, *rates]), f"reading {total / 1e9:.0f} GB often"
        )

    def _need(self, seconds: float, what: str) -> None:
        """Raises where something would take longer than is left."""
        left = self.deadline.left()
        if seconds > left:
            raise NotHere(
                f"{what} would take about {seconds:.0f} s, {max(0.0, left):.0f} s are left; give "
                "more with --budget, or a faster disk with --folder"
            )

    def _forget(self) -> None:
        for path in self.folder.glob("*.safetensors"):
            streamed_files.forget(path)

    def measure(self, checked: str) -> tuple[list[Row], projected.Measured]:
        """Rows of the layers, and what totals are projected from.

        Raises:
            CheckFailed: the overlapped pass gave other bits.
        """
        from reap_driver.base.units import in_bytes

        sizes, plan = self._plan(1, None)
        data = Data(_ids(self.sizes, plan.batch_size))
        alone = Stopwatch(self.machine.device, self.deadline, warm=True)
        # One batch more: the first of a layer compiles kernels and is compared with eager ones.
        numbers = range(len(data.ids) + 1)
        with self._pass(data, numbers, plan.offload, alone) as store:
            before = [
                [tensor.cpu() for tensor in _state(store, number)]
                for number in range(len(data.ids))
            ]
        longest = statistics.median(alone.loads) / statistics.median(alone.computes)
        rounds = min(_MOST_ROUNDS, max(1, round(longest)))
        _, plan = self._plan(rounds, plan.batch_size)
        both = Stopwatch(self.machine.device, self.deadline, ahead=True)
        numbers = range(len(data.ids) * rounds)
        with self._pass(data, numbers, plan.offload, both) as store:
            for number in numbers:
                self._compare(before, store, number)
        note = f"{checked}; overlapped, the bits of loading and computing in turn; states of "
        note += f"{in_bytes(rounds * self._tokens * sizes.state_bytes)}; {self.disk[1]}"
        rows = [
            self._layer(layer, alone, both, rounds, plan, note)
            for layer in range(self.sizes.shape.num_hidden_layers)
        ]
        ratios = [_ratio(layer, alone, both, rounds) for layer in range(len(alone.loads) - 1)]
        flops = sizes.flops_per_token / self.sizes.shape.num_hidden_layers * self._tokens
        return rows, projected.Measured(
            load_rate=statistics.median(
                nbytes / seconds for nbytes, seconds in zip(alone.nbytes, alone.loads, strict=True)
            ),
            flop_rate=flops / statistics.median(alone.computes),
            factor=max([1.0, *ratios]),
            format=self.format,
        )

    def _compare(self, before: Sequence[Sequence[Tensor]], store: Any, number: int) -> None:
        """A batch's state against the first pass's, a repeated one's against its first."""
        got = _state(store, number)
        if number < len(before):
            want, got = before[number], [tensor.cpu() for tensor in got]
        else:
            want = _state(store, number % len(before))
        if not all(map(torch.equal, want, got)):
            raise CheckFailed(
                f"{self.format}: the last layer's output has other bits when layers load while "
                "others compute"
            )

    @property
    def _tokens(self) -> int:
        return self.sizes.sequences * self.sizes.length

    @contextmanager
    def _pass(
        self, data: Data, numbers: Sequence[int], offload: str, watch: Stopwatch
    ) -> Iterator[Any]:
        """The states behind the last layer of one pass that read from the disk."""
        self._forget()
        release(self.machine)
        device = self.machine.device
        with _observed(self.folder, device, data, numbers, offload, watch) as (observer, store):
            observer.stats  # noqa: B018  raises where an expert gave NaN or Inf
            yield store

    def _plan(self, rounds: int, batch: int | None) -> tuple[Any, Any]:
        """Sizes of the model, and how the library would run it here, streamed.

        Raises:
            ResourceError: it does not fit.
        """
        tokens = rounds * self._tokens
        where, length = self.root, self.sizes.length
        return projected.planned(self.folder, self.machine.device, where, tokens, length, batch)

    def _layer(
        self, layer: int, alone: Stopwatch, both: Stopwatch, rounds: int, plan: Any, note: str
    ) -> Row:
        """The row of one layer; behind the last one nothing loads, so nothing overlaps."""
        figures: Row = {"batch": plan.batch_size, "offload": plan.offload, "rounds": rounds}
        figures["gb"] = f"{alone.nbytes[layer] / 1e9:.4g}"
        figures["load_s"] = f"{alone.loads[layer]:.4g}"
        figures["compute_s"] = f"{alone.computes[layer]:.4g}"
        figures["read_gb_s"] = f"{alone.nbytes[layer] / alone.loads[layer] / 1e9:.4g}"
        figures["disk_gb_s"] = f"{self.disk[0] / 1e9:.4g}"
        for key, values in both.memory(layer).items():
            figures[key] = "" if values is None else f"{values / 1e9:.4g}"
        if layer + 1 < self.sizes.shape.num_hidden_layers:
            figures["overlapped_s"] = f"{both.overlapped(layer):.4g}"
            figures["overlapped/longer"] = f"{_ratio(layer, alone, both, rounds):.3f}"
        return {**_row(self.sizes, self.format, "timed", note), "what": f"layer {layer}", **figures}


def _ratio(layer: int, alone: Stopwatch, both: Stopwatch, rounds: int) -> float:
    """Computing a layer while the next loads, over the longer of the two alone."""
    longer = max(rounds * alone.computes[layer], alone.loads[layer + 1])
    return both.overlapped(layer) / longer


def _state(store: Any, number: int) -> list[Tensor]:
    """What the last layer left of a batch."""
    found: list[Tensor] = store.get(number, None).tensors
    return found


def _totals(machine: Machine, measured: projected.Measured | None) -> list[Row]:
    """Rows of the projected totals, from what files in the published format gave."""
    blank = _row(TRUE_RUN, FORMATS[0], "skipped", "")
    rows = []
    for target in projected.TARGETS:
        name: Row = {"model": target.name, "what": "projected"}
        if measured is None:
            note = "projected from FP8 layers, which were not timed"
            rows.append({**blank, **name, "sequences": "", "length": "", "note": note})
            continue
        figures = projected.total(target, measured, machine.device)
        rows.append({**blank, **name, **figures})
    return rows


def _row(sizes: Sizes, format: str, status: str, note: str) -> Row:
    """A row before its figures."""
    blank = dict.fromkeys(_FIGURES, "")
    how_much: Row = {"sequences": sizes.sequences, "length": sizes.length}
    how_much["layers"] = sizes.shape.num_hidden_layers
    what: Row = {"model": sizes.shape.name, "format": format, "what": "layers", "status": status}
    return {**what, **blank, **how_much, "note": note}
