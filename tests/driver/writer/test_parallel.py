"""Shards written by several threads: the same bytes, one caller's thread, errors that stop all,
bounded memory."""

import errno
import itertools
import os
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
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


def copy_slowly(
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    pause: float,
    first: Callable[[BinaryIO], None] = lambda _: None,
) -> None:
    """Copy `step` bytes at a time, each time after `first` and a pause."""
    copy = stream._copy_some

    def slow(source: BinaryIO, out: BinaryIO, start: int, count: int) -> int:
        first(source)
        time.sleep(pause)
        return copy(source, out, start, count)

    monkeypatch.setattr(stream, "_CHUNK_BYTES", step)
    monkeypatch.setattr(stream, "_copy_some", slow)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v4", "longcat_flash"])
def test_bytes_do_not_depend_on_threads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied ranges, gathered rows and rewritten tables, in many steps although they are small."""
    monkeypatch.setattr(stream, "_CHUNK_BYTES", 64)
    monkeypatch.setattr(stream, "BUFFER_BYTES", 64)
    full = tmp_path / "full"
    model = saved.save(name, full)
    saved.shard(full, SHARDS)
    plan = saved.make_plan(full, model)
    results = {}
    for threads in (1, 2, 8, None):
        for size in (None, 10_000):
            out = tmp_path / f"{threads}-{size}" / "pruned"  # the card says its name
            apply_plan(full, plan, out, threads=threads, shard_size=size)
            results[threads, size] = {
                path: content for path, (content, _) in saved.snapshot(out).items()
            }
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
            together.wait(30)  # raises unless as many arrive
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
    copy_slowly(monkeypatch, 1024, 0.002)  # so that the calls do not become one
    calls: list[tuple[int, int, int]] = []
    callers: list[int] = []

    def write() -> None:
        callers.append(threading.get_ident())
        apply_plan(
            full,
            plan,
            tmp_path / "pruned",
            threads=threads,
            progress=lambda done, total: calls.append((threading.get_ident(), done, total)),
        )

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
    copies: list[str] = []
    copy_slowly(monkeypatch, 64, 0, lambda source: copies.append(source.name))
    calls: list[int] = []

    def slow(done: int, _: int) -> None:
        calls.append(done)
        time.sleep(0.1)

    apply_plan(full, plan, tmp_path / "pruned", progress=slow)
    assert len(calls) < len(copies) / 4


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
    """At once, though three would write for minutes and the caller's function takes its time."""
    begun = threading.Barrier(SHARDS)
    local = threading.local()
    copies: list[str] = []

    def fail(source: BinaryIO) -> None:
        copies.append(source.name)
        if not hasattr(local, "begun"):
            local.begun = True
            begun.wait(30)
        if "00003" in source.name:
            raise fault()

    copy_slowly(monkeypatch, 16, 0.05, fail)
    alive = watch_removal(monkeypatch)
    started = time.monotonic()
    with pytest.raises(error, match=part) as caught:
        apply_plan(full, plan, tmp_path / "pruned", threads=4, progress=lambda *_: time.sleep(1))
    assert type(caught.value) is error
    assert len(copies) < 4 * SHARDS
    assert time.monotonic() - started < 20
    assert alive == [[]]
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_of_the_caller_stops_all(
    full: Path, plan: Plan, tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_slowly(monkeypatch, 16, 0.05)

    def fail(*_: int) -> None:
        raise KeyboardInterrupt

    alive = watch_removal(monkeypatch)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        apply_plan(full, plan, tmp_path / "pruned", threads=threads, progress=fail)
    assert time.monotonic() - started < 20
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
