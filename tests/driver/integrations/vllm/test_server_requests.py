"""What reads requests in the API server: bodies, keys, groups. No vLLM is needed for it."""

import asyncio
import re
from typing import Any

import pytest

from reap_driver.integrations.vllm.server import bodies
from reap_driver.integrations.vllm.server.groups import GroupMiddleware
from reap_driver.integrations.vllm.server.keys import Keys
from reap_driver.integrations.vllm.server.refusals import Refused, status_named, status_of
from reap_kernels.errors import DataError, PlanError, ReapError, ResourceError, UnsupportedModel

JSON = "application/json; charset=utf-8"


def test_fields_that_are_left_out_have_defaults() -> None:
    default = {"mode": "replace", "every": 1, "groups": [], "reset": True}
    assert bodies.START.read(b"", None) == default
    given = b'{"mode": "shadow", "every": 8, "groups": ["code", "a.b-c_1"]}'
    asked = {**default, "mode": "shadow", "every": 8, "groups": ["code", "a.b-c_1"]}
    assert bodies.START.read(given, JSON) == asked
    assert bodies.NOTHING.read(b"{}", JSON) == {}
    assert bodies.SAVE.read(b'{"name": "x"}', JSON) == {"name": "x", "overwrite": False}


WRONG: dict[str, tuple[bodies.Body, bytes, str]] = {
    "no JSON": (bodies.START, b"{", "the body is not JSON"),
    "no UTF-8": (bodies.START, b"\xff{}", "the body is not UTF-8"),
    "NaN": (bodies.PLAN, b'{"ratio": NaN}', "number nan"),
    "infinity": (bodies.PLAN, b'{"ratio": 1e999}', "number inf"),
    "a list": (bodies.START, b"[]", "the content is []; expected an object"),
    "a number": (bodies.NOTHING, b"3", "the content is 3; expected an object"),
    "twice": (bodies.START, b'{"every": 1, "every": 2}', "the name 'every' twice"),
    "deep": (bodies.NOTHING, b"[" * 200 + b"]" * 200, "nested deeper than 64"),
    "unknown": (bodies.START, b'{"modus": "shadow"}', "field 'modus' is unknown; expected one of"),
    "unknown in nothing": (bodies.NOTHING, b'{"reset": true}', "field 'reset' is unknown"),
    "mode": (bodies.START, b'{"mode": "off"}', "'mode' is 'off'; expected one of replace, shadow"),
    "every 0": (bodies.START, b'{"every": 0}', "'every' is 0; expected a whole number, 1 to"),
    "every true": (bodies.START, b'{"every": true}', "'every' is True; expected a whole number"),
    "every 1.0": (bodies.START, b'{"every": 1.0}', "'every' is 1.0; expected a whole number"),
    "groups": (bodies.START, b'{"groups": "code"}', "'groups' is 'code'; expected a list"),
    "a group": (bodies.START, b'{"groups": ["a:b"]}', "'groups[0]' is 'a:b'; expected the name"),
    "all": (bodies.START, b'{"groups": ["all"]}', "'groups[0]' is 'all'; expected the name"),
    "empty": (bodies.START, b'{"groups": [""]}', "'groups[0]' is ''; expected the name"),
    "many": (bodies.START, b'{"groups": [%s]}' % b",".join([b'"g"'] * 65), "has 65 entries"),
    "reset": (bodies.START, b'{"reset": 1}', "'reset' is 1; expected true or false"),
    "no name": (bodies.SAVE, b"", "field 'name' is missing"),
    "name": (bodies.SAVE, b'{"name": 3}', "'name' is 3; expected a text"),
    "ratio": (bodies.PLAN, b'{"ratio": 1}', "'ratio' is 1; expected a finite number, above 0"),
    "weights": (bodies.PLAN, b'{"weights": {"code": -1}}', "'weights.code' is -1"),
    "a file": (bodies.PLAN, b'{"protect": "/etc/x.json"}', "'protect' is '/etc/x.json'; expected"),
    "ratios": (bodies.PLAN, b'{"layer_ratios": "/etc/x"}', "'layer_ratios' is '/etc/x'"),
    "out": (bodies.PLAN, b'{"out": "/tmp/x"}', "field 'out' is unknown"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named(wrong: str) -> None:
    body, content, message = WRONG[wrong]
    with pytest.raises(Refused, match=re.escape(message)) as found:
        body.read(content, JSON)
    assert found.value.status == 400


@pytest.mark.parametrize("kind", [None, "", "text/plain", "application/x-www-form-urlencoded"])
def test_other_content_types_are_refused(kind: str | None) -> None:
    with pytest.raises(
        Refused, match="send it with the header `Content-Type: application/json`"
    ) as f:
        bodies.START.read(b"{}", kind)
    assert f.value.status == 415


@pytest.mark.does_not_raise
def test_any_of_the_keys_will_do() -> None:
    keys = Keys(["first", "second"])
    keys.check("Bearer first")
    keys.check("bearer second")
    Keys([]).check(None)


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer ", "Bearer third", "first", "Basic first", "Bearer \udcff"],
)
def test_other_keys_are_refused(given: str | None) -> None:
    with pytest.raises(Refused, match="Authorization: Bearer KEY") as found:
        Keys(["first", "second"]).check(given)
    assert found.value.status == 401


def test_errors_have_statuses() -> None:
    found = [status_of(kind("x")) for kind in (PlanError, DataError, UnsupportedModel)]
    assert found == [400, 409, 409]
    assert [status_of(ResourceError("x")), status_of(ReapError("x"))] == [507, 409]
    assert [status_named(name) for name in ("PlanError", "KeyError")] == [400, 503]


def through(*headers: tuple[str, str], kind: str = "http") -> tuple[list[Any], list[Any]]:
    """The headers with which a request comes out of the middleware, and what was answered."""
    came: list[Any] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        came.append([(name.decode(), value.decode()) for name, value in scope["headers"]])

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"type": kind, "headers": raw}
    asyncio.run(GroupMiddleware(app)(scope, None, send))  # type: ignore[arg-type]
    return (came[0] if came else []), sent


def test_a_group_begins_the_id() -> None:
    host = ("host", "x")
    assert through(host)[0] == [host]
    for own in ("r1", "a:b"):
        headers, _ = through(host, ("x-reap-group", "code"), ("x-request-id", own))
        assert headers == [host, ("x-reap-group", "code"), ("x-request-id", f"code:{own}")]
    headers, _ = through(("X-Reap-Group", " code "), ("X-Request-Id", "code:r1"))
    assert headers[-1] == ("x-request-id", "code:r1")
    first, second = (through(("x-reap-group", "code"))[0][-1][1] for _ in range(2))
    assert first != second
    assert re.fullmatch("code:[0-9a-f]{32}", first)
    assert through(("x-request-id", "chat:r1"))[0] == [("x-request-id", "chat:r1")]
    assert through(("x-reap-group", "a b"), kind="websocket")[0] == [("x-reap-group", "a b")]


@pytest.mark.parametrize("name", ["", "all", "a b", "a:b", "-a", "\xe9", "x" * 65, "a\nb"])
def test_what_names_no_group_is_refused(name: str) -> None:
    came, sent = through(("x-reap-group", name))
    assert not came
    assert sent[0]["status"] == 400
    assert b"the header X-Reap-Group is " in sent[1]["body"]


def test_one_group_a_request() -> None:
    came, sent = through(("x-reap-group", "code"), ("x-reap-group", "chat"))
    assert not came
    assert b"there more than once" in sent[1]["body"]
