"""Where VLLM_PLUGINS does not name the plugin, vLLM runs as if it were not installed."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from reap_driver.demo.run import MODEL
from tests.interop.vllm.server import Server, serve, variables
from tests.limits import HUNG

# What vLLM imports to ask an entry point that VLLM_PLUGINS does not exclude.
ASKED = {
    "reap_driver",
    "reap_driver.integrations",
    "reap_driver.integrations.vllm",
    "reap_driver.integrations.vllm.plugin",
}


@pytest.fixture(scope="module")
def server(metadata: Path) -> Iterator[Server]:
    """vLLM that nobody told of the plugin; its processes write what they import."""
    options = {"plugins": None, "environment": {"PYTHONPROFILEIMPORTTIME": "1"}}
    with serve(MODEL, metadata, "--enforce-eager", **options) as running:
        yield running


def test_no_route_is_there(server: Server) -> None:
    assert server.request("GET", "/reap/status").status == 404
    assert server.request("POST", "/reap/start", {}).status == 404
    assert server.request("GET", "/v1/models").status == 200
    metrics = server.request("GET", "/metrics").body.decode().splitlines()
    assert any(line.startswith("vllm:") for line in metrics)
    assert not any(line.startswith("reap_") for line in metrics)


def test_no_process_imports_what_the_plugin_does(server: Server) -> None:
    lines = [line for line in server.lines if "import time:" in line]
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert {"vllm.v1.worker.worker_base", "vllm.entrypoints.launchers.api_server"} <= imported
    assert {name for name in imported if re.match("reap_(driver|kernels)", name)} <= ASKED


def test_other_names_do_not_load_it(metadata: Path) -> None:
    script = """
from vllm.plugins import load_general_plugins
load_general_plugins()
import sys
from vllm.v1.worker.worker_base import WorkerBase
print([name for name in (*sys.modules, *dir(WorkerBase)) if name.startswith("reap_")])
"""
    process = subprocess.run(
        [sys.executable, "-c", script],
        env=variables(metadata, "other,reap_kernels,reaper"),
        capture_output=True,
        text=True,
        timeout=HUNG,
        check=True,
    )
    assert process.stdout.splitlines()[-1] == "[]"
