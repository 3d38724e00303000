"""The calls of the engine's workers, and what their errors are as answers."""

import asyncio
from typing import Any

from reap_driver.integrations.vllm.server.refusals import Refused, status_named
from reap_kernels.schema import short

_SECONDS = 120.0  # an engine that does not answer for longer is taken to hang
# An engine that is paused for longer sleeps; another API server pauses it to exchange a mask.
_PAUSED, _LOOKS = 2.0, 20


class Engine:
    """The workers of one engine.

    Args:
        client: vLLM's `EngineClient`.
    """

    def __init__(self, client: Any) -> None:
        self.client = client

    async def call(self, method: str, **given: Any) -> list[dict[str, Any]]:
        """Calls a method of every worker.

        Args:
            method: its name.
            **given: its arguments.

        Returns:
            The result of every rank, in their order.

        Raises:
            Refused: 409 where the server cannot do this (several engines, an engine that sleeps, a
                refusal of a worker); 400 where a worker finds the input wrong; 503 where the engine
                has died or the call failed.
        """
        await self._check_awake()
        return await self._rpc(method, **given)

    async def _rpc(self, method: str, **given: Any) -> list[dict[str, Any]]:
        """`call`, also while the engine is paused."""
        found = await self._answered(method, self.client.collective_rpc(method, kwargs=given))
        results = found if isinstance(found, list) else [found]
        for rank, result in enumerate(results):
            error = result.get("error") if isinstance(result, dict) else None
            if isinstance(error, dict):
                where = f" (rank {rank} of {len(results)})" if len(results) > 1 else ""
                raise Refused(status_named(str(error.get("type"))), f"{error['message']}{where}")
        return results

    async def exchange_mask(self, removed: dict[str, list[int]], source: str) -> list[Any]:
        """Sets a mask on all workers while no step runs, and forgets all keys and values that were
        computed without it.

        Requests in flight wait meanwhile. Their keys and values are computed again by the new
        routing; tokens that they were sent before stay as they are.

        Raises:
            Refused: see `call`; the mask is then cleared everywhere, or the message says that it
                could not be.
        """
        await self._check_awake()
        try:
            pause = self.client.pause_generation(mode="keep", clear_cache=False)
            await self._answered("pause_generation", pause)
            try:
                found = await self._rpc("reap_mask", removed=removed, source=source)
                await self._forget()
            except Refused as error:
                raise await self._cleared(error) from error
        finally:
            await self._answered("resume_generation", self.client.resume_generation())
        return found

    async def _forget(self) -> None:
        """Resets the prefix cache, and lets requests in flight be computed again.

        Raises:
            Refused: it could not be reset.
        """
        reset = self.client.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        if await self._answered("reset_prefix_cache", reset) is False:
            raise Refused(
                503,
                "vLLM could not reset its prefix cache, which holds keys and values of the other "
                "routing; try again when no request runs",
            )

    async def _cleared(self, error: Refused) -> Refused:
        """The error of a mask that failed on some rank, once it is cleared on all."""
        try:
            await self._rpc("reap_mask", removed={}, source="")
            await self._forget()
        except Refused as second:
            return Refused(
                503,
                f"{error}; clearing the mask failed, too ({second}), so ranks may differ: restart "
                "the server",
            )
        return Refused(error.status, f"{error}; no experts are masked now, on any rank")

    async def _check_awake(self) -> None:
        """Raises Refused where the workers of one engine are not all of them, or do not work."""
        config = getattr(self.client, "vllm_config", None)
        parallel = getattr(config, "parallel_config", None)
        size = getattr(parallel, "data_parallel_size", 1)
        if size > 1:
            raise Refused(
                409,
                f"this server runs {size} engines (--data-parallel-size), of which vLLM's calls "
                "reach one alone; start servers with one engine each, and merge their statistics",
            )
        for look in range(_LOOKS + 1):
            if not await self._answered("is_sleeping", self.client.is_sleeping()):
                return
            if look < _LOOKS:
                await asyncio.sleep(_PAUSED / _LOOKS)
        raise Refused(
            409,
            "the engine sleeps or is paused; wake it up (POST /wake_up) or resume it (POST "
            "/resume), and try again",
        )

    async def _answered(self, what: str, call: Any) -> Any:
        """The result of a call of the engine.

        Raises:
            Refused: 503; the engine has died, does not answer or failed.
        """
        try:
            return await asyncio.wait_for(call, _SECONDS)
        except TimeoutError as error:
            raise Refused(
                503, f"the engine did not answer {what} within {_SECONDS:.0f} s; try again later"
            ) from error
        except Exception as error:  # vLLM raises a plain Exception with the worker's message
            if getattr(self.client, "errored", False):
                raise Refused(503, "the engine has died; restart the server") from error
            text = str(error).strip() or type(error).__name__
            why = short(text.splitlines()[0], 500)
            raise Refused(
                503, f"the engine failed in {what}: {why}; see the server's log for the cause"
            ) from error
