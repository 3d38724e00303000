"""Readers of requests to the routes of the vLLM plugin: bodies, files of masks, headers."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

from reap_driver.integrations.vllm.server import bodies
from reap_driver.integrations.vllm.server.groups import GroupMiddleware
from reap_driver.integrations.vllm.server.masks import mask_of, profile_of
from reap_driver.integrations.vllm.server.plans import plan_text
from reap_driver.integrations.vllm.server.refusals import Refused, status_of
from reap_driver.integrations.vllm.server.saving import StatsFolder
from reap_driver.integrations.vllm.server.served_model import ServedModel, served_model
from reap_driver.planning.plan import Plan
from reap_kernels import SaliencyStats
from reap_kernels.errors import DataError, ReapError
from tests.fuzz.campaign import Nonsense, Reader
from tests.fuzz.changes import container, json_value, raw_bytes
from tests.fuzz.inputs import unsealed
from tests.fuzz.world import World


def requests(world: World) -> Iterable[Reader]:
    """Everything that a client sends."""
    for reader in _readers(world):
        yield replace(reader, read=_answered(reader.read))


def _answered(read: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """The same reader, whose refusals must be of the request: a client is told that it is wrong,
    never that the server is.
    """

    def answered(content: bytes) -> None:
        try:
            read(content)
        except (ReapError, Refused) as error:
            if status_of(error) not in range(400, 500):
                raise Nonsense(f"the answer has status {status_of(error)}: {error}") from error
            raise DataError(str(error)) from error

    return answered


def _readers(world: World) -> Iterator[Reader]:
    model = _served(world)
    start = b'{"mode": "shadow", "every": 8, "groups": ["code", "a.b-c"], "reset": false}'
    yield Reader("POST /reap/start", [start, b"{}"], json_value, _start)
    save = b'{"name": "code.safetensors", "overwrite": true}'
    yield Reader("POST /reap/stats/save", [save], json_value, partial(_save, world), 2)
    plan = (
        b'{"ratio": 0.5, "criterion": "S(0,1,1)", "weights": {"data": 2.0}, "protect": '
        b'{"0": [1, 2]}, "layer_ratios": {"1": 0.25}, "skip_first": 0}',
        b'{"keep": 4, "criterion": "reap"}',
        b'{"ratio": 0.25, "allocation": "global", "normalize": "max", "skip_last": 1}',
    )
    yield Reader("POST /reap/plan", plan, json_value, partial(_plan, world), 3)
    profile = b'{"version": 1, "model": "m", "pruned_experts": [[0, 1], [1, 7]]}'
    later = b'{"version": 2, "routing_mode": "pre_topk_mask", "pruned_experts": [[0, 1]]}'
    bodies_ = [world.plan.read_bytes(), profile, later]
    yield Reader("POST /reap/mask", bodies_, json_value, partial(_mask, model), 3)
    masks = unsealed(partial(_mask, model))
    yield Reader("POST /reap/mask, masks", [world.masks.read_bytes()], container, masks, 2)
    yield Reader("X-Reap-Group", [b"code", b"a.b-c_1"], _header, _group)


def _served(world: World) -> ServedModel:
    """The model, as vLLM's workers would describe it."""
    plan = Plan.load(world.plan)
    facts = {name: {"num_experts": layer.num_experts} for name, layer in plan.layers.items()}
    return served_model(str(world.model), None, [{"layers": facts}])


def _read(body: bodies.Body, content: bytes) -> dict[str, Any]:
    return body.read(content, bodies.JSON)


def _start(content: bytes) -> None:
    asked = _read(bodies.START, content)
    if asked["every"] < 1 or not all(":" not in group for group in asked["groups"]):
        raise Nonsense(f"an observation that cannot be: {asked}")


def _save(world: World, content: bytes) -> None:
    asked = _read(bodies.SAVE, content)
    folder = world.folder / "saved"
    folder.mkdir(exist_ok=True)
    target = StatsFolder(str(folder)).target(asked["name"], overwrite=asked["overwrite"])
    if target.parent != folder.resolve():
        raise Nonsense(f"{target} is outside the folder")


def _plan(world: World, content: bytes) -> None:
    asked = _read(bodies.PLAN, content)
    text = plan_text(SaliencyStats.load(world.stats), asked)
    if not any(layer.removed for layer in Plan.parse(text.encode(), "x").layers.values()):
        raise Nonsense("a plan that removes nothing")


def _mask(model: ServedModel, content: bytes) -> None:
    mask, ours = mask_of(content, model), model.ours
    removed = {ours[name]: ids for name, ids in mask.removed.items()}
    for layer in model.layers:
        left = set(range(layer.num_experts)) - set(removed.get(layer.name, ()))
        if len(left) < layer.top_k:
            raise Nonsense(f"{layer.name} is left with {len(left)} experts")
    again = mask_of(profile_of(removed, mask.source, model).encode(), model)
    if again.removed != mask.removed:
        raise Nonsense("an exported mask is another one")


def _header(content: bytes, rng: Random) -> bytes:
    return raw_bytes(content, rng).replace(b"\0", b"")


def _group(content: bytes) -> None:
    came: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        came.append(dict(scope["headers"])[b"x-request-id"])

    async def send(message: Any) -> None:
        if message.get("status", 400) != 400:
            raise Nonsense(f"a header is answered with {message['status']}")

    async def receive() -> Any:
        raise Nonsense("the body is read for a header")

    headers = [(b"x-reap-group", content), (b"x-request-id", b"r:1")]
    asyncio.run(GroupMiddleware(app)({"type": "http", "headers": headers}, receive, send))
    if not came:
        raise DataError("refused")
    if came[0].count(b":") != 2:
        raise Nonsense(f"the id {came[0]!r} has another group than the header")
