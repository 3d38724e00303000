"""Runs that do not finish: killed, interrupted, out of space, not allowed. Nothing is left under
the final name, the source is untouched, and only a kill -9 leaves something behind, which the next
run removes."""

import contextlib
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest

from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.files.fingerprints import Fingerprints
from reap_driver.planning.plan import Plan
from reap_driver.writer import staging, stream
from reap_driver.writer.apply import apply_plan
from reap_driver.writer.shards import OutShard
from reap_driver.writer.staging import clean_stale
from reap_driver.writer.stream import Progress
from reap_kernels.errors import CheckpointError, ResourceError
from tests.driver.writer import saved
from tests.forks import Fork


def write(full: Path, plan: Plan, out: Path, threads: int, pipe: Connection) -> None:
    """Runs in a fork: says when it is in the middle of a file, and goes on when it is stopped."""
    stopped, copies = threading.Event(), itertools.count()
    copy = stream._copy_some

    def held(source: BinaryIO, out: BinaryIO, start: int, count: int) -> int:
        copied = copy(source, out, start, count)
        if next(copies) == 0:
            pipe.send("writing")
        stopped.wait()
        return copied

    stream._CHUNK_BYTES = 16
    stream._copy_some = held
    stream.threading = SimpleNamespace(Event=lambda: stopped)  # type: ignore[assignment]
    apply_plan(full, plan, out, threads=threads)


@pytest.fixture
def full(tmp_path: Path) -> Path:
    saved.save("mixtral", tmp_path / "full")
    saved.shard(tmp_path / "full", 4)
    return tmp_path / "full"


@pytest.fixture
def plan(full: Path) -> Plan:
    return saved.make_plan(full, meta_model(load_config(full)))


def leftovers(folder: Path) -> list[str]:
    """Temporary folders and their locks."""
    return sorted(path.name for path in folder.iterdir() if "reap-" in path.name)


def interrupt(full: Path, plan: Plan, number: signal.Signals, threads: int) -> int:
    """Send a signal to a writer in the middle of its work; returns its exit code."""
    with Fork(lambda pipe: write(full, plan, full.parent / "pruned", threads, pipe)) as process:
        assert process.receive() == "writing"
        os.kill(process.pid, number)
        return process.end().code


@pytest.mark.parametrize("threads", [1, 4])
def test_kill_leaves_no_result_and_the_next_run_cleans_up(
    full: Path, plan: Plan, threads: int
) -> None:
    before = saved.snapshot(full)
    assert interrupt(full, plan, signal.SIGKILL, threads) == -signal.SIGKILL
    assert not (full.parent / "pruned").exists()
    lock, *left = leftovers(full.parent)
    assert (".pruned.reap-lock-" in lock, len(left)) == (True, 1)
    assert saved.snapshot(full) == before

    report = apply_plan(full, plan, full.parent / "pruned")
    assert [Path(path).name for path in report.cleaned] == left
    assert leftovers(full.parent) == []
    assert len(saved.read_all(full.parent / "pruned")) == report.tensors


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_termination_leaves_nothing(
    full: Path, plan: Plan, number: signal.Signals, threads: int
) -> None:
    before = saved.snapshot(full)
    assert interrupt(full, plan, number, threads) > 0
    assert not (full.parent / "pruned").exists()
    assert leftovers(full.parent) == []
    assert saved.snapshot(full) == before


def test_handlers_are_restored(full: Path, plan: Plan, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    apply_plan(full, plan, tmp_path / "pruned")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_folder_of_a_running_writer_is_left_alone(full: Path, plan: Plan, tmp_path: Path) -> None:
    cleaned: list[Path] = []
    apply_plan(
        full,
        plan,
        tmp_path / "pruned",
        progress=lambda *_: cleaned.extend(clean_stale(tmp_path / "pruned")),
    )
    assert cleaned == []
    assert (tmp_path / "pruned" / "config.json").is_file()


def test_failure_leaves_nothing_not_even_new_parents(
    full: Path, plan: Plan, tmp_path: Path
) -> None:
    def fail(done: int, _: int) -> None:
        if done > 1000:
            raise RuntimeError("from the caller")

    with pytest.raises(RuntimeError, match="from the caller"):
        apply_plan(full, plan, tmp_path / "new" / "deeper" / "pruned", progress=fail)
    assert not (tmp_path / "new").exists()


def test_failed_replacement_keeps_the_old_checkpoint(
    full: Path, plan: Plan, tmp_path: Path
) -> None:
    out = tmp_path / "pruned"
    apply_plan(full, plan, out)
    (out / "mark").write_text("first")

    def fail(*_: int) -> None:
        raise RuntimeError("from the caller")

    with pytest.raises(RuntimeError, match="from the caller"):
        apply_plan(full, plan, out, overwrite=True, progress=fail)
    assert (out / "mark").read_text() == "first"
    assert leftovers(tmp_path) == []
    apply_plan(full, plan, out, overwrite=True)
    assert not (out / "mark").exists()
    assert leftovers(tmp_path) == []


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    """A file system of that size, where mounting is allowed."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root on Linux; the file size limit test covers it")
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here; the file size limit test covers it")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_full_disk(
    full: Path, plan: Plan, tmp_path: Path, foreseen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused up front; and when the space goes while writing, all is removed again."""
    if not foreseen:
        monkeypatch.setattr(staging, "_check_space", lambda *_: 0)
    before = saved.snapshot(full)
    with small_disk(tmp_path / "disk", "64k"):
        out = tmp_path / "disk" / "pruned"
        says = rf"{out}: needs \d+ bytes, \d+ are free there; free some"
        if not foreseen:  # and which file it was is said, too
            says = (
                rf"{out}/model-\d+-of-\d+\.safetensors: No space left.*\d+ bytes are needed.*free"
            )
        with pytest.raises(ResourceError, match=says):
            apply_plan(full, plan, out)
        assert list((tmp_path / "disk").iterdir()) == []
    assert saved.snapshot(full) == before


def test_file_size_limit(full: Path, plan: Plan, tmp_path: Path) -> None:
    """A limit (quotas behave alike) that is hit in the middle of a file."""
    before = saved.snapshot(full)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        with pytest.raises(ResourceError, match="quota or file size limit"):
            apply_plan(full, plan, tmp_path / "pruned")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not (tmp_path / "pruned").exists()
    assert leftovers(tmp_path) == []
    assert saved.snapshot(full) == before


def test_unwritable_target(full: Path, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"file: cannot be created"):
        apply_plan(full, plan, tmp_path / "file" / "pruned")
    assert (tmp_path / "file").read_text() == "mine"
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    target = (
        closed if os.geteuid() else Path("/proc")
    )  # root may write anywhere but in a view of the kernel
    with pytest.raises(CheckpointError, match="cannot be written"):
        apply_plan(full, plan, target / "pruned")


@pytest.mark.parametrize("pinned", [True, False])
def test_source_that_shrinks_while_it_is_read(
    full: Path, plan: Plan, tmp_path: Path, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the file is opened, and after."""
    victim = full / "model-00004-of-00004.safetensors"
    write = stream.write_shard

    def shrink_first(folder: Path, shard: OutShard, progress: Progress) -> int:
        if shard.name == victim.name:
            os.truncate(victim, 2000)
            shard.fingerprints = shard.fingerprints if pinned else Fingerprints()
        return write(folder, shard, progress)

    monkeypatch.setattr(stream, "write_shard", shrink_first)
    after = r"00004.*ended at byte 2000.*do not change the source"
    before = r"00004.*changed after it was inspected \(it has 2000 bytes, it had \d+"
    with pytest.raises(CheckpointError, match=before if pinned else after):
        apply_plan(full, plan, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()
    assert leftovers(tmp_path) == []
