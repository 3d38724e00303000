"""Host memory that this process can still allocate, within its control groups and limits.

In a container, /proc/meminfo shows the whole machine, but the process is killed at the limit of its
control group, which no library reports for both versions of control groups. The file formats are
those of the Linux documentation: cgroup-v2, "Memory Interface Files"; cgroup-v1, "Memory Resource
Controller"; proc_pid_statm(5). Other systems have none of them; psutil asks them for free memory.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

PROC = Path("/proc")


@dataclass(frozen=True)
class Free:
    """Free memory in bytes, and its source, such as "by MemAvailable" or "by RLIMIT_AS"."""

    nbytes: int
    bound: str

    def divided(self, shares: int) -> "Free":
        """One of `shares` equal parts."""
        bound = self.bound if shares == 1 else f"{self.bound}, a share of {shares}"
        return Free(self.nbytes // shares, bound)


@dataclass(frozen=True)
class _Version:
    """File names, and counters in memory.stat, of a version of control groups."""

    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]


# memory.high is not a hard limit, but processes above it are throttled.
_V2 = _Version(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))
_V1 = _Version(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


def free_host_memory(proc: Path = PROC) -> Free:
    """The smallest of all bounds.

    Args:
        proc: where procfs is mounted.
    """
    bounds = [*_available(proc / "meminfo"), *_groups(proc / "self"), *_limits(proc / "self/statm")]
    return min(bounds, key=lambda free: free.nbytes)


def _available(meminfo: Path) -> Iterator[Free]:
    """Memory available without swapping; MemAvailable counts reclaimable caches too."""
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                yield Free(int(line.split()[1]) * 1024, "by MemAvailable")
                return
    yield Free(psutil.virtual_memory().available, "by the system's count of available memory")


def _groups(own: Path) -> Iterator[Free]:
    """Free memory of every control group with a limit: this process's own and its ancestors."""
    for version, mount, root, path in _memberships(own):
        inside = PurePosixPath(path)
        # For a group outside the mounted tree (another namespace), use the root of the mount.
        parts = inside.relative_to(root).parts if inside.is_relative_to(root) else ()
        for depth in range(len(parts), -1, -1):
            yield from _group(mount.joinpath(*parts[:depth]), version)


def _group(folder: Path, version: _Version) -> Iterator[Free]:
    """Free memory of one group: its limit minus its usage; file cache counts as free."""
    usage = _number(folder / version.usage)
    if usage is None:
        return
    cache = sum(_counters(folder / "memory.stat").get(name, 0) for name in version.cache)
    used = max(0, usage - cache)
    for name in version.limits:
        limit = _number(folder / name)
        if limit is not None:
            yield Free(max(0, limit - used), f"by {name} of {folder}")


def _memberships(own: Path) -> Iterator[tuple[_Version, Path, str, str]]:
    """(version, mount point, root of the mount, this process's group) of each memory controller."""
    groups = dict(_own_groups(own / "cgroup"))
    for line in _lines(own / "mountinfo"):
        before, _, after = line.partition(" - ")
        fields, (kind, *source) = before.split(), after.split() or [""]
        if len(fields) < 5:
            continue
        root, mount = (_unescaped(text) for text in fields[3:5])
        if kind == "cgroup2" and "" in groups:
            yield _V2, Path(mount), root, groups[""]
        controllers = source[-1].split(",") if source else []
        if kind == "cgroup" and "memory" in controllers and "memory" in groups:
            yield _V1, Path(mount), root, groups["memory"]


def _own_groups(file: Path) -> Iterator[tuple[str, str]]:
    """(controller, path) of each group of this process; the controller is "" in version 2."""
    for line in _lines(file):
        parts = line.split(":", 2)
        if len(parts) == 3:
            for controller in parts[1].split(","):
                yield controller, parts[2]


def _limits(statm: Path) -> Iterator[Free]:
    """Address space and data segment left by `ulimit -v` and `ulimit -d`."""
    if sys.platform == "win32":  # which has no such limits
        return
    import resource

    fields = [int(field) for line in _lines(statm) for field in line.split()]
    if len(fields) < 6:
        return
    page = resource.getpagesize()
    for name, field in (("RLIMIT_AS", 0), ("RLIMIT_DATA", 5)):
        limit, _ = resource.getrlimit(getattr(resource, name))
        if limit != resource.RLIM_INFINITY:
            yield Free(max(0, limit - fields[field] * page), f"by {name}")


def _lines(file: Path) -> list[str]:
    """Lines of a file; none if it is missing or not readable."""
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _number(file: Path) -> int | None:
    """The number in a file; None for `max`, or if the file is missing."""
    text = "".join(_lines(file)).strip()
    return int(text) if text.isdigit() else None


def _counters(file: Path) -> dict[str, int]:
    """{name: count} of a file with one name and count per line."""
    pairs = (line.split() for line in _lines(file))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _unescaped(text: str) -> str:
    """A path of mountinfo, in which spaces, tabs, newlines and backslashes are octal escapes."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
