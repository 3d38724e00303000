"""Readers of what a server answers, which may be another one than it seems."""

import json
from collections.abc import Iterable
from unittest import mock

from reap_driver.integrations.vllm.client import Server
from reap_driver.integrations.vllm.live.look import Look, Wanted
from reap_driver.integrations.vllm.live.picture import Style, lines_of
from reap_driver.workflow.console import printable
from reap_kernels.documents import to_json
from tests.driver.integrations.vllm.fake_server import status
from tests.fuzz.campaign import Nonsense, Reader
from tests.fuzz.changes import json_value

_WIDTH = 60


def answers() -> Iterable[Reader]:
    """The status of a server, as the view shows it."""
    mask = {"experts": 2, "layers": 1, "of": 16, "source": "a plan"}
    more = {"mask": mask, "error": None, "note": "not tested", "not_counted": {"drafted": 3}}
    seeds = [status(), status("off", **more), status(groups={"all": 3, "code": 4})]
    yield Reader(
        "server status", [json.dumps(seed).encode() for seed in seeds], json_value, _use_status
    )


def _use_status(content: bytes) -> None:
    """Draws it, and writes it as JSON."""
    server = Server("http://127.0.0.1:1")
    with mock.patch.object(server._calls, "content", return_value=content):
        seen = Look(server.url, server.status(), 0.0, Wanted())
    to_json(seen.facts())
    for line in lines_of(seen, Style(_WIDTH)):
        if len(line) > _WIDTH or printable(line) != line:
            raise Nonsense(f"the line {line!r}")
