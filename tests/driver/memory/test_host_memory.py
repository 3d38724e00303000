"""Free memory: synthetic control-group files, and the limits of a real process."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from reap_driver.memory.host_memory import Free, free_host_memory
from reap_driver.memory.machine import free_device_memory, this_machine

MAX = "9223372036854771712"


def system(root: Path, *, available: int = 10**9, cgroup: str = "", mounts: str = "") -> Path:
    """A procfs, whose control groups are under `root`/sys."""
    own = root / "proc/self"
    own.mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {available // 1000} kB\n")
    (own / "cgroup").write_text(cgroup)
    (own / "mountinfo").write_text(mounts.replace("SYS", str(root / "sys").replace(" ", "\\040")))
    return root / "proc"


def group(folder: Path, **files: str | int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(f"{text}\n")


V2 = {"cgroup": "0::/job/step\n", "mounts": "31 23 0:28 / SYS rw - cgroup2 cgroup2 rw\n"}


def test_version_2_walks_up_and_counts_file_cache_as_free(tmp_path: Path) -> None:
    proc, sys_ = system(tmp_path, **V2), tmp_path / "sys"
    group(sys_ / "job/step", max="max", current=500, stat="anon 1\ninactive_file 100")
    group(sys_ / "job", max=1000, current=700, stat="inactive_file 150\nactive_file 50\nshmem 9")
    assert free_host_memory(proc) == Free(500, f"by memory.max of {sys_}/job")
    group(sys_ / "job/step", max=600)
    assert free_host_memory(proc) == Free(200, f"by memory.max of {sys_}/job/step")
    group(sys_ / "job/step", high=450)
    assert free_host_memory(proc) == Free(50, f"by memory.high of {sys_}/job/step")
    group(sys_ / "job/step", current=9000)
    assert free_host_memory(proc).nbytes == 0


def test_version_1(tmp_path: Path) -> None:
    """A mount whose root is the container's group, with a space in its path and a huge limit."""
    root = tmp_path / "a b"
    mounts = (
        "30 23 0:28 /docker/x SYS/cpu rw - cgroup cgroup rw,cpu\n"
        "31 23 0:29 /docker/x SYS/memory rw shared:9 - cgroup cgroup rw,memory\n"
    )
    proc = system(root, cgroup="4:cpu:/docker/x\n3:memory:/docker/x/in\n", mounts=mounts)
    memory = root / "sys/memory"
    group(root / "sys/cpu", limit_in_bytes=1, usage_in_bytes=0)
    group(memory, limit_in_bytes=MAX, usage_in_bytes=5)
    expected = 10**6 * 1024
    assert free_host_memory(proc) == Free(expected, "by MemAvailable")
    stat = "inactive_file 1\ntotal_inactive_file 30\ntotal_active_file 12"
    group(memory / "in", limit_in_bytes=1000, usage_in_bytes=542, stat=stat)
    assert free_host_memory(proc) == Free(500, f"by memory.limit_in_bytes of {memory}/in")


def test_a_group_outside_the_mount_is_judged_by_its_top(tmp_path: Path) -> None:
    mounts = "31 23 0:28 /kube/pod SYS rw - cgroup2 cgroup2 rw\n"
    proc = system(tmp_path, cgroup="0::/elsewhere\n", mounts=mounts)
    group(tmp_path / "sys", max=100, current=40)
    assert free_host_memory(proc) == Free(60, f"by memory.max of {tmp_path}/sys")


def test_without_procfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux before 3.14, and other systems."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=7 * 4096))
    expected = Free(7 * 4096, "by the system's count of available memory")
    assert free_host_memory(tmp_path) == expected
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\n")
    assert free_host_memory(tmp_path) == expected


@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limits_of_a_process(name: str) -> None:
    """A process with limits of 3 GB, part of which it already uses."""
    code = (
        "import resource, runpy, sys\n"
        f"resource.setrlimit(resource.{name}, (3 * 10**9, -1))\n"
        "names = runpy.run_path(sys.argv[1])\n"
        "free = names['free_host_memory']()\n"
        "block = bytearray(10**9)\n"
        "less = names['free_host_memory']()\n"
        "print(free.bound, free.nbytes, free.nbytes - less.nbytes)\n"
    )
    path = sys.modules[free_host_memory.__module__].__file__
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[:2] == ["by", name]
    assert 2.5e9 < int(words[2]) < 3e9
    assert int(words[3]) == pytest.approx(1e9, rel=0.01)


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = this_machine(torch.device("cpu"), tmp_path / "not/yet/there")
    assert not machine.accelerated
    assert machine.disk_free is not None
    assert machine.disk_free.nbytes > 0
    assert machine.host_free is not None
    assert machine.device_free == machine.host_free
    assert free_device_memory(torch.device("meta")) is None
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (1000, 9000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: 500)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: 200)
    machine = this_machine(torch.device("cuda:0"), tmp_path)
    assert machine.accelerated
    assert machine.device_free == Free(1300, "by the GPU's driver")
