"""The routes under `/reap`: reads a request, calls the session, answers with JSON or a file."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, cast

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from reap_driver.integrations.vllm.server import bodies
from reap_driver.integrations.vllm.server.bodies import BYTES, JSON, MAX_FILE, MAX_JSON, Body
from reap_driver.integrations.vllm.server.refusals import Refused, envelope, status_of
from reap_driver.integrations.vllm.server.session import Session
from reap_kernels.errors import ReapError
from reap_kernels.files import NO_SPACE

_log = logging.getLogger("vllm.reap")
_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]


class _Answered(APIRoute):
    """A route whose errors are answered with a status and a sentence."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:
        """The handler of the route, within what turns errors into answers."""
        handle = super().get_route_handler()

        async def answered(request: Request) -> Response:
            try:
                return cast("Response", await handle(request))
            except (ReapError, Refused) as error:
                return refusal(status_of(error), str(error))
            except OSError as error:  # of files that are made on the way
                full = error.errno in NO_SPACE
                why = f"a file cannot be written on the server ({error.strerror or error})"
                return refusal(507 if full else 500, f"{why}; see TMPDIR, and try again")
            except ClientDisconnect:
                return refusal(400, "the client went away before its body was complete")
            except Exception:  # noqa: BLE001 - whatever it is, the client gets a sentence
                _log.exception("%s %s failed", request.method, request.url.path)
                return refusal(
                    500, "the plugin reap failed in this request; see the server's log for why"
                )

        return answered


def refusal(status: int, message: str) -> Response:
    """The answer to a request that is refused."""
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(envelope(status, message), status, headers)


async def _authorized(request: Request) -> None:
    """Raises Refused for a request without one of the server's keys."""
    keys = getattr(request.app.state, "reap_keys", None)
    if keys is None:
        raise Refused(503, "the server is starting; try again")
    keys.check(request.headers.get("authorization"))


def _session(request: Request) -> Session:
    """The work on the server's engine.

    Raises:
        Refused: 503; the server has no engine, or none yet.
    """
    session = getattr(request.app.state, "reap", None)
    if session is None:
        raise Refused(503, "the server has no engine yet; try again")
    return cast("Session", session)


async def _content(request: Request, limit: int) -> bytes:
    """The body of a request, of at most `limit` bytes.

    A larger one is read to its end, up to `MAX_FILE`, and dropped: a client that is still sending
    when the connection is closed may never read the answer.

    Raises:
        Refused: 413; it is larger.
    """
    parts, length = [], 0
    async for part in request.stream():
        length += len(part)
        if length > max(limit, MAX_FILE):
            break
        if length <= limit:
            parts.append(part)
        else:
            parts.clear()
    if length > limit:
        raise bodies.too_large(limit)
    return b"".join(parts)


async def _read(request: Request, body: Body) -> dict[str, Any]:
    """The fields of a request; see `Body.read`."""
    return body.read(await _content(request, MAX_JSON), request.headers.get("content-type"))


def _as_json(text: str) -> Response:
    return Response(text, media_type=JSON)


async def _start(request: Request) -> Any:
    return await _session(request).start(await _read(request, bodies.START))


async def _stop(request: Request) -> Any:
    await _read(request, bodies.NOTHING)
    return await _session(request).stop()


async def _reset(request: Request) -> Any:
    await _read(request, bodies.NOTHING)
    return await _session(request).reset()


async def _status(request: Request) -> Any:
    return await _session(request).status()


async def _stats(request: Request) -> Response:
    name = {"Content-Disposition": 'attachment; filename="stats.safetensors"'}
    return Response(await _session(request).stats(), media_type=BYTES, headers=name)


async def _save(request: Request) -> Any:
    return await _session(request).save(await _read(request, bodies.SAVE))


async def _plan(request: Request) -> Response:
    return _as_json(await _session(request).plan(await _read(request, bodies.PLAN)))


async def _mask(request: Request) -> Any:
    return await _session(request).mask()


async def _set_mask(request: Request) -> Any:
    content = await _content(request, MAX_FILE)
    bodies.check_type(request.headers.get("content-type"), JSON, BYTES)
    return await _session(request).set_mask(content)


async def _clear_mask(request: Request) -> Any:
    await _read(request, bodies.NOTHING)
    return await _session(request).clear_mask()


async def _profile(request: Request) -> Response:
    return _as_json(await _session(request).profile())


_ROUTES: dict[tuple[str, str], Callable[[Request], Awaitable[Any]]] = {
    ("POST", "/start"): _start,
    ("POST", "/stop"): _stop,
    ("POST", "/reset"): _reset,
    ("GET", "/status"): _status,
    ("GET", "/stats"): _stats,
    ("POST", "/stats/save"): _save,
    ("POST", "/plan"): _plan,
    ("GET", "/mask"): _mask,
    ("POST", "/mask"): _set_mask,
    ("DELETE", "/mask"): _clear_mask,
    ("GET", "/profile"): _profile,
}


async def _unknown(request: Request) -> Response:
    """Answers what no route is there for."""
    path = "/" + str(request.path_params.get("rest", ""))
    allowed = [method for method, known in _ROUTES if known == path]
    if allowed:
        said = f"{request.method} /reap{path}: send {' or '.join(allowed)}"
        return JSONResponse(envelope(405, said), 405, {"Allow": ", ".join(allowed)})
    known = ", ".join(f"{method} /reap{known}" for method, known in _ROUTES)
    return refusal(404, f"/reap{path}: there is no such route; there are {known}")


def router() -> APIRouter:
    """The routes, each behind the server's keys."""
    made = APIRouter(
        prefix="/reap",
        route_class=_Answered,
        dependencies=[Depends(_authorized)],
        tags=["reap"],
    )
    for (method, path), work in _ROUTES.items():
        summary = f"{method} /reap{path}"
        made.add_api_route(path, work, methods=[method], summary=summary, response_model=None)
    made.add_api_route("/{rest:path}", _unknown, methods=_METHODS, include_in_schema=False)
    return made
