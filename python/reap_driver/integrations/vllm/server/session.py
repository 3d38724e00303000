"""What the routes do: one call of the workers each, and what comes before and after it.

The state of an observation and of a mask is in the workers, so several API servers of one engine
agree. Each of them does one thing at a time. Masks are best changed through one of them: two that
change them at once may let steps run between a mask and the reset of the cache.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from reap_driver.integrations.vllm.engine.stats_bytes import bytes_of
from reap_driver.integrations.vllm.server.engine import Engine
from reap_driver.integrations.vllm.server.masks import mask_of, profile_of
from reap_driver.integrations.vllm.server.metrics import Metrics
from reap_driver.integrations.vllm.server.plans import plan_text
from reap_driver.integrations.vllm.server.refusals import Refused
from reap_driver.integrations.vllm.server.saving import StatsFolder
from reap_driver.integrations.vllm.server.served_model import ServedModel, served_model
from reap_driver.integrations.vllm.server.statistics import live_statistics
from reap_driver.integrations.vllm.server.status import Vllm, masked_of, merged_status, shown_status
from reap_kernels import SaliencyStats


class Session:
    """The routes' work on one engine.

    Args:
        client: vLLM's `EngineClient`.
        vllm: that of this server.
        folder: where statistics may be saved.
        metrics: the gauges; None for none.
    """

    def __init__(
        self, client: Any, vllm: Vllm, folder: StatsFolder, metrics: Metrics | None = None
    ) -> None:
        self.engine, self.vllm, self.folder, self.metrics = Engine(client), vllm, folder, metrics
        self._config = client.model_config
        self._model: ServedModel | None = None
        self._turn = asyncio.Lock()

    async def start(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Starts an observation; see `bodies.START`.

        Raises:
            Refused: groups are named twice, a layer cannot be observed, or see `Engine.call`.
        """
        groups = list(asked["groups"])
        if len(set(groups)) < len(groups):
            twice = next(name for name in groups if groups.count(name) > 1)
            raise Refused(400, f"field 'groups' names {twice!r} twice; name each once")
        async with self._turn:
            model = await self.model()
            for name, why in model.refusals("refusal").items():
                raise Refused(409, f"layer {name}: cannot be observed: {why}")
            try:
                await self.engine.call("reap_start", **{**asked, "groups": groups})
            except Refused:
                # Ranks that observe a step sum its rows: one that does not would let them wait.
                ranks = await self.engine.call("reap_status")
                if len({(rank["mode"], rank["every"], rank["steps"]) for rank in ranks}) > 1:
                    await self.engine.call("reap_stop")
                raise
            return await self._shown()

    async def stop(self) -> dict[str, Any]:
        """Stops the observation; what it has counted stays."""
        return await self._told("reap_stop")

    async def reset(self) -> dict[str, Any]:
        """Sets all counts to zero."""
        return await self._told("reap_reset")

    async def status(self) -> dict[str, Any]:
        """The status of observation and mask."""
        async with self._turn:
            return await self._shown()

    async def stats(self) -> bytes:
        """The statistics so far, as their file."""
        return await asyncio.to_thread(bytes_of, await self._stats())

    async def save(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Saves the statistics so far; see `bodies.SAVE`."""
        name, overwrite = asked["name"], asked["overwrite"]
        self.folder.target(name, overwrite=overwrite)  # before the ranks are asked
        stats = await self._stats()
        async with self._turn:
            path = await asyncio.to_thread(self.folder.save, stats, name, overwrite=overwrite)
        return {"path": str(path)}

    async def plan(self, asked: Mapping[str, Any]) -> str:
        """A plan from the statistics so far; see `bodies.PLAN`."""
        return await asyncio.to_thread(plan_text, await self._stats(), asked)

    async def mask(self) -> dict[str, Any]:
        """The mask in force."""
        async with self._turn:
            model, status = await self._heard()
        removed = masked_of(status, model)
        return {"source": status.get("source") or "", "removed": removed} if removed else _NO_MASK

    async def set_mask(self, content: bytes) -> dict[str, Any]:
        """Masks the experts that a file names, and no others.

        Args:
            content: of the file, see `masks.mask_of`.
        """
        async with self._turn:
            model = await self.model()
        mask = await asyncio.to_thread(mask_of, content, model)
        removed = {name: list(ids) for name, ids in mask.removed.items()}
        return await self._exchanged(removed, mask.source)

    async def clear_mask(self) -> dict[str, Any]:
        """Masks no expert any longer."""
        return await self._exchanged({}, "")

    async def profile(self) -> str:
        """The mask in force as a profile of Reap-It-Yourself.

        Raises:
            Refused: 409; there is none.
        """
        async with self._turn:
            model, status = await self._heard()
        removed = masked_of(status, model)
        if not removed:
            raise Refused(409, "no experts are masked; set a mask (POST /reap/mask) first")
        source = status.get("source") or "a mask"
        return await asyncio.to_thread(profile_of, removed, source, model)

    async def refresh(self) -> None:
        """Brings the gauges up to date."""
        async with self._turn:
            await self._status()

    async def model(self) -> ServedModel:
        """The model that is served; read once, when it is first asked for.

        Raises:
            CheckpointError, UnsupportedModel: the driver does not know it; see `served_model`.
        """
        if self._model is None:
            ranks = await self.engine.call("reap_facts")
            self._model = await asyncio.to_thread(
                served_model,
                str(self._config.model),
                self._config.revision,
                ranks,
                trust_remote_code=bool(self._config.trust_remote_code),
            )
        return self._model

    async def _told(self, method: str) -> dict[str, Any]:
        async with self._turn:
            await self.engine.call(method)
            return await self._shown()

    async def _exchanged(self, removed: dict[str, list[int]], source: str) -> dict[str, Any]:
        async with self._turn:
            await self.engine.exchange_mask(removed, source)
            shown = await self._shown()
        return {
            "mask": shown["mask"],
            "layers": {name: facts["masked"] for name, facts in shown["layers"].items()},
            "in_flight": _IN_FLIGHT,
        }

    async def _status(self) -> dict[str, Any]:
        status = merged_status(await self.engine.call("reap_status"))
        if self.metrics is not None:
            self.metrics.show(status)
        return status

    async def _heard(self) -> tuple[ServedModel, dict[str, Any]]:
        return await self.model(), await self._status()

    async def _shown(self) -> dict[str, Any]:
        model, status = await self._heard()
        return shown_status(status, model, self.vllm)

    async def _stats(self) -> SaliencyStats:
        async with self._turn:
            model, status = await self._heard()
            if status["error"]:
                raise Refused(409, f"the observation has ended itself: {status['error']}")
            ranks = await self.engine.call("reap_statistics")
        return await asyncio.to_thread(live_statistics, ranks, status, model, self.vllm.version)


_NO_MASK: dict[str, Any] = {"removed": {}}
_IN_FLIGHT = (
    "requests in flight go on by the new routing: their keys and values are computed again, the "
    "tokens that they were sent before stay"
)
