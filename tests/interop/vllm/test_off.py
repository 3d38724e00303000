"""Where VLLM_PLUGINS does not name the plugin, vLLM runs as if it were not installed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from reap_driver.demo.run import MODEL
from tests.interop.vllm.server import Server, serve


@pytest.fixture(scope="module")
def server(metadata: Path) -> Iterator[Server]:
    """vLLM that nobody told of the plugin; its processes write what they import."""
    variables = {"PYTHONPROFILEIMPORTTIME": "1"}
    with serve(MODEL, metadata, "--enforce-eager", plugins=None, environment=variables) as running:
        yield running


def test_no_route_is_there(server: Server) -> None:
    assert server.request("GET", "/reap/status").status == 404
    assert server.request("POST", "/reap/start", {}).status == 404
    assert server.request("GET", "/v1/models").status == 200
