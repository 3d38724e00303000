"""What no client may do to a server with a key: each time a sentence, and the server goes on."""

import http.client
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from reap_driver.demo.run import MODEL
from tests.interop.vllm.checks import START
from tests.interop.vllm.server import Answer, Body, Server, serve
from tests.interop.vllm.traffic import complete, observed, prompts

KEY = "correct horse"
[TEXT] = prompts(1, 30, vocabulary=2048)
LAYER = "model.layers.0.mlp.experts"
EXPERTS = 32
ROUTES = [
    ("POST", "/reap/start"),
    ("POST", "/reap/stop"),
    ("POST", "/reap/reset"),
    ("GET", "/reap/status"),
    ("GET", "/reap/stats"),
    ("POST", "/reap/stats/save"),
    ("POST", "/reap/plan"),
    ("GET", "/reap/mask"),
    ("POST", "/reap/mask"),
    ("DELETE", "/reap/mask"),
    ("GET", "/reap/profile"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the server may save statistics."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def server(metadata: Path, saved: Path) -> Iterator[Server]:
    """The demo's model behind a key, observed on one request."""
    variables = {"REAP_STATS_FOLDER": str(saved)}
    flags = ("--enforce-eager", "--api-key", KEY)
    with serve(MODEL, metadata, *flags, environment=variables) as running:
        running.headers["authorization"] = f"Bearer {KEY}"
        running.ask("POST", "/reap/start", START)
        complete(running, TEXT, tokens=3)
        running.ask("POST", "/reap/stop")
        yield running


@pytest.fixture(autouse=True)
def _lives(server: Server) -> Iterator[None]:
    """Whatever a test sends, the server then answers as before, and does what it did."""
    before = _state(server)
    yield
    assert server.process.poll() is None
    after = _state(server)
    server.ask("DELETE", "/reap/mask")
    assert after == before


def _state(server: Server) -> tuple[dict[str, Any], list[float]]:
    """What the server does, and what it answers."""
    return server.ask("GET", "/reap/status"), complete(server, TEXT).logprobs.tolist()


def refused(answer: Answer, status: int | tuple[int, ...], *words: str) -> None:
    """Asserts that an answer is a refusal in a sentence which has these words."""
    statuses = (status,) if isinstance(status, int) else status
    assert answer.status in statuses, f"{answer.status} {answer.body[:500]!r}"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code"}
    assert error["code"] == answer.status
    assert "Traceback" not in error["message"]
    assert len(error["message"]) > 20
    for word in words:
        assert word in error["message"], error["message"]


@pytest.fixture(scope="module")
def plan(server: Server) -> dict[str, Any]:
    """A plan of the served model, which removes a quarter of the experts of each layer."""
    made: dict[str, Any] = server.ask("POST", "/reap/plan", {"ratio": 0.25})
    return made


@pytest.mark.parametrize("given", [None, "Bearer wrong", f"Basic {KEY}", KEY, "Bearer ", "é"])
def test_every_route_asks_for_the_key(given: str | None, server: Server) -> None:
    keyless = Server(server.url, server.model, server.process)
    headers = {} if given is None else {"authorization": given}
    for method, path in ROUTES:
        body = None if method == "GET" else {}
        refused(keyless.request(method, path, body, headers), 401, "key")


# Bodies of each route that no client means, with the status and words of the answer.
NO_JSON: list[Body] = [b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"mode": "replace", "mode": "off"}']


def test_a_body_that_is_no_object_of_known_fields(server: Server) -> None:
    headers = {"content-type": "application/json"}
    for path in ("/reap/start", "/reap/plan", "/reap/stats/save", "/reap/stop"):
        for body in [*NO_JSON, [], ["mode"], "replace", {"unknown": 1}]:
            refused(server.request("POST", path, body, headers), 400, "body")


def test_an_observation_that_cannot_be(server: Server) -> None:
    for field, value in [
        ("mode", "count"),
        ("mode", None),
        ("every", 0),
        ("every", -1),
        ("every", 1.5),
        ("every", True),
        ("every", 10**9),
        ("groups", "code"),
        ("groups", ["all"]),
        ("groups", ["a b"]),
        ("groups", ["code", "code"]),
        ("groups", [""]),
        ("groups", [["code"]]),
        ("groups", [f"group{number}" for number in range(10_000)]),
        ("reset", "yes"),
    ]:
        refused(server.request("POST", "/reap/start", START | {field: value}), 400, field)


def test_a_plan_that_cannot_be_made(server: Server) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"ratio": 0}, "ratio"),
        ({"ratio": 1}, "ratio"),
        ({"ratio": -0.5}, "ratio"),
        ({"ratio": "half"}, "ratio"),
        ({"ratio": 0.99}, ""),
        ({"ratio": 0.25, "keep": 8}, ""),
        ({"ratio": 0.25, "criterion": "best"}, "best"),
        ({"ratio": 0.25, "criterion": "out.py:score"}, ""),
        ({"ratio": 0.25, "weights": {"poems": 1.0}}, "poems"),
        ({"ratio": 0.25, "weights": {"all": -1.0}}, "weights"),
        ({"ratio": 0.25, "protect": {"model.layers.9.mlp.experts": [1]}}, ""),
        ({"ratio": 0.25, "protect": {LAYER: [EXPERTS]}}, ""),
        ({"ratio": 0.25, "layer_ratios": {"x": 0.5}}, ""),
        ({"ratio": 0.25, "allocation": "best"}, "allocation"),
    ]
    for fields, word in cases:
        refused(server.request("POST", "/reap/plan", fields), (400, 409), word)


def test_a_file_outside_the_folder(server: Server, saved: Path) -> None:
    there = sorted(saved.parent.rglob("*.safetensors"))
    for name in [
        "",
        ".",
        "..",
        "../stats.safetensors",
        "/tmp/stats.safetensors",
        "folder/stats.safetensors",
        "folder\\stats.safetensors",
        "~/stats.safetensors",
        "stats\0.safetensors",
        "stats",
        ".safetensors",
        "x" * 500 + ".safetensors",
        7,
        None,
    ]:
        refused(server.request("POST", "/reap/stats/save", {"name": name}), 400, "name")
    assert sorted(saved.parent.rglob("*.safetensors")) == there


def test_a_file_is_saved_once(server: Server, saved: Path) -> None:
    answer = server.ask("POST", "/reap/stats/save", {"name": "once.safetensors"})
    assert Path(answer["path"]).resolve() == (saved / "once.safetensors").resolve()
    first = (saved / "once.safetensors").read_bytes()
    refused(server.request("POST", "/reap/stats/save", {"name": "once.safetensors"}), 400, "once")
    assert (saved / "once.safetensors").read_bytes() == first
    again = {"name": "once.safetensors", "overwrite": True}
    assert server.ask("POST", "/reap/stats/save", again) == answer
    link = saved / "link.safetensors"
    os.symlink(saved.parent / "target.safetensors", link)
    body = {"name": link.name, "overwrite": True}
    refused(server.request("POST", "/reap/stats/save", body), 400, link.name)
    assert not (saved.parent / "target.safetensors").exists()


def changed(plan: dict[str, Any], **layer: Any) -> dict[str, Any]:
    """The plan with other fields of its first layer."""
    return plan | {"layers": plan["layers"] | {LAYER: plan["layers"][LAYER] | layer}}


def test_a_mask_that_the_model_cannot_have(plan: dict[str, Any], server: Server) -> None:
    layers = plan["layers"]
    every = list(range(EXPERTS))
    other = {**plan["model"], "model_type": "mixtral"}
    sizes = {name: {**facts, "hidden_size": 7} for name, facts in plan["model"]["layers"].items()}
    wider = {**plan["model"], "layers": sizes}
    for body, word in [
        (changed(plan, kept=every[:3], removed=every[3:]), LAYER),  # fewer than top-k
        (changed(plan, kept=[], removed=every), ""),
        (changed(plan, kept=every[:-1], removed=[EXPERTS]), ""),
        (changed(plan, kept=every, removed=[0]), ""),
        (changed(plan, kept=every[1:], removed=[-1]), ""),
        (changed(plan, num_experts=64, kept=list(range(60)), removed=list(range(60, 64))), LAYER),
        (plan | {"layers": {"model.layers.9.mlp.experts": layers[LAYER]}}, "9"),
        (plan | {"layers": {}}, ""),
        (plan | {"model": other}, "mixtral"),
        (plan | {"model": wider}, "hidden_size"),
        ({"version": 1, "pruned_experts": [[0, EXPERTS]]}, str(EXPERTS)),
        ({"version": 1, "pruned_experts": [[9, 0]]}, "9"),
        ({"version": 1, "pruned_experts": [[0, n] for n in range(EXPERTS - 3)]}, ""),
        ({"version": 1, "pruned_experts": []}, ""),
        ({"version": 1, "pruned_experts": [[0]]}, ""),
        ({"version": 2, "routing_mode": "post_topk_drop", "pruned_experts": [[0, 1]]}, ""),
        ({}, ""),
        ([], ""),
        ("mask", ""),
    ]:
        refused(server.request("POST", "/reap/mask", body), (400, 409), word)
    assert server.ask("GET", "/reap/mask") == {"removed": {}}


def test_a_mask_of_no_known_kind(server: Server, tmp_path: Path) -> None:
    observed(MODEL, {"all": [TEXT]}).save(tmp_path / "stats.safetensors")
    noise = torch.randint(0, 256, (100_000,), generator=torch.Generator().manual_seed(0))
    for body in [
        b"",
        b"\x00",
        bytes(noise.tolist()),
        b"\xff" * 8 + b"{}",
        (tmp_path / "stats.safetensors").read_bytes(),
        (MODEL / "model.safetensors").read_bytes(),
    ]:
        refused(server.request("POST", "/reap/mask", body), 400)


def test_a_body_of_ten_megabytes(server: Server) -> None:
    large = b'{"mode": "' + b"x" * 10_000_000 + b'"}'
    headers = {"content-type": "application/json"}
    for path in ("start", "stop", "reset", "plan", "stats/save", "mask"):
        refused(server.request("POST", f"/reap/{path}", large, headers), (400, 413))
    refused(server.request("DELETE", "/reap/mask", large, headers), (400, 413))


def test_paths_and_methods_that_no_route_has(server: Server) -> None:
    refused(server.request("GET", "/reap"), 404)
    refused(server.request("GET", "/reap/nothing"), 404)
    refused(server.request("GET", "/reap/../reap/start/../.."), 404)
    for method, path in (("GET", "/reap/start"), ("DELETE", "/reap/stats"), ("PUT", "/reap/mask")):
        refused(server.request(method, path, None if method == "GET" else {}), 405, "send")


def test_the_header_of_a_group_that_is_no_name(server: Server) -> None:
    body = {"model": server.model, "prompt": TEXT, "max_tokens": 1}
    for name in ("all", "a b", "a:b", "x" * 65, "", "é"):
        refused(server.request("POST", "/v1/completions", body, {"X-Reap-Group": name}), 400)


def test_a_request_that_ends_before_its_body(server: Server) -> None:
    place = urlsplit(server.url)
    for length in ("1000", "-1", "x"):
        link = http.client.HTTPConnection(place.hostname or "", place.port, timeout=10)
        link.putrequest("POST", "/reap/mask")
        for name, value in server.headers.items():
            link.putheader(name, value)
        link.putheader("content-length", length)
        link.endheaders(b"{")
        link.close()
    assert server.ask("GET", "/reap/mask") == {"removed": {}}


def test_profile_without_a_mask(server: Server) -> None:
    refused(server.request("GET", "/reap/profile"), 409, "mask")
