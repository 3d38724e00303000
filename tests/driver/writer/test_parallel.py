"""Shards written by several threads: the same bytes, one caller's thread, errors that stop all,
bounded memory."""

import errno
import itertools
import os
import re
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import pytest

from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.files.safetensors_file import encode_header, read_header
from reap_driver.planning.plan import Plan
from reap_driver.writer import staging, stream
from reap_driver.writer.actions import Select
from reap_driver.writer.apply import apply_plan
from reap_driver.writer.shards import OutShard, out_tensor
from reap_driver.writer.stream import Progress, write_shards
from reap_kernels.errors import CheckpointError, ReapError, ResourceError
from tests.driver.writer import saved
from tests.limits import HUNG

SHARDS = 4


@pytest.fixture
def full(tmp_path: Path) -> Path:
    saved.save("mixtral", tmp_path / "full")
    saved.shard(tmp_path / "full", SHARDS)
    return tmp_path / "full"


@pytest.fixture
def plan(full: Path) -> Plan:
    return saved.make_plan(full, meta_model(load_config(full)))


def writers() -> list[str]:
    """Writing threads that are alive."""
    return [t.name for t in threading.enumerate() if t.name.startswith("reap-writer")]


def copy_stepwise(
    monkeypatch: pytest.MonkeyPatch, step: int, first: Callable[[BinaryIO], None]
) -> None:
    """Copy `step` bytes at a time, each time after `first`, in the thread that copies."""
    copy = stream._copy_some

    def stepwise(source: BinaryIO, out: BinaryIO, start: int, count: int) -> int:
        first(source)
        return copy(source, out, start, count)

    monkeypatch.setattr(stream, "_CHUNK_BYTES", step)
    monkeypatch.setattr(stream, "_copy_some", stepwise)


def when_stopped(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """What is set when the threads of the next write are to stop."""
    stopped = threading.Event()
    monkeypatch.setattr(stream, "threading", SimpleNamespace(Event=lambda: stopped))
    return stopped


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v4", "longcat_flash"])
def test_bytes_do_not_depend_on_threads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied ranges, gathered rows and rewritten tables, in many steps although they are small."""
    monkeypatch.setattr(stream, "_CHUNK_BYTES", 500)
    monkeypatch.setattr(stream, "BUFFER_BYTES", 300)
    full = tmp_path / "full"
    model = saved.save(name, full)
    saved.shard(full, SHARDS)
    plan = saved.make_plan(full, model)
    results = {}
    for threads in (1, 2, 8, None):
        for size in (None, 10_000):
            out = tmp_path / f"{threads}-{size}" / "pruned"  # the card says its name
            apply_plan(full, plan, out, threads=threads, shard_size=size)
            files = {path: content for path, (content, _) in saved.snapshot(out).items()}
            card, timed = re.subn(rb"written in [|] .* s ", b"", files["README.md"])
            assert timed == 1
            results[threads, size] = {**files, "README.md": card}
    for (_, size), files in results.items():
        assert files == results[1, size]
    assert len(results[1, 10_000]) > len(results[1, None]) > SHARDS


@pytest.mark.parametrize("threads", [1, 3, None])
def test_so_many_files_are_written_at_once(
    full: Path, plan: Plan, tmp_path: Path, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = threads or SHARDS
    together = threading.Barrier(expected)
    running: list[int] = []
    write = stream.write_shard

    def counted(folder: Path, shard: OutShard, progress: Progress) -> int:
        running.append(len(writers()))
        if shard.name != "model-00004-of-00004.safetensors" or expected == SHARDS:
            together.wait(HUNG)  # raises unless as many arrive
        return write(folder, shard, progress)

    monkeypatch.setattr(stream, "write_shard", counted)
    apply_plan(full, plan, tmp_path / "pruned", threads=threads)
    assert len(running) == SHARDS
    assert max(running) <= expected
    assert writers() == []


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("in_main", [True, False])
def test_progress_is_one_thread_s_and_rises(
    full: Path,
    plan: Plan,
    tmp_path: Path,
    threads: int,
    in_main: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, int, int]] = []
    callers: list[int] = []
    told, copies = threading.Condition(), itertools.count()

    def progress(done: int, total: int) -> None:
        with told:
            calls.append((threading.get_ident(), done, total))
            told.notify_all()

    def wait(_: BinaryIO) -> None:
        """So that the calls do not become one: each copy but the first few is for a call more."""
        needed = next(copies) - threads
        with told:
            assert told.wait_for(lambda: len(calls) > needed, HUNG)

    copy_stepwise(monkeypatch, 1024, wait)

    def write() -> None:
        callers.append(threading.get_ident())
        apply_plan(full, plan, tmp_path / "pruned", threads=threads, progress=progress)

    if in_main:
        write()
    else:
        caller = threading.Thread(target=write)
        caller.start()
        caller.join()
    assert {ident for ident, _, _ in calls} == set(callers)
    done = [count for _, count, _ in calls]
    assert len(done) > SHARDS
    assert all(before < after for before, after in itertools.pairwise(done))
    assert {total for *_, total in calls} == {calls[0][2]}
    weights = sum(path.stat().st_size for path in (tmp_path / "pruned").glob("*.safetensors"))
    assert weights <= done[-1] <= calls[0][2]


def test_a_slow_progress_function_gets_fewer_calls(
    full: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that returns when all is written is called for the first bytes, for the rest, and
    for the files that are no shards.
    """
    copies: list[str] = []
    copy_stepwise(monkeypatch, 64, lambda source: copies.append(source.name))
    written, write = threading.Semaphore(0), stream.write_shard
    calls: list[int] = []

    def counted(*args: Any) -> int:
        size = write(*args)
        written.release()
        return size

    def slow(done: int, _: int) -> None:
        calls.append(done)
        if len(calls) == 1:
            assert all(written.acquire(timeout=HUNG) for _ in range(SHARDS))

    monkeypatch.setattr(stream, "write_shard", counted)
    apply_plan(full, plan, tmp_path / "pruned", progress=slow)
    assert len(calls) <= 3 < len(copies) / 4


# What goes wrong


def broken(code: int) -> Callable[[], BaseException]:
    return lambda: OSError(code, os.strerror(code))


@pytest.mark.parametrize(
    ("fault", "error", "part"),
    [
        (broken(errno.ENOSPC), ResourceError, "free some space"),
        (broken(errno.EIO), CheckpointError, "Input/output error"),
        (lambda: ReapError("of a thread"), ReapError, "of a thread"),
        (lambda: MemoryError("no room"), MemoryError, "no room"),
        (lambda: SystemExit("over"), SystemExit, "over"),
    ],
    ids=["full disk", "broken disk", "own error", "no memory", "exit"],
)
def test_an_error_of_one_thread_stops_the_others(
    full: Path,
    plan: Plan,
    tmp_path: Path,
    fault: Callable[[], BaseException],
    error: type[BaseException],
    part: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each after the piece at work, though the caller's function has not returned yet."""
    begun, stopped = threading.Barrier(SHARDS), when_stopped(monkeypatch)
    copies: list[str] = []

    def fail(source: BinaryIO) -> None:
        copies.append(source.name)
        if copies.count(source.name) > 1:
            assert_set(stopped)
            return
        begun.wait(HUNG)
        if "00003" in source.name:
            raise fault()

    copy_stepwise(monkeypatch, 16, fail)
    alive = watch_removal(monkeypatch)
    with pytest.raises(error, match=part) as caught:
        apply_plan(
            full,
            plan,
            tmp_path / "pruned",
            threads=4,
            progress=lambda *_: assert_set(stopped),
        )
    assert type(caught.value) is error
    assert len(copies) < 2 * SHARDS
    assert alive == [[]]
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def assert_set(event: threading.Event) -> None:
    """That it is set soon."""
    assert event.wait(HUNG)


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_of_the_caller_stops_all(
    full: Path, plan: Plan, tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each after the piece at work."""
    stopped = when_stopped(monkeypatch)
    copies: list[str] = []

    def wait(source: BinaryIO) -> None:
        copies.append(source.name)
        if copies.count(source.name) > 1:
            assert_set(stopped)

    def fail(*_: int) -> None:
        raise KeyboardInterrupt

    copy_stepwise(monkeypatch, 16, wait)
    alive = watch_removal(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        apply_plan(full, plan, tmp_path / "pruned", threads=threads, progress=fail)
    assert len(copies) <= 2 * threads
    assert alive == [[]]
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def watch_removal(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The writing threads alive at each removal of a folder."""
    alive: list[list[str]] = []
    remove = staging.shutil.rmtree

    def watched(path: Path, **options: Any) -> None:
        if "reap-partial" in Path(path).name:
            alive.append(writers())
        remove(path, **options)

    monkeypatch.setattr(staging.shutil, "rmtree", watched)
    return alive


def test_memory_is_buffers_times_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathered rows of 32 MiB a file, of which no more than three buffers a thread are held."""
    monkeypatch.setattr(stream, "BUFFER_BYTES", 256 << 10)
    shape, threads = (512, 128, 512), 3
    shards = []
    for number in range(4):
        path = tmp_path / f"{number}.safetensors"
        with path.open("wb") as file:
            file.write(encode_header({"rows": ("U8", shape)}, {}))
            file.truncate(file.tell() + int(np.prod(shape)))
        action = Select("rows", 1, (tuple(range(0, 128, 2)),))
        tensor = out_tensor("rows", read_header(path).tensors["rows"], action)
        assert tensor is not None
        shards.append(OutShard(path.name, [tensor]))
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    try:
        write_shards(tmp_path / "out", shards, lambda _: None, threads)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    bound = 3 * threads * stream.BUFFER_BYTES
    assert stream.BUFFER_BYTES < peak < bound + (512 << 10)
