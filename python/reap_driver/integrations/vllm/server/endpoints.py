"""Entry point `vllm.endpoint_plugins`: the routes under `/reap` in vLLM's API server.

vLLM loads it where VLLM_PLUGINS names `reap`, calls `attach_router` when it builds the application,
and `init_state` when the engine runs.
"""

import os
from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from reap_driver.integrations.vllm.engine import versions
from reap_driver.integrations.vllm.plugin import NAME
from reap_driver.integrations.vllm.server.groups import GroupMiddleware
from reap_driver.integrations.vllm.server.keys import Keys
from reap_driver.integrations.vllm.server.metrics import Metrics, RefreshMiddleware
from reap_driver.integrations.vllm.server.routes import router
from reap_driver.integrations.vllm.server.saving import VARIABLE, StatsFolder
from reap_driver.integrations.vllm.server.session import Session
from reap_driver.integrations.vllm.server.status import Vllm


class ReapEndpoints:
    """The plugin, as vLLM's protocol `EndpointPlugin` has it.

    Attributes:
        name: by which VLLM_PLUGINS names it.
        required_tasks: servers that generate text have these routes.
    """

    name = NAME
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes, and what reads the groups of all other requests.

        Raises:
            BackendUnavailable: this version of vLLM lacks something that the plugin needs.
            UsageError: REAP_STATS_FOLDER names nothing that can be written to.
        """
        versions.check(versions.SERVER)
        StatsFolder(os.environ.get(VARIABLE))  # so that a wrong one ends the start
        app.add_middleware(GroupMiddleware)
        app.add_middleware(RefreshMiddleware, refresh=_refresh)
        app.include_router(router())

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Connects the routes with the engine.

        Args:
            engine_client: vLLM's `EngineClient`; None on a server without an engine.
            state: of the application.
            args: of the command line, of which `--api-key` counts.
        """
        state.reap_keys = Keys(_keys(args))
        if engine_client is not None:
            folder = StatsFolder(os.environ.get(VARIABLE))
            found = Vllm(versions.version(), versions.note())
            state.reap = Session(engine_client, found, folder, Metrics())


async def _refresh(app: Any) -> None:
    session = getattr(app.state, "reap", None)
    if session is not None:
        await session.refresh()


def _keys(args: Namespace) -> list[str]:
    """The server's keys: of the command line, or else of the environment, as for `/v1`."""
    given = getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
    return [key for key in given if key]
