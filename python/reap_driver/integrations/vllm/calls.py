"""One HTTP call of a server: the address, the API key, limits of time and size, errors as ours."""

import contextlib
import http.client
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import IO, Any

from reap_kernels.documents import parse_json
from reap_kernels.errors import BackendUnavailable, DataError, ReapError, UsageError
from reap_kernels.schema import Kind, Mismatch, check, short

KEY_VARIABLE = "VLLM_API_KEY"  # which `vllm serve` reads, too
MAX_JSON, MAX_FILE = 100_000_000, 2_000_000_000  # bytes of an answer
_CHUNK = 1 << 16
_LONGEST = 2_000  # characters of a server's sentence
_LOADED = "start the server with `VLLM_PLUGINS=reap vllm serve MODEL`"
_INVALID = (400, 413, 415, 422)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves redirects to the caller: urllib would send the API key to wherever they lead."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Calls:
    """Calls of one server.

    Args:
        url: of the server, such as http://127.0.0.1:8000; `/v1` at its end is left out.
        api_key: sent as a bearer token; None sends none.
        timeout: seconds that one call may take.

    Raises:
        UsageError: the URL, the key or the timeout is none.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        if not timeout > 0:
            raise UsageError(f"timeout is {timeout}; give seconds above 0")
        if api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", api_key):
            raise UsageError(
                "the API key is empty, or has spaces or characters that are not ASCII, which no "
                f"header can hold; check the variable {KEY_VARIABLE}"
            )
        self.url, self._key, self._timeout = _base(url), api_key, timeout
        self._opener = urllib.request.build_opener(_NoRedirects)

    def json(
        self,
        method: str,
        path: str,
        kind: Kind,
        body: Any = None,
        invalid: type[ReapError] = UsageError,
    ) -> dict[str, Any]:
        """The checked JSON that a call is answered with.

        Args:
            method: of HTTP.
            path: of the route, such as "status".
            kind: what the answer must be.
            body: bytes, or a value that is sent as JSON; None sends none.
            invalid: raised where the server says that the input is not valid.

        Raises:
            ReapError: see `content`; or the answer is something else.
        """
        content = self.content(method, path, body, invalid)
        try:
            found = parse_json(content)
            check(found, kind)
        except Mismatch as error:
            raise DataError(
                f"{self.url}/reap/{path}: the answer's {error}; use the same version of "
                "reap-kernels here and in the server"
            ) from error
        except ValueError as error:
            raise self._no_plugin(path, f"the answer {error}") from error
        answer: dict[str, Any] = found
        return answer

    def content(
        self,
        method: str,
        path: str,
        body: Any = None,
        invalid: type[ReapError] = UsageError,
        limit: int = MAX_JSON,
    ) -> bytes:
        """What a call is answered with; arguments as for `json`.

        Raises:
            BackendUnavailable: nothing answers there, the plugin is not loaded there, the server
                refuses the request as one it cannot serve, or it failed.
            UsageError: the API key is missing or another one.
            DataError: the answer is larger than `limit` bytes.
            ReapError: of the class `invalid`: the server refuses the input, with its sentence.
        """
        request = self._request(method, path, body)
        deadline = time.monotonic() + self._timeout
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                return self._read(response, path, limit, deadline)
        except urllib.error.HTTPError as error:
            with error:
                said = _sentence(error)
            raise self._refusal(error, path, said, invalid) from error
        except urllib.error.URLError as error:
            reason = error.reason
            raise self._silent(reason if isinstance(reason, Exception) else error) from error
        except (OSError, http.client.HTTPException) as error:
            raise self._silent(error) from error

    def _request(self, method: str, path: str, body: Any) -> urllib.request.Request:
        """The request of a call."""
        headers = {"Accept": "*/*"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        if body is not None:
            # A safetensors file begins with a length of eight bytes, not all of which are used.
            binary = isinstance(body, bytes) and b"\0" in body[:8]
            headers["Content-Type"] = "application/octet-stream" if binary else "application/json"
            body = body if isinstance(body, bytes) else json.dumps(body, allow_nan=False).encode()
        return urllib.request.Request(
            f"{self.url}/reap/{path}", data=body, headers=headers, method=method
        )

    def _read(self, response: Any, path: str, limit: int, deadline: float) -> bytes:
        """All that is answered, within the limits."""
        parts, size = [], 0
        while part := response.read1(_CHUNK):
            size += len(part)
            if size > limit:
                raise DataError(
                    f"{self.url}/reap/{path}: the answer is larger than {limit} bytes; this is no "
                    "answer of reap-kernels"
                )
            if time.monotonic() > deadline:
                raise TimeoutError(f"{size} bytes had arrived")
            parts.append(part)
        wanted = response.headers.get("Content-Length", "")
        if wanted.isdecimal() and size < int(wanted):
            raise ConnectionResetError(f"it ended after {size} of {wanted} bytes")
        return b"".join(parts)

    def _refusal(
        self, error: urllib.error.HTTPError, path: str, said: str, invalid: type[ReapError]
    ) -> ReapError:
        """The error that a status is."""
        code, ours = error.code, f"{self.url}: {said}"
        if code in (401, 403):
            which = "does not take the API key it was given" if self._key else "asks for an API key"
            return UsageError(
                f"{self.url}: the server {which}; set {KEY_VARIABLE} to the key that it was "
                "started with"
            )
        if 300 <= code < 400:
            return UsageError(
                f"{self.url}: the server sends callers to {error.headers.get('Location')!r}; give "
                "that server's URL"
            )
        if code in (404, 405) and (path == "status" or said in ("", "Not Found")):
            return self._no_plugin(path, f"the server answers {code}")
        if code == 404:
            return DataError(ours)
        if code in _INVALID and said:
            return invalid(ours)
        if code in (409, 503) and said:
            return BackendUnavailable(ours)
        shown = f"answers {code}{f': {said}' if said else ''}"
        return BackendUnavailable(f"{self.url}/reap/{path}: {shown}; see the log of the server")

    def _no_plugin(self, path: str, why: str) -> BackendUnavailable:
        return BackendUnavailable(
            f"{self.url}/reap/{path}: {why}, so no server with the plugin of reap-kernels is "
            f"there; check the URL, and {_LOADED}"
        )

    def _silent(self, error: Exception) -> BackendUnavailable:
        """The error where a connection fails."""
        if isinstance(error, TimeoutError):
            return BackendUnavailable(
                f"{self.url}: no answer within {self._timeout:g} seconds; the server may still be "
                "busy with a request: try again, or give a longer `timeout`"
            )
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return BackendUnavailable(
            f"{self.url}: cannot be reached ({why[:200]}); check the URL, and {_LOADED}"
        )


def _base(url: str) -> str:
    """A server's URL, without what is behind its path.

    Raises:
        UsageError: it is none.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        valid = False
    if re.match(r"[^/]*//[^/]*@", url):
        raise UsageError(
            "the URL has a user's name or password before its host; leave them out: the server "
            f"asks for its API key alone, see the variable {KEY_VARIABLE}"
        )
    odd = re.search(r"[^\x21-\x7e]", url) or (valid and (parts.query or parts.fragment))
    if not valid or odd:
        raise UsageError(
            f"the URL is {short(url, 200)}; give scheme, host and port of the server, such as "
            "http://127.0.0.1:8000"
        )
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path.rstrip('/')}"


def _sentence(error: IO[bytes]) -> str:
    """What an error's body says, which is `{"error": {"message": ...}}`; empty where it says
    nothing that can be read.
    """
    found: Any = None
    with contextlib.suppress(ValueError, OSError, http.client.HTTPException):
        found = parse_json(error.read(_CHUNK), plain=False)
    for name in ("error", "message"):
        found = found.get(name) if isinstance(found, dict) else found
    return found.strip()[:_LONGEST] if isinstance(found, str) else ""
