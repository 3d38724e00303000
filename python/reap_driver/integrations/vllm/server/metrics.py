"""Gauges beside vLLM's own metrics, under `/metrics`.

A collector of Prometheus cannot wait for the engine, so the gauges hold what was last heard of it.
`RefreshMiddleware` asks the engine before `/metrics` is answered, for a second at most: a busy
engine answers between two steps. With several API servers, each writes into the folder that vLLM
shares between them, and the latest value counts.
"""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from reap_driver.integrations.vllm.server.groups import App, Receive, Scope, Send
from reap_driver.integrations.vllm.server.refusals import Refused
from reap_kernels.errors import ReapError

_SECONDS = 1.0
_log = logging.getLogger("vllm.reap")


@functools.cache
def _gauges() -> tuple[Any, Any]:
    """The gauges, which a process can have once."""
    from prometheus_client import Gauge

    how = {"multiprocess_mode": "mostrecent"}
    tokens = Gauge(
        "reap_observed_tokens", "Tokens that statistics of experts count.", ["group"], **how
    )
    masked = Gauge("reap_masked_experts", "Experts that are masked.", **how)
    return tokens, masked


class Metrics:
    """The gauges of a server."""

    def __init__(self) -> None:
        self._tokens, self._masked = _gauges()
        self._groups: set[str] = set()

    def show(self, status: Mapping[str, Any]) -> None:
        """Sets the gauges.

        Args:
            status: of all ranks, see `status.merged_status`.
        """
        tokens = status["tokens"]
        for group in self._groups - set(tokens):  # of an earlier observation
            self._tokens.labels(group=group).set(0)
        for group, number in tokens.items():
            self._tokens.labels(group=group).set(number)
        self._groups |= set(tokens)
        self._masked.set(sum(len(ids) for ids in status["masked"].values()))


class RefreshMiddleware:
    """Asks for the values of the gauges before `/metrics` is answered (ASGI).

    Args:
        app: what the request goes to.
        refresh: asks the engine, and sets the gauges.
    """

    def __init__(self, app: App, refresh: Callable[[Any], Awaitable[None]]) -> None:
        self.app, self.refresh = app, refresh

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, for `/metrics` with new values if the engine answers in time."""
        path = str(scope.get("path", "")).removeprefix(str(scope.get("root_path", "")))
        if scope["type"] == "http" and path.rstrip("/") == "/metrics":
            try:
                await asyncio.wait_for(self.refresh(scope["app"]), _SECONDS)
            except (ReapError, Refused, TimeoutError) as error:
                _log.debug("the gauges of reap keep their values: %s", error)
        await self.app(scope, receive, send)
