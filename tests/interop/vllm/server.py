"""A process of `vllm serve` and requests to it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.interop.vllm.installed import ROOT
from tests.limits import HUNG

# What the API server writes before it listens, and seconds between attempts after that.
_STARTED = "Application startup complete."
_PAUSE = 0.1
# A start imports vLLM in three processes, one after the other, and may compile.
_START = 5 * HUNG
_ARGUMENTS = (
    *("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8"),
    *("--host", "127.0.0.1"),
)
# nobind: cores are shared with other processes. 1: GiB of memory for keys and values.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    # What vLLM compiles and learns of models; deleted with the environment.
    "VLLM_CACHE_ROOT": str(Path(sys.prefix) / "cache"),
}
# Runs a command that is sent SIGTERM when this process ends, even if by SIGKILL: PR_SET_PDEATHSIG.
_WITH_US = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
)
Body = dict[str, Any] | list[Any] | bytes | str | None


@dataclass(frozen=True)
class Answer:
    """What the server said: a status, headers and a body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, which must be JSON."""
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """The sentence of an error."""
        message = self.json()["error"]["message"]
        assert isinstance(message, str)
        return message


@dataclass
class Server:
    """A running server.

    Attributes:
        url: without a slash at the end.
        model: the name under which it serves.
        process: of the API server, which leads a process group with its engine and workers.
        lines: what the processes have written so far.
        headers: sent with every request.
    """

    url: str
    model: str
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)

    def request(
        self, method: str, path: str, body: Body = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Sends bytes as they are and anything else as JSON; every status is an answer.

        Args:
            method: GET, POST or DELETE.
            path: with its leading slash.
            body: of the request.
            headers: besides `self.headers`, before which they come.
        """
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        sent = {"content-type": kind} | self.headers | dict(headers or {})
        request = urllib.request.Request(self.url + path, data, sent, method=method)
        try:
            with urllib.request.urlopen(request, timeout=HUNG) as answer:
                return Answer(answer.status, dict(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, dict(error.headers), error.read())

    def ask(
        self, method: str, path: str, body: Body = None, headers: Mapping[str, str] | None = None
    ) -> Any:
        """The JSON of an answer that must be 200."""
        answer = self.request(method, path, body, headers)
        assert answer.status == 200, f"{method} {path}: {answer.status} {answer.body[:2000]!r}"
        return answer.json()

    def processes(self) -> list[int]:
        """Identifiers of the processes of the group, in order."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # one that has just ended
                group = int(stat.read_text().rpartition(")")[2].split()[2])
                if group == self.process.pid:
                    found.append(int(stat.parent.name))
        return sorted(found)

    def tail(self, count: int = 60) -> str:
        """The last lines of the log."""
        return "".join(self.lines[-count:])


@contextlib.contextmanager
def serve(
    model: Path,
    metadata: Path,
    *flags: str,
    plugins: str | None = "reap",
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Runs `vllm serve` until the context is left; its processes have then ended.

    Args:
        model: folder of the checkpoint.
        metadata: the folder of `installed.write_metadata`.
        flags: besides those of `_ARGUMENTS`.
        plugins: the value of VLLM_PLUGINS; None leaves it unset.
        environment: variables besides those of `_ENVIRONMENT`.

    Raises:
        AssertionError: with the end of its log, if it ends or hangs before it answers.
    """
    port = _free_port()
    command = [sys.executable, "-c", _WITH_US]
    command += [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    process = subprocess.Popen(
        [*command, *_ARGUMENTS, "--port", str(port), *flags],
        env=variables(metadata, plugins) | dict(environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    server = Server(f"http://127.0.0.1:{port}", str(model), process)
    try:
        _wait(server)
        yield server
    finally:
        _end(process)


def variables(metadata: Path, plugins: str | None) -> dict[str, str]:
    """The environment of a process of vLLM that finds the plugin; arguments as those of `serve`."""
    found = os.environ | _ENVIRONMENT
    found["PYTHONPATH"] = os.pathsep.join(map(str, (metadata, ROOT, ROOT / "python")))
    found.pop("VLLM_PLUGINS", None)
    return found if plugins is None else found | {"VLLM_PLUGINS": plugins}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(server: Server) -> None:
    """Until the server answers; the thread goes on reading what it writes."""
    started, ended = threading.Event(), threading.Event()

    def read() -> None:
        assert server.process.stdout is not None
        for line in server.process.stdout:
            server.lines.append(line)
            if _STARTED in line:
                started.set()

    def wait() -> None:
        server.process.wait()
        ended.set()
        started.set()

    for target in (read, wait):
        threading.Thread(target=target, daemon=True).start()
    in_time = started.wait(_START)
    assert in_time, f"no answer in {_START} s:\n{server.tail()}"
    for _ in range(int(HUNG / _PAUSE)):
        assert not ended.is_set(), f"ended before it answered:\n{server.tail()}"
        try:
            assert server.request("GET", "/health").status == 200
            return
        except urllib.error.URLError:  # it says so just before it listens
            ended.wait(_PAUSE)
    raise AssertionError(f"no answer in {HUNG} s after its start:\n{server.tail()}")


def _end(process: subprocess.Popen[str]) -> None:
    """Ends the group: as a user would, so that vLLM removes its shared memory, then surely."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with contextlib.suppress(ProcessLookupError):  # the group has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
