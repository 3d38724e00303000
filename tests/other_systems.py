"""Our modules as they find macOS or Windows: `python -m tests.other_systems win32 FOLDER`.

Whatever of the standard library the system does not have, our modules do not get when they import
it; a few functions fail as they do there. Other packages keep what this system has: that they run
elsewhere is their own affair. In FOLDER, which holds `model` and `code.jsonl`, the program imports
every module, prunes twice, the second time over the first outcome, and observes with a journal.
"""

import builtins
import ctypes
import errno
import fcntl
import importlib
import os
import pkgutil
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.test_layering import needs_host

OURS = ("reap_kernels", "reap_driver")
# Of os and signal: names that a system lacks; of modules: those that it lacks.
_NOT_MACOS = (
    "copy_file_range eventfd getrandom memfd_create posix_fadvise sched_getaffinity splice "
    "O_PATH O_TMPFILE POSIX_FADV_DONTNEED POSIX_FADV_WILLNEED RWF_NOWAIT"
)
_NOT_WINDOWS = (
    "chown chroot fchmod fchown fork forkpty getegid geteuid getgid getloadavg getpgid getpriority "
    "getsid getuid killpg lchown mkfifo nice posix_fallocate posix_spawn pread preadv pwrite "
    "pwritev register_at_fork sched_yield sendfile setsid statvfs sync sysconf sysconf_names uname "
    "O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_SYNC "
    "SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGQUIT SIGTSTP SIGUSR1 SIGUSR2 alarm pthread_kill "
    "pthread_sigmask setitimer sigwait"
)
_MODULES_NOT_WINDOWS = "fcntl grp pty pwd resource syslog termios tty"


class Limited(ModuleType):
    """A module of the standard library without some names, and with some replaced.

    Args:
        module: the one of this system.
        without: names that it does not have.
        instead: other values of names.
    """

    def __init__(
        self, module: ModuleType, without: frozenset[str], instead: Mapping[str, Any]
    ) -> None:
        super().__init__(module.__name__)
        self._module, self._without, self._instead = module, without, instead

    def __getattr__(self, name: str) -> Any:
        if name in self._without:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return self._instead[name] if name in self._instead else getattr(self._module, name)


def _opened(path: Any, flags: int, *rest: Any) -> int:
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)
    return os.open(path, flags, *rest)


def _flushed(descriptor: int) -> None:
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    os.fsync(descriptor)


def _library(name: str, **options: Any) -> ctypes.CDLL:
    return ctypes.CDLL(os.fspath(name), **options)  # None is no name of a DLL


def modules_of(system: str) -> dict[str, Limited]:
    """The modules that our code imports, as `system` (of `sys.platform`) has them."""
    windows = system == "win32"
    without = frozenset(f"{_NOT_MACOS} {_NOT_WINDOWS if windows else ''}".split())
    instead: dict[str, dict[str, Any]] = {"os": {}, "signal": {}, "ctypes": {}}
    if windows:
        instead["os"] = {"open": _opened, "fsync": _flushed}
        instead["signal"] = {"SIGBREAK": signal.SIGUSR1}  # any that Linux has: the number differs
        instead["ctypes"] = {"CDLL": _library}
    found = {name: Limited(sys.modules[name], without, own) for name, own in instead.items()}
    return {**found, "sys": Limited(sys, frozenset(), {"platform": system})}


def as_on(system: str, asked: set[str]) -> Callable[..., Any]:
    """An `__import__` that gives our modules what `system` has, and no triton, which it lacks too.

    Args:
        system: as `sys.platform` says there.
        asked: gets the names of the limited modules that our modules have asked for.
    """
    own = builtins.__import__
    limited = modules_of(system)
    absent = {"triton", *(_MODULES_NOT_WINDOWS.split() if system == "win32" else ())}

    def import_(name: str, globals: Any = None, *rest: Any, **named: Any) -> Any:
        importer = str((globals or {}).get("__name__", "")).partition(".")[0]
        if importer in OURS and name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if importer in OURS and name in limited:
            asked.add(name)
            return limited[name]
        return own(name, globals, *rest, **named)

    return import_


def import_all() -> int:
    """Imports every module of ours but those that need Triton or a framework around them; returns
    how many.
    """
    count = 0
    for package in OURS:
        path = importlib.import_module(package).__path__
        for module in pkgutil.walk_packages(path, f"{package}."):
            if needs_host(module.name):
                continue
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                if error.name != "triton":
                    raise
                continue
            count += 1
    return count


def main(system: str, folder: Path) -> None:
    """See the module."""
    asked: set[str] = set()
    builtins.__import__ = as_on(system, asked)
    count = import_all()
    from reap_driver.cli.main import main as command
    from reap_driver.data import token_cache
    from reap_driver.memory import host_memory

    token_cache._WORTH = 0.0  # so that these tokens are cached
    host_memory.free_host_memory.__defaults__ = (folder / "no procfs",)
    model, data, stats = (str(folder / n) for n in ("model", "code.jsonl", "stats.safetensors"))
    given = ["--data", data, "--seq-len", "64", "-q"]
    prune = ["prune", model, *given, "--ratio", "0.5", "--out", str(folder / system)]
    for words in (
        prune,
        [*prune, "--overwrite"],
        ["observe", model, *given, "--stream", "always", "--out", stats],
    ):
        code = command(words)
        if code:
            sys.exit(f"{system}: {' '.join(words)} ended with {code}")
    print(f"{count} modules; {' '.join(sorted(asked))}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
