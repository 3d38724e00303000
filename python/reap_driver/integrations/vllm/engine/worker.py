"""Calls that vLLM's workers answer (`collective_rpc`): facts, start, stop, statistics, masks.

A call that raised would leave the answers of other ranks unread, and every later call of the
engine would read those: so a call always answers, a refusal as {"error": {"type", "message"}}.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from vllm.v1.worker.worker_base import WorkerBase

from reap_driver.integrations.vllm.engine.compiled import enter_cache_key
from reap_driver.integrations.vllm.engine.observer import Observer
from reap_kernels.errors import ReapError, UsageError

Answer = dict[str, Any]
_log = logging.getLogger("vllm.reap")
_NAME = "_reap_observer"


def install() -> None:
    """Gives every worker of this process the calls, and hooks to models that it will load.

    Calling it again changes nothing.
    """
    if hasattr(WorkerBase, "reap_facts"):
        return
    for call in (facts, start, stop, reset, status, statistics, mask):
        setattr(WorkerBase, f"reap_{call.__name__}", _answering(call))
    original = WorkerBase.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        enter_cache_key(self.vllm_config)
        self.load_model = functools.partial(_load_model, self, self.load_model)

    WorkerBase.__init__ = __init__


def _load_model(worker: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Hooks go in here: the model is made, and nothing of it is compiled or captured yet."""
    result = original(*args, **kwargs)
    setattr(worker, _NAME, Observer(worker))
    return result


def _answering(call: Callable[..., Answer]) -> Callable[..., Answer]:
    """The call as workers answer it: errors are answers."""

    @functools.wraps(call)
    def answer(worker: Any, *args: Any, **kwargs: Any) -> Answer:
        try:
            observer = getattr(worker, _NAME, None)
            if observer is None:
                raise UsageError("the model is not loaded yet; call again when the server is up")
            with torch.inference_mode():
                return call(observer, *args, **kwargs)
        except ReapError as error:
            return {"error": {"type": type(error).__name__, "message": str(error)}}
        except Exception as error:  # noqa: BLE001  a bug here, which must not end the engine
            _log.exception("reap-kernels: the call %s failed", call.__name__)
            return {"error": {"type": type(error).__name__, "message": repr(error)}}

    return answer


def facts(observer: Observer) -> Answer:
    """Where the worker is, and what its MoE layers are."""
    return observer.facts()


def start(
    observer: Observer,
    mode: str,
    every: int = 1,
    groups: Sequence[str] = (),
    reset: bool = True,
) -> Answer:
    """Observes from the next step on."""
    observer.start(mode, every, groups, reset)
    return observer.status()


def stop(observer: Observer) -> Answer:
    """Observes no further step."""
    observer.stop()
    return observer.status()


def reset(observer: Observer) -> Answer:
    """Forgets statistics, and an error with them."""
    observer.reset()
    return observer.status()


def status(observer: Observer) -> Answer:
    """What runs, and what was counted."""
    return observer.status()


def statistics(observer: Observer) -> Answer:
    """This rank's statistics, as the bytes of a file."""
    return observer.statistics()


def mask(observer: Observer, removed: Mapping[str, Sequence[int]], source: str = "") -> Answer:
    """Masks exactly these experts of each layer, by vLLM's names of layers."""
    observer.mask(removed, source)
    return observer.status()
