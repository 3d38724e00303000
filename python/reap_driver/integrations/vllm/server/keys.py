"""The server's own API keys, which vLLM asks for below `/v1` and a few other paths alone."""

import hashlib
import secrets
from collections.abc import Sequence

from reap_driver.integrations.vllm.server.refusals import Refused


class Keys:
    """The keys that a server takes, as digests.

    Args:
        keys: of `--api-key`, or of the environment variable VLLM_API_KEY; without any, requests
            need none, as for vLLM's own routes.

    Example:
        >>> Keys(["secret"]).check("Bearer secret")
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def check(self, authorization: str | None) -> None:
        """Checks the header `Authorization`, in a time that does not depend on the key.

        Raises:
            Refused: 401; it is missing, of another scheme, or has none of the keys.
        """
        if not self._digests:
            return
        scheme, _, given = (authorization or "").partition(" ")
        found = _digest(given)
        known = [secrets.compare_digest(found, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(known):
            raise Refused(
                401,
                "this server asks for a key (`--api-key` or VLLM_API_KEY); send one of its keys in "
                "the header `Authorization: Bearer KEY`",
            )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
