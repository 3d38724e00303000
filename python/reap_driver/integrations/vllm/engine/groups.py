"""The group of a request, which its id names before the first colon."""

import re
from collections.abc import Sequence

ALL = "all"  # the group of requests that name none, always the first
# What vLLM puts before the id that a client gave: which of several samples, and the kind of call.
_SAMPLE = re.compile(r"\d+_")
_CALL = re.compile(
    r"(cmpl|chatcmpl|generate-tokens|resp|embd|pooling|classify|score|decision"
    r"|generative-scoring|transcribe|translate|vllm-batch|rt)[-_]"
)


def named(names: Sequence[str]) -> list[str]:
    """The groups of statistics for these names: "all" first, then each other name once.

    Example:
        >>> named(["code", "chat", "code"])
        ['all', 'code', 'chat']
    """
    return list(dict.fromkeys([ALL, *names]))


def group_of(request_id: str, groups: Sequence[str]) -> int:
    """The index of a request's group; 0, "all", where its id names none of them.

    Args:
        request_id: as vLLM's engine has it: `code:17` became `cmpl-code:17-0-1a2b3c4d`, and
            `1_cmpl-code:17-0-1a2b3c4d` for the second of several samples.
        groups: as `named` makes them.

    Example:
        >>> group_of("chatcmpl-code:17-1a2b3c4d", ["all", "code"])
        1
        >>> group_of("chatcmpl-other:17-1a2b3c4d", ["all", "code"])
        0
    """
    name, colon, _ = request_id.partition(":")
    if not colon:
        return 0
    for prefix in (_SAMPLE, _CALL):
        if name in groups:
            break
        name = prefix.sub("", name, count=1) if prefix.match(name) else name
    return groups.index(name) if name in groups else 0
