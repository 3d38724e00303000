"""The routes in a FastAPI application, as vLLM builds one, with an engine of made-up ranks."""

import asyncio
import logging
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import prometheus_client.multiprocess
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.instrumentator import metrics
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

import reap_kernels as rk
from reap_driver.integrations.vllm.server import bodies
from reap_driver.integrations.vllm.server.endpoints import ReapEndpoints
from tests.driver.integrations.vllm.fake_engine import THEIRS, FakeClient, qwen

ROUTES = [
    *(("POST", route) for route in ("start", "stop", "reset", "stats/save", "plan", "mask")),
    *(("GET", route) for route in ("status", "stats", "mask", "profile")),
    ("DELETE", "mask"),
]
KEY = {"Authorization": "Bearer mine"}
PROFILE = {"pruned_experts": [[1, 1], [3, 7], [3, 0]]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def engine(folder: Path) -> FakeClient:
    return FakeClient(folder)


def application(engine: FakeClient | None, *keys: str) -> FastAPI:
    """The application, with what vLLM puts around the routes."""
    app, plugin = FastAPI(), ReapEndpoints()
    args = Namespace(
        api_key=list(keys),
        allowed_origins=["*"],
        allow_credentials=False,
        allowed_methods=["*"],
        allowed_headers=["*"],
        enable_request_id_headers=True,
        middleware=[],
    )

    @app.get("/v1/echo")
    async def echo(request: Request) -> dict[str, str | None]:
        return {"id": request.headers.get("x-request-id")}

    metrics.attach_router(app)
    plugin.attach_router(app)
    init_entrypoints_middleware(args, app, ())
    asyncio.run(plugin.init_state(engine, app.state, args))
    return app


@pytest.fixture
def client(engine: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    monkeypatch.setenv("REAP_STATS_FOLDER", str(tmp_path))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return TestClient(application(engine))


def sentence(answer: Any, status: int) -> str:
    """The sentence of an error, which has the form of vLLM's own."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == status
    assert error["type"].endswith("_error")
    assert "Traceback" not in error["message"]
    return str(error["message"])


def test_it_is_a_plugin() -> None:
    assert isinstance(ReapEndpoints(), EndpointPlugin)


def test_a_whole_story(client: TestClient, engine: FakeClient, tmp_path: Path) -> None:
    found = client.post("/reap/start", json={"groups": ["code"], "mode": "shadow", "every": 2})
    assert found.json()["groups"] == {"all": 0, "code": 0}
    engine.ranks[0].tokens = {"all": 10, "code": 200}
    assert client.post("/reap/stop").json()["tokens"] == 210
    answer = client.get("/reap/stats")
    assert answer.headers["content-type"] == "application/octet-stream"
    (tmp_path / "downloaded").write_bytes(answer.content)
    assert rk.SaliencyStats.load(tmp_path / "downloaded").groups == ["all", "code"]
    saved = client.post("/reap/stats/save", json={"name": "s.safetensors"}).json()["path"]
    assert rk.SaliencyStats.load(saved).groups == ["all", "code"]
    plan = client.post("/reap/plan", json={"ratio": 0.25})
    assert plan.headers["content-type"] == "application/json"
    set_ = client.post("/reap/mask", content=plan.content, headers={"Content-Type": bodies.JSON})
    assert set_.json()["mask"]["experts"] == 6
    assert {len(ids) for ids in client.get("/reap/mask").json()["removed"].values()} == {2}
    exported = client.get("/reap/profile").json()
    assert client.post("/reap/mask", json=exported).json()["mask"]["experts"] == 6
    assert client.delete("/reap/mask").json()["mask"] is None
    assert client.get("/reap/mask").json() == {"removed": {}}


@pytest.mark.parametrize(("method", "route"), ROUTES)
def test_each_route_asks_for_the_key(engine: FakeClient, method: str, route: str) -> None:
    client = TestClient(application(engine, "mine", "other"))
    for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer yours"}):
        answer = client.request(method, f"/reap/{route}", headers=headers)
        assert "Authorization: Bearer KEY" in sentence(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    assert engine.calls == []
    answer = client.request(method, f"/reap/{route}", headers=KEY)
    assert answer.status_code != 401


def test_what_lies_below_asks_for_the_key(engine: FakeClient) -> None:
    client = TestClient(application(engine, "mine"))
    for path in (
        "/reap/",
        "/reap/none",
        "/reap/status/",
        "/reap//status",
        "/reap/%2e%2e/reap/status",
    ):
        assert client.get(path).status_code in (401, 404)
    prefixed = TestClient(application(engine, "mine"), root_path="/r")
    for path in ("/reap/status", "/r/reap/status"):
        assert prefixed.get(path).status_code in (401, 404)
    assert engine.calls == []


def test_a_key_of_the_environment(engine: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "mine")
    client = TestClient(application(engine))
    sentence(client.get("/reap/status"), 401)
    assert client.get("/reap/status", headers=KEY).status_code == 200
    given = TestClient(application(engine, "first"))  # the flag comes before it
    sentence(given.get("/reap/status", headers=KEY), 401)


def test_other_paths_and_methods(client: TestClient) -> None:
    said = sentence(client.get("/reap/none"), 404)
    assert said.startswith("/reap/none: there is no such route; there are POST /reap/start")
    answer = client.put("/reap/mask", json={})
    assert sentence(answer, 405) == "PUT /reap/mask: send GET or POST or DELETE"
    assert answer.headers["allow"] == "GET, POST, DELETE"


BAD: list[tuple[str, bytes, str | None, int]] = [
    ("start", b"{", bodies.JSON, 400),
    ("start", b'{"every": 0}', bodies.JSON, 400),
    ("start", b'{"groups": ["a", "a"]}', bodies.JSON, 400),
    ("start", b"{}", "text/plain", 415),
    ("start", b"{}", None, 415),
    ("start", b" " * 2_000_000, bodies.JSON, 413),
    ("stop", b'{"x": 1}', bodies.JSON, 400),
    ("reset", b"[]", bodies.JSON, 400),
    ("stats/save", b"", None, 400),
    ("stats/save", b'{"name": "../x.safetensors"}', bodies.JSON, 400),
    ("plan", b'{"ratio": NaN}', bodies.JSON, 400),
    ("plan", b'{"ratio": 0.5, "keep": 2}', bodies.JSON, 400),
    ("plan", b'{"criterion": "best"}', bodies.JSON, 400),
    ("plan", b'{"weights": {"none": 1}}', bodies.JSON, 400),
    ("plan", b'{"keep": 7, "protect": {"99": [1]}}', bodies.JSON, 400),
    ("mask", b"", bodies.JSON, 400),
    ("mask", b"\x00\xff", bodies.BYTES, 400),
    ("mask", b'{"pruned_experts": [[0, 0]]}', bodies.JSON, 400),
    ("mask", b'{"pruned_experts": [[1, 0]]}', "multipart/form-data", 415),
]


@pytest.mark.parametrize(("route", "content", "kind", "status"), BAD)
def test_bad_input(
    client: TestClient,
    engine: FakeClient,
    route: str,
    content: bytes,
    kind: str | None,
    status: int,
) -> None:
    engine.ranks[0].tokens = {"all": 200}
    headers = {} if kind is None else {"Content-Type": kind}
    sentence(client.post(f"/reap/{route}", content=content, headers=headers), status)
    assert client.get("/reap/status").status_code == 200
    assert engine.ranks[0].masked == {}


def test_what_this_server_cannot_do(client: TestClient, engine: FakeClient) -> None:
    assert "no token was counted" in sentence(client.get("/reap/stats"), 409)
    assert "no token was counted" in sentence(client.post("/reap/plan", json={}), 409)
    assert "no experts are masked" in sentence(client.get("/reap/profile"), 409)
    engine.paused = True
    assert "sleeps or is paused" in sentence(client.get("/reap/status"), 409)
    engine.paused, engine.errored = False, True
    engine.fails["reap_status"] = RuntimeError("gone")
    assert "the engine has died" in sentence(client.get("/reap/status"), 503)


def test_faults_of_the_plugin_say_no_more_than_that(
    client: TestClient, engine: FakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    engine.ranks[0].status = dict  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR):
        logging.getLogger("vllm").propagate = True
        assert "see the server's log" in sentence(client.get("/reap/status"), 500)
    assert "GET /reap/status failed" in caplog.text


def test_a_server_without_an_engine() -> None:
    client = TestClient(application(None))
    assert "no engine yet" in sentence(client.get("/reap/status"), 503)
    assert client.get("/metrics").status_code == 200


def test_groups_reach_the_routes_of_vllm(client: TestClient) -> None:
    headers = {"X-Reap-Group": "code", "X-Request-Id": "r1"}
    answer = client.get("/v1/echo", headers=headers)
    assert answer.json() == {"id": "code:r1"}
    assert answer.headers["x-request-id"] == "r1"  # the client's own
    assert client.get("/v1/echo", headers={"X-Reap-Group": "code"}).json()["id"][:5] == "code:"
    wrong = client.get("/v1/echo", headers={"X-Reap-Group": "a b"})
    assert "the header X-Reap-Group is 'a b'" in sentence(wrong, 400)


def values(client: TestClient) -> dict[str, float]:
    """The gauges of reap, as `/metrics` shows them."""
    lines = client.get("/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("reap_"))
    return {name: float(value) for name, value in pairs}


def test_gauges_are_brought_up_to_date(client: TestClient, engine: FakeClient) -> None:
    engine.ranks[0].tokens = {"all": 7, "code": 40}
    engine.ranks[0].masked = {THEIRS[0]: [1, 2], THEIRS[1]: [3]}
    found = values(client)
    assert found['reap_observed_tokens{group="code"}'] == 40
    assert found['reap_observed_tokens{group="all"}'] == 7
    assert found["reap_masked_experts"] == 3
    engine.ranks[0].tokens, engine.ranks[0].masked = {"all": 9}, {}
    found = values(client)
    assert found['reap_observed_tokens{group="code"}'] == 0
    assert (found['reap_observed_tokens{group="all"}'], found["reap_masked_experts"]) == (9, 0)
    engine.fails["reap_status"] = RuntimeError("busy")
    assert values(client)['reap_observed_tokens{group="all"}'] == 9


def test_gauges_of_several_api_servers(tmp_path: Path) -> None:
    """They share a folder, and each shows what was heard last by any."""
    code = (
        "import sys\n"
        "from reap_driver.integrations.vllm.server.metrics import Metrics\n"
        "tokens = {'all': int(sys.argv[1])}\n"
        "Metrics().show({'tokens': tokens, 'masked': {'a': [0] * int(sys.argv[2])}})\n"
    )
    variables = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for tokens, masked in (("5", "2"), ("3", "0")):
        subprocess.run([sys.executable, "-c", code, tokens, masked], check=True, env=variables)
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.multiprocess.MultiProcessCollector(registry, path=str(tmp_path))
    text = prometheus_client.generate_latest(registry).decode()
    assert 'reap_observed_tokens{group="all"} 3.0' in text
    assert "reap_masked_experts 0.0" in text


def test_every_route_is_in_the_schema(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    found = {(m.upper(), path) for path in paths if path.startswith("/reap") for m in paths[path]}
    assert found == {(method, f"/reap/{route}") for method, route in ROUTES}
