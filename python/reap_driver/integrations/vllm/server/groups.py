"""Groups of requests: from the header `X-Reap-Group` to the beginning of the request's id.

vLLM's workers know of a request its id alone, which vLLM makes from the header `X-Request-Id`. So a
request with `X-Reap-Group: code` gets an id `code:...`; a client may as well send that itself.
"""

import json
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from reap_driver.integrations.vllm.engine.groups import ALL
from reap_driver.integrations.vllm.server.refusals import envelope
from reap_kernels.schema import Mismatch, short

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_GROUPS = 64
HEADER = "X-Reap-Group"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_RULE = (
    "1 to 64 letters, digits, `_`, `.` and `-`, which does not begin with `.` or `-` and is not "
    f"{ALL!r}"
)


def is_name(text: str) -> bool:
    """Whether a text can name a group.

    Example:
        >>> is_name("code"), is_name("all"), is_name("a:b")
        (True, False, False)
    """
    return bool(_NAME.fullmatch(text)) and text != ALL


class GroupName:
    """A kind of JSON value: the name of a group."""

    def check(self, value: Any, at: str) -> None:
        """Raises Mismatch where `value` names no group."""
        if not isinstance(value, str) or not is_name(value):
            raise Mismatch(at, f"is {short(value)}", f"the name of a group, {_RULE}")


class GroupMiddleware:
    """Puts the group that a header names before a request's id (ASGI).

    Args:
        app: what the request goes to.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on; one whose header names no group is answered with 400."""
        headers: list[tuple[bytes, bytes]] = list(scope.get("headers") or ())
        given = [value for name, value in headers if name.lower() == HEADER.lower().encode()]
        if scope["type"] == "http" and given:
            group = given[0].decode("latin-1").strip()
            if len(given) > 1 or not is_name(group):
                found = short(group) if len(given) == 1 else "there more than once"
                await _refuse(send, f"the header {HEADER} is {found}; give one name: {_RULE}")
                return
            scope = {**scope, "headers": _renamed(headers, group)}
        await self.app(scope, receive, send)


def _renamed(headers: list[tuple[bytes, bytes]], group: str) -> list[tuple[bytes, bytes]]:
    """Headers with an id of the request that begins with its group."""
    own = [value for name, value in headers if name.lower() == b"x-request-id"]
    rest = [pair for pair in headers if pair[0].lower() != b"x-request-id"]
    name = own[0] if own else uuid.uuid4().hex.encode()
    start = f"{group}:".encode()
    return [*rest, (b"x-request-id", name if name.startswith(start) else start + name)]


async def _refuse(send: Send, message: str) -> None:
    body = json.dumps(envelope(400, message)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
