"""Writes output shards, with several threads. Unchanged bytes are copied by the operating system.

Memory does not grow with the checkpoint: whole tensors and rows of dimension 0 are byte ranges of
the source and never enter the process. Rows of other dimensions, packed codes and tables of ids
pass through buffers of `BUFFER_BYTES` (or of one slab, the rows of all experts, where that is
larger), three at a time in each thread. Values that are computed are written when all files have
the rest, one part of a layer after the other, into room that was left for them.

Only the calling thread runs the caller's progress function and receives signals; the others copy.
The caller gets the first error of any thread, after every thread has ended: each checks at least
every 16 MiB whether it has to stop. (A second Ctrl-C ends the wait for a disk that hangs; such a
thread finds its file removed.)
"""

import contextlib
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from reap_driver.files.fingerprints import unreadable
from reap_driver.files.safetensors_file import DTYPE_BITS, TensorEntry
from reap_driver.model.routing_table import relabel
from reap_driver.writer.actions import Compute, Copy, Relabel, Select, SelectCodes, SetLength
from reap_driver.writer.codes import select_codes, slab_bytes
from reap_driver.writer.shards import OutShard, OutTensor
from reap_kernels.errors import CheckpointError, PlanError
from reap_kernels.files import NO_SPACE, named

BUFFER_BYTES = 4 << 20  # gathering rows is as quick with 1 and slower with 16, beyond the caches
_CHUNK_BYTES = 16 << 20  # per system call; small, so that progress is shown and Ctrl-C acts
_MIN_RANGE_BYTES = 64 << 10  # rows at least this long are copied by the kernel one by one
_NUMPY_INTEGERS = {
    f"{kind}{bits}": f"<{kind.lower()}{bits // 8}" for kind in "UI" for bits in (8, 16, 32, 64)
}
# Independent of the number of cores: the kernel copies, and mostly waits for the disk. Network
# disks and SSDs serve a few requests at once faster than one after the other. A spinning disk seeks
# between the files, but only every 16 MiB. More threads gain nothing.
DEFAULT_THREADS = 4
Progress = Callable[[int], None]  # bytes written since the last call
_Event = int | Future[int]  # bytes written since the last event, or a shard that is done


class _Stopped(Exception):
    """Ends a thread whose work is no longer wanted. Never leaves this module."""


def check_threads(threads: int | None) -> None:
    """Checks a number of threads.

    Raises:
        PlanError: `threads` is neither None nor a positive integer.
    """
    if threads is not None and (type(threads) is not int or threads < 1):
        raise PlanError(
            f"threads {threads!r}: give a positive number of threads, or None for at most "
            f"{DEFAULT_THREADS}."
        )


def write_shards(
    folder: Path, shards: Sequence[OutShard], progress: Progress, threads: int | None = None
) -> int:
    """Writes all files. Returns their size in bytes, which does not depend on the threads.

    Args:
        folder: to write into.
        shards: one file each; a file is written by one thread.
        progress: called in this thread only.
        threads: at most so many files are written at once; None: `DEFAULT_THREADS`.
    """
    stopped = threading.Event()
    events: SimpleQueue[_Event] = SimpleQueue()

    def report(count: int) -> None:
        if stopped.is_set():
            raise _Stopped
        events.put(count)

    def finish(future: Future[int]) -> None:
        events.put(future)  # before the flag is set, so that the first error is the first event
        if not future.cancelled() and future.exception() is not None:
            stopped.set()

    with ThreadPoolExecutor(threads or DEFAULT_THREADS, "reap-writer") as pool:
        try:
            for shard in shards:
                pool.submit(write_shard, folder, shard, report).add_done_callback(finish)
            return _listen(events, len(shards), progress)
        except BaseException:  # also Ctrl-C and SIGTERM: threads must end before the clean-up
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _listen(events: SimpleQueue[_Event], shards: int, progress: Progress) -> int:
    """Reports progress until all shards are done; returns their bytes, raises the first error."""
    written = 0
    while shards:
        batch = [events.get()]
        while not events.empty():  # a slow progress function is called less often, not later
            batch.append(events.get())
        done = [event for event in batch if not isinstance(event, int)]
        written += sum(future.result() for future in done)
        shards -= len(done)
        if count := sum(event for event in batch if isinstance(event, int)):
            progress(count)
    return written


def write_shard(folder: Path, shard: OutShard, progress: Progress) -> int:
    """Writes one file from beginning to end: file systems lock a file during a write, so writing
    parts of it at the same time gains nothing. Returns its size in bytes.

    Files are flushed when all are written: flushing each would leave the disk idle while the next
    one is read.
    """
    path = folder / shard.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with named(path), path.open("xb", buffering=0) as out:
        header = shard.header()
        write_all(out, header)
        progress(len(header))
        _write_tensors(out, shard, progress)
        out.truncate(len(header) + shard.nbytes)  # if the last tensors are computed
        return os.fstat(out.fileno()).st_size


def write_computed(
    folder: Path,
    shards: Sequence[OutShard],
    values: Iterable[Mapping[str, Tensor]],
    progress: Progress,
) -> None:
    """Writes the tensors that are computed into files that have everything else.

    Args:
        folder: of `write_shards`.
        shards: as there.
        values: name -> values, for some tensors at a time.
        progress: called with bytes written.
    """
    places = {}
    for shard in shards:
        start = len(shard.header())
        for tensor in shard.tensors:
            if isinstance(tensor.action, Compute):
                places[tensor.name] = (folder / shard.name, start, tensor)
            start += tensor.nbytes
    for group in values:
        for name, value in group.items():
            path, start, tensor = places.pop(name)
            data = value.contiguous().view(-1).view(torch.uint8).numpy()
            assert (tuple(value.shape), data.nbytes) == (tensor.shape, tensor.nbytes), name
            with named(path), path.open("r+b", buffering=0) as out:
                out.seek(start)
                write_all(out, data.data)
            progress(tensor.nbytes)
    assert not places, f"no values for {next(iter(places))}"


def write_all(out: BinaryIO, data: bytes | memoryview) -> None:
    """Writes every byte of `data` to an unbuffered file."""
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]


class _Range(NamedTuple):
    """Bytes of a source file that are copied as they are."""

    path: Path
    start: int
    stop: int


def _write_tensors(out: BinaryIO, shard: OutShard, progress: Progress) -> None:
    """Writes a file's tensors in order. Every source file is opened once, and the next range is
    announced to the system, so that reading overlaps with writing.
    """
    with contextlib.ExitStack() as stack:
        opened: dict[Path, BinaryIO] = {}

        def source_of(piece: _Range | OutTensor) -> BinaryIO:
            path = piece.path if isinstance(piece, _Range) else piece.source.file
            if path not in opened:
                opened[path] = stack.enter_context(shard.fingerprints.open(path))
            return opened[path]

        for piece, following in itertools.pairwise(itertools.chain(_pieces(shard.tensors), [None])):
            if isinstance(following, _Range):
                _announce(source_of(following), following.start, following.stop)
            if isinstance(piece, _Range):
                copy_range(source_of(piece), out, piece.start, piece.stop, progress)
            elif piece is not None and isinstance(piece.action, Compute):
                out.seek(piece.nbytes, os.SEEK_CUR)
            elif piece is not None:
                for block in _computed(source_of(piece), piece):
                    write_all(out, block)
                    progress(len(block))


def copy_range(source: BinaryIO, out: BinaryIO, start: int, stop: int, progress: Progress) -> None:
    """Appends bytes [start, stop) of `source` to `out`, inside the kernel if the system can.

    Written by hand because no library copies byte ranges by copy_file_range, which is what makes
    writing as fast as `cp`; shutil copies whole files only.
    """
    while start < stop:
        _announce(source, start + _CHUNK_BYTES, stop)
        copied = _copy_some(source, out, start, min(stop - start, _CHUNK_BYTES))
        if copied == 0:
            raise CheckpointError(
                f"{source.name}: ended at byte {start} while it was read, {stop} expected; "
                "do not change the source while it is pruned."
            )
        start += copied
        progress(copied)


def _announce(source: BinaryIO, start: int, stop: int) -> None:
    """Asks the system to begin reading [start, stop), at most one chunk of it."""
    if start < stop and sys.platform == "linux":
        count = min(stop - start, _CHUNK_BYTES)
        os.posix_fadvise(source.fileno(), start, count, os.POSIX_FADV_WILLNEED)


def _copy_some(source: BinaryIO, out: BinaryIO, start: int, count: int) -> int:
    """Copies up to `count` bytes; returns how many."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source.fileno(), out.fileno(), count, offset_src=start)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise
            # The system cannot copy between these two files; or one of them failed, and the calls
            # below will say which.
    data = _read_some(source, min(count, BUFFER_BYTES), start)
    write_all(out, data)
    return len(data)


def _read_some(source: BinaryIO, count: int, start: int) -> bytes:
    """Up to `count` bytes; only this thread reads from `source`."""
    try:
        source.seek(start)
        return source.read(count)
    except OSError as error:
        raise unreadable(Path(source.name), error) from error


def _pieces(tensors: Iterable[OutTensor]) -> Iterator[_Range | OutTensor]:
    """Ranges to copy, joined where one continues the other, and tensors to compute."""
    pending: _Range | None = None
    for piece in itertools.chain.from_iterable(map(_raw_pieces, tensors)):
        if pending is not None:
            if isinstance(piece, _Range) and piece[:2] == (pending.path, pending.stop):
                pending = pending._replace(stop=piece.stop)
                continue
            yield pending
            pending = None
        if isinstance(piece, _Range):
            pending = piece
        else:
            yield piece
    if pending is not None:
        yield pending


def _raw_pieces(tensor: OutTensor) -> Iterator[_Range | OutTensor]:
    """Pieces of one tensor, not joined."""
    source, action = tensor.source, tensor.action
    if isinstance(action, Copy):
        yield _Range(source.file, source.start, source.stop)
        return
    if isinstance(action, Select):
        outer, length, row = _extents(source, action.dim)
        if outer == 1 or row >= _MIN_RANGE_BYTES:
            for part in range(outer):
                begin = source.start + part * length * row
                for index in action.rows[part * len(action.rows) // outer]:
                    yield _Range(source.file, begin + index * row, begin + (index + 1) * row)
            return
    yield tensor


def _computed(source: BinaryIO, tensor: OutTensor) -> Iterator[bytes]:
    """Bytes of a tensor whose rows are scattered, or whose values change, block by block."""
    if isinstance(tensor.action, Relabel):
        yield from _relabelled(source, tensor, tensor.action)
    elif isinstance(tensor.action, Select):
        yield from _gathered(source, tensor, tensor.action)
    elif isinstance(tensor.action, SelectCodes):
        yield from _repacked(source, tensor.source, tensor.action)
    elif isinstance(tensor.action, SetLength):
        yield _resized(source, tensor.source, tensor.action)


def _gathered(source: BinaryIO, tensor: OutTensor, action: Select) -> Iterator[bytes]:
    """Rows of an inner dimension: read whole slabs, keep the rows."""
    outer, length, row = _extents(tensor.source, action.dim)
    per_part = outer // len(action.rows)
    step = max(1, BUFFER_BYTES // (length * row))
    for part, rows in enumerate(action.rows):
        index = np.asarray(rows)
        for first in range(part * per_part, (part + 1) * per_part, step):
            count = min(step, (part + 1) * per_part - first)
            begin = tensor.source.start + first * length * row
            data = _read(source, begin, count * length * row)
            slabs = np.frombuffer(data, np.uint8).reshape(count, length, row)
            yield slabs[:, index].tobytes()


def _repacked(source: BinaryIO, entry: TensorEntry, action: SelectCodes) -> Iterator[bytes]:
    """Words along one dimension, unpacked and packed again, some slabs at a time."""
    outer, length, row = _extents(entry, action.dim)
    columns = row // 4
    step = max(1, BUFFER_BYTES // slab_bytes(action, length, columns))
    for first in range(0, outer, step):
        count = min(step, outer - first)
        data = _read(source, entry.start + first * length * row, count * length * row)
        words = np.frombuffer(data, "<u4").reshape(count, length, columns)
        yield select_codes(words, action.bits, action.positions).tobytes()


def _resized(source: BinaryIO, entry: TensorEntry, action: SetLength) -> bytes:
    """The shape of a matrix, one of its lengths replaced."""
    dtype = np.dtype(_NUMPY_INTEGERS[entry.dtype])
    lengths = np.frombuffer(_read(source, entry.start, entry.nbytes), dtype).copy()
    if lengths[action.index] != action.before:
        raise CheckpointError(
            f"{entry.file}: tensor {action.name!r} says that the matrix has the shape "
            f"{lengths.tolist()}, but the model's has {action.before} in dimension "
            f"{action.index}; download or make the checkpoint again."
        )
    lengths[action.index] = action.after
    return lengths.tobytes()


def _relabelled(source: BinaryIO, tensor: OutTensor, action: Relabel) -> Iterator[bytes]:
    """An id table, its values rewritten."""
    entry = tensor.source
    dtype = np.dtype(_NUMPY_INTEGERS[entry.dtype])
    rows, k = math.prod(entry.shape[:-1]), entry.shape[-1]
    step = max(1, BUFFER_BYTES // (k * dtype.itemsize))
    for first in range(0, rows, step):
        count = min(step, rows - first)
        width = k * dtype.itemsize
        data = _read(source, entry.start + first * width, count * width)
        table = np.frombuffer(data, dtype).reshape(count, k)
        new = relabel(
            table,
            action.kept,
            action.num_experts,
            first_row=first,
            where=f"{entry.file}: {tensor.name}",
        )
        yield new.tobytes()


def _extents(source: TensorEntry, dim: int) -> tuple[int, int, int]:
    """(slabs before `dim`, its length, bytes of one row behind it)."""
    row = math.prod(source.shape[dim + 1 :]) * DTYPE_BITS[source.dtype] // 8
    return math.prod(source.shape[:dim]), source.shape[dim], row


def _read(source: BinaryIO, start: int, count: int) -> bytes:
    """Exactly `count` bytes."""
    data = _read_some(source, count, start)
    while len(data) < count:
        more = _read_some(source, count - len(data), start + len(data))
        if not more:
            raise CheckpointError(
                f"{source.name}: ended at byte {start + len(data)} while it was read; "
                "do not change the source while it is pruned."
            )
        data += more
    return data
