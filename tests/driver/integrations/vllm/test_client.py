"""The client of the plugin's routes: what it sends, what it takes, and every way it can fail."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reap_driver as rd
from reap_driver.integrations.vllm import client
from reap_driver.integrations.vllm.client import Server
from reap_kernels import SaliencyStats
from reap_kernels.errors import BackendUnavailable, DataError, PlanError, ReapError, UsageError
from tests.driver.integrations.vllm.fake_server import (
    KEY,
    Answer,
    FakeServer,
    serving,
    statistics,
    status,
)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A server without answers; no key is in the environment."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with serving() as server:
        yield server


def file_of(stats: SaliencyStats, folder: Path) -> bytes:
    stats.save(folder / "sent.safetensors")
    return (folder / "sent.safetensors").read_bytes()


def plan_of(stats: SaliencyStats) -> rd.Plan:
    return rd.make_plan(rd.score(stats), 0.25)


def test_each_call_is_its_route(fake: FakeServer) -> None:
    """With the method, the path and the body that the server documents."""
    server, said = Server(fake.url), status()
    for route in ("POST start", "POST stop", "POST reset", "GET status"):
        fake.tell(route, said)
    fake.tell("POST stats/save", {"path": "/srv/code.safetensors"})
    fake.tell("DELETE mask", {"removed": {}})
    fake.tell("GET mask", {"source": "plan.json", "removed": {"model.layers.0.mlp.experts": [3]}})
    fake.tell("GET profile", {"version": 1, "pruned_experts": [[0, 3]]})
    assert server.start("shadow", every=8, groups=("code", "chat"), reset=False) == said
    assert server.stop() == server.reset() == server.status() == said
    assert server.save("code.safetensors", overwrite=True) == "/srv/code.safetensors"
    assert server.unmask() == {"removed": {}}
    assert server.masked()["removed"] == {"model.layers.0.mlp.experts": [3]}
    assert server.profile()["pruned_experts"] == [[0, 3]]
    start = {"mode": "shadow", "every": 8, "groups": ["code", "chat"], "reset": False}
    save = {"name": "code.safetensors", "overwrite": True}
    assert [(one.method, one.path, json.loads(one.body or b"null")) for one in fake.asked] == [
        ("POST", "/reap/start", start),
        ("POST", "/reap/stop", {}),
        ("POST", "/reap/reset", {}),
        ("GET", "/reap/status", None),
        ("POST", "/reap/stats/save", save),
        ("DELETE", "/reap/mask", None),
        ("GET", "/reap/mask", None),
        ("GET", "/reap/profile", None),
    ]


def test_statistics_arrive_as_they_are(fake: FakeServer, tmp_path: Path) -> None:
    stats = statistics(groups=("all", "code"))
    content = file_of(stats, tmp_path)
    fake.tell("GET stats", content)
    found = Server(fake.url).stats(tmp_path / "stats.safetensors")
    assert found.groups == ["all", "code"]
    assert rd.score(found).digest() == rd.score(stats).digest()
    assert (tmp_path / "stats.safetensors").read_bytes() == content
    assert Server(fake.url).stats().groups == ["all", "code"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "sent.safetensors",
        "stats.safetensors",
    ]


def test_damaged_statistics_are_not_saved(fake: FakeServer, tmp_path: Path) -> None:
    content = bytearray(file_of(statistics(), tmp_path))
    content[-1] ^= 1
    fake.tell("GET stats", bytes(content))
    with pytest.raises(DataError, match="is damaged"):
        Server(fake.url).stats(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_arrives_checked(fake: FakeServer) -> None:
    plan = plan_of(statistics())
    fake.tell("POST plan", plan.check())
    assert Server(fake.url).plan(ratio=0.25, weights={"all": 1.0}) == plan
    assert json.loads(fake.asked[0].body) == {"ratio": 0.25, "weights": {"all": 1.0}}
    fake.tell("POST plan", {**plan.check(), "ratio": 2})
    with pytest.raises(PlanError, match=r"plan from http://.*/reap/plan: field 'ratio' is 2"):
        Server(fake.url).plan()


def test_a_mask_is_sent_as_its_file_is(fake: FakeServer, tmp_path: Path) -> None:
    plan, server = plan_of(statistics()), Server(fake.url)
    fake.tell("POST mask", {"experts": 4})
    plan.save(tmp_path / "plan.json")
    # The first byte of this file's length is that of an opening brace.
    binary = ord("{").to_bytes(8, "little") + b'{"layers"'
    (tmp_path / "masks").write_bytes(binary)
    for given in (plan, tmp_path / "plan.json", plan.check(), tmp_path / "masks"):
        assert server.mask(given) == {"experts": 4}
    *texts, masks = fake.asked
    assert {one.body for one in texts} == {(tmp_path / "plan.json").read_bytes()}
    assert {one.headers["Content-Type"] for one in texts} == {"application/json"}
    assert (masks.body, masks.headers["Content-Type"]) == (binary, "application/octet-stream")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("nowhere.json", r"nowhere\.json: cannot be read \(No such file"),
        ({"layers": {1, 2}}, "the plan holds what JSON cannot"),
        ({"ratio": float("nan")}, "the plan holds what JSON cannot"),
    ],
)
def test_masks_that_cannot_be_sent(fake: FakeServer, plan: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Server(fake.url).mask(plan)
    assert fake.asked == []


def test_the_key_is_sent(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is given, else that of the environment, else none."""
    fake.tell("GET status", status())
    Server(fake.url).status()
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    Server(fake.url).status()
    Server(fake.url, "other").status()
    keys = [one.headers.get("Authorization") for one in fake.asked]
    assert keys == [None, f"Bearer {KEY}", "Bearer other"]


@pytest.mark.parametrize(
    ("key", "message"),
    [(None, "the server asks for an API key; set VLLM_API_KEY"), (KEY, "does not take the API")],
)
def test_another_key(fake: FakeServer, key: str | None, message: str) -> None:
    fake.tell("GET status", {"error": "Unauthorized"}, 401)
    with pytest.raises(UsageError, match=message) as caught:
        Server(fake.url, key).status()
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", ["", "two words", "line\r\nX-Other: 1", "ключ"])
def test_keys_that_no_header_holds(key: str) -> None:
    with pytest.raises(UsageError, match="the API key is empty, or has") as caught:
        Server("http://127.0.0.1:1", key)
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("https://gpu.example/v1/", "https://gpu.example"),
        ("http://[::1]:8000/prefix/", "http://[::1]:8000/prefix"),
    ],
)
def test_urls(given: str, used: str) -> None:
    assert Server(given).url == used


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost",
        "localhost:8000",
        "ftp://host",
        "http://",
        "http://host:port",
        "http://host:99999",
        "http://host/?a=1",
        "http://host/#a",
        "http://host/a b",
        "http://[::1",
        "http://host\r\nX: 1",
    ],
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match=r"the URL is .*; give scheme, host and port"):
        Server(url)


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan")])
def test_timeouts_that_are_none(timeout: float) -> None:
    with pytest.raises(UsageError, match="give seconds above 0"):
        Server("http://127.0.0.1:1", timeout=timeout)


def test_nothing_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(BackendUnavailable) as caught:
            Server(url).status()
    assert str(caught.value) == (
        f"{url}: cannot be reached (Connection refused); check the URL, and start the server with "
        "`VLLM_PLUGINS=reap vllm serve MODEL`"
    )


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"detail": "Not Found"}, 404),
        ({"error": {"message": "Not Found", "type": "NotFoundError", "code": 404}}, 404),
        (b"<html>no</html>", 404),
        (b"", 405),
        (b"<html>hello</html>", 200),
        (b"", 200),
    ],
)
def test_a_server_without_the_plugin(fake: FakeServer, body: Any, code: int) -> None:
    fake.tell("GET status", body, code)
    with pytest.raises(BackendUnavailable) as caught:
        Server(fake.url).status()
    assert "so no server with the plugin of reap-kernels is there; check the URL" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("route", "code", "kind"),
    [
        ("POST start", 400, UsageError),
        ("POST start", 409, BackendUnavailable),
        ("POST mask", 400, PlanError),
        ("POST mask", 409, BackendUnavailable),
        ("POST stats/save", 413, UsageError),
        ("GET profile", 404, DataError),
        ("POST plan", 422, UsageError),
    ],
)
def test_the_sentence_of_the_server(
    fake: FakeServer, route: str, code: int, kind: type[ReapError]
) -> None:
    fake.refuse(route, code, "layer 3 has no experts; give another")
    server = Server(fake.url)
    calls = {
        "POST start": server.start,
        "POST mask": lambda: server.mask({}),
        "POST stats/save": lambda: server.save("a"),
        "GET profile": server.profile,
        "POST plan": lambda: server.plan(ratio=0.5),
    }
    with pytest.raises(ReapError) as caught:
        calls[route]()
    assert type(caught.value) is kind
    assert str(caught.value) == f"{fake.url}: layer 3 has no experts; give another"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "EngineDeadError", "code": 500}}', "500: EngineDeadError; see"),
        (b"Internal Server Error", "answers 500; see the log of the server"),
        (b'{"error": {"message": 7}}', "answers 500; see the log of the server"),
        (b'{"error": ' + b"[" * 70_000, "answers 500; see the log of the server"),
    ],
)
def test_a_server_that_fails(fake: FakeServer, body: bytes, said: str) -> None:
    fake.tell("POST stop", body, 500)
    with pytest.raises(BackendUnavailable, match=said):
        Server(fake.url).stop()


def test_redirects_are_not_followed(fake: FakeServer) -> None:
    """The key would go with them."""
    fake.answers["GET status"] = Answer(307, headers={"Location": "http://elsewhere/"})
    with pytest.raises(UsageError, match="sends callers to 'http://elsewhere/'; give that"):
        Server(fake.url, KEY).status()


@pytest.mark.parametrize("field", ["mode", "groups"])
def test_answers_of_another_shape(fake: FakeServer, field: str) -> None:
    fake.tell("GET status", {**status(), field: 3})
    with pytest.raises(DataError, match=rf"/reap/status: the answer's field '?{field}'? is 3"):
        Server(fake.url).status()


def test_answers_that_are_cut_off(fake: FakeServer) -> None:
    fake.answers["GET status"] = Answer(200, b"{", length=100)
    with pytest.raises(BackendUnavailable, match="ended after 1 of 100 bytes"):
        Server(fake.url).status()


def test_answers_that_are_too_large(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_FILE", 1000)
    fake.tell("GET stats", b"x" * 1001)
    with pytest.raises(DataError, match="the answer is larger than 1000 bytes"):
        Server(fake.url).stats()


def test_no_answer_in_time(fake: FakeServer) -> None:
    fake.hold = threading.Event()
    with pytest.raises(BackendUnavailable, match=r"no answer within 0\.2 seconds; the server may"):
        Server(fake.url, timeout=0.2).status()


@pytest.mark.parametrize(
    "call",
    [
        lambda server: server.start("masks"),
        lambda server: server.start(every="8"),
        lambda server: server.start(groups="code"),
        lambda server: server.save(3),
        lambda server: server.mask(3),
        lambda server: server.stats(3),
        lambda server: Server(8000),
    ],
)
def test_wrong_types(call: Any) -> None:
    with pytest.raises(UsageError, match="; expected "):
        call(Server("http://127.0.0.1:1"))
