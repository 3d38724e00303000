"""Calls that change a worker's weights, played by an object with the names of vLLM's."""

from types import SimpleNamespace
from typing import Any

import pytest

from reap_driver.integrations.vllm.engine.weights import watch


class Worker:
    """Says what it is called for, and fails where it is told to."""

    def __init__(self, fails: str = "") -> None:
        self.seen: list[str] = []
        self.fails = fails

    def _call(self, name: str) -> str:
        self.seen.append(name)
        if name == self.fails:
            raise RuntimeError("of the test")
        return name

    def sleep(self, level: int = 1) -> str:
        return self._call("sleep")

    def wake_up(self, tags: list[str] | None = None) -> str:
        return self._call("wake_up")

    def reload_weights(self, *args: Any, **kwargs: Any) -> str:
        return self._call("reload_weights")

    def start_weight_update(self) -> str:
        return self._call("start_weight_update")

    def update_weights(self, update_info: object) -> str:
        return self._call("update_weights")

    def finish_weight_update(self) -> str:
        return self._call("finish_weight_update")


def watched(fails: str = "") -> Worker:
    made = Worker(fails)
    watch(made, lambda call: made.seen.append(f"before {call}"), lambda: made.seen.append("after"))
    return made


def test_weights_that_are_reloaded() -> None:
    worker = watched()
    assert worker.reload_weights(weights_path="elsewhere") == "reload_weights"
    assert worker.seen == ["before reload_weights", "reload_weights", "after"]


def test_weights_that_a_trainer_sends() -> None:
    worker = watched()
    worker.start_weight_update()
    worker.update_weights([])
    worker.update_weights([])
    worker.finish_weight_update()
    begin, *chunks, end = "start_weight_update", "update_weights", "update_weights", "after"
    assert worker.seen == [f"before {begin}", begin, *chunks, "finish_weight_update", end]


def test_sleep_that_keeps_weights_changes_none() -> None:
    worker = watched()
    worker.sleep()
    worker.wake_up(tags=["kv_cache"])
    assert worker.seen == ["sleep", "wake_up"]


def test_sleep_that_forgets_weights() -> None:
    worker = watched()
    worker.sleep(level=2)
    worker.wake_up(tags=["weights"])
    assert worker.seen == ["before sleep", "sleep", "wake_up", "after"]


@pytest.mark.parametrize("call", ["reload_weights", "start_weight_update", "finish_weight_update"])
def test_a_change_that_fails_is_over(call: str) -> None:
    worker = watched(call)
    with pytest.raises(RuntimeError, match="of the test"):
        getattr(worker, call)()
    assert worker.seen[-2:] == [call, "after"]


def test_a_worker_without_such_calls() -> None:
    worker = SimpleNamespace()
    watch(worker, print, print)
    assert vars(worker) == {}
