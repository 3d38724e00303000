"""Calls by which vLLM exchanges a worker's weights while the server lives.

A mask is also in the selection bias of a router that has one, which is a weight: exchanged under a
mask, it would lose it, and clearing the mask would bring the old one back. So masks are taken out
before weights change and set again after.
"""

import functools
from collections.abc import Callable
from typing import Any

# Calls that begin a change of weights, and calls after which weights are whole, each with whether
# it is so with the arguments that it is given. Tests play the changes: on a CPU `sleep` does
# nothing, and `reload_weights` of vLLM 0.32 fails where its kernel pads experts.
_BEGINS: dict[str, Callable[..., bool]] = {
    "sleep": lambda level=1: level > 1,
    "reload_weights": lambda *_, **__: True,
    "start_weight_update": lambda: True,
}
_ENDS: dict[str, Callable[..., bool]] = {
    "wake_up": lambda tags=None: tags is None or "weights" in tags,
    "reload_weights": lambda *_, **__: True,
    "finish_weight_update": lambda: True,
}
_CALLS = dict.fromkeys((*_BEGINS, "update_weights", *_ENDS))


def watch(worker: Any, before: Callable[[str], None], after: Callable[[], None]) -> None:
    """Calls back around the calls of `worker` that change its weights.

    Args:
        worker: whose methods are wrapped, those that it has.
        before: called with the name of the call that begins a change.
        after: called when weights are whole, or the change has failed; perhaps more than once.
    """
    for name in _CALLS:
        original = getattr(worker, name, None)
        if original is not None:
            setattr(worker, name, _watched(name, original, before, after))


def _watched(
    name: str,
    original: Callable[..., Any],
    before: Callable[[str], None],
    after: Callable[[], None],
) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if name in _BEGINS and _BEGINS[name](*args, **kwargs):
            before(name)
        try:
            result = original(*args, **kwargs)
        except BaseException:
            if name != "wake_up":  # after which weights may have no memory yet
                after()
            raise
        if name in _ENDS and _ENDS[name](*args, **kwargs):
            after()
        return result

    return call
