"""A server that answers as it is told and remembers what it was asked, in a thread."""

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

import reap_kernels as rk

KEY = "sk-of-the-server"


@dataclass(frozen=True)
class Asked:
    """A request that came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Answer:
    """What a route is answered with; `length` stands in the header for that of `body`."""

    code: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None


class FakeServer(ThreadingHTTPServer):
    """Routes are "METHOD path" below /reap/; what is not told is 404.

    Attributes:
        answers: by route.
        asked: requests so far.
        hold: answers wait for it, where it is given.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, Answer] = {}
        self.asked: list[Asked] = []
        self.hold: threading.Event | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def tell(self, route: str, content: Any, code: int = 200) -> None:
        """Answers a route with JSON, or with bytes as they are."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.answers[route] = Answer(code, body)

    def refuse(self, route: str, code: int, message: str) -> None:
        """Answers a route with an error, as the plugin writes them."""
        self.tell(route, {"error": {"message": message, "type": "error", "code": code}}, code)


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        self.server.asked.append(Asked(self.command, self.path, dict(self.headers), body))
        if self.server.hold is not None:
            self.server.hold.wait()
        route = f"{self.command} {self.path.removeprefix('/reap/')}"
        answer = self.server.answers.get(route, Answer(404, b'{"detail": "Not Found"}'))
        self.send_response(answer.code)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        size = len(answer.body) if answer.length is None else answer.length
        self.send_header("Content-Length", str(size))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a caller that does not wait
            self.wfile.write(answer.body)

    do_GET = do_POST = do_DELETE = _serve

    def log_message(self, *_: Any) -> None:
        """Logs nothing."""


@contextlib.contextmanager
def serving() -> Iterator[FakeServer]:
    """A server that runs as long as the block."""
    with FakeServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            if server.hold is not None:
                server.hold.set()
            server.shutdown()
            thread.join()


def names(layers: int) -> list[str]:
    """Names of MoE layers."""
    return [f"model.layers.{number}.mlp.experts" for number in range(layers)]


def statistics(layers: int = 2, experts: int = 8, groups: tuple[str, ...] = ("all",)) -> Any:
    """Statistics as live traffic leaves them: every expert of a layer has one row more than the
    one before it, and norms that rise with its id.
    """
    found = {}
    for number, name in enumerate(names(layers)):
        layer = rk.LayerStats(experts, len(groups))
        for group in range(len(groups)):
            ids = torch.cat([torch.full((e + 1,), e) for e in range(experts)])
            values = (ids + 1.0 + number).unsqueeze(1)
            rk.accumulate(values, ids, torch.full((len(ids),), 0.5), layer, group=group)
            layer.add_tokens(len(ids), group)
        found[name] = layer
    facts = {
        name: {"num_experts": experts, "top_k": 2, "hidden_size": 16, "intermediate_size": 8}
        for name in found
    }
    provenance = {
        "model": {"id": "org/tiny-moe", "config_digest": "sha256:0", "model_type": "qwen3_moe"},
        "layers": facts,
        "gate": "softmax",
    }
    return rk.SaliencyStats(found, list(groups), provenance)


def status(mode: str = "replace", layers: int = 2, experts: int = 8, **more: Any) -> dict[str, Any]:
    """A status as the plugin answers it."""
    return {
        "model": "org/tiny-moe",
        "version": "0.1.0",
        "vllm": "0.32.0",
        "mode": mode,
        "every": 1,
        "groups": {"all": 36},
        "tokens": 36,
        "not_counted": {},
        "steps": 9,
        "observed_steps": 9,
        "mask": None,
        "layers": {
            name: {"num_experts": experts, "top_k": 2, "masked": 0, "refusal": None}
            for name in names(layers)
        },
        **more,
    }
