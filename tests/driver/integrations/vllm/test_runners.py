"""Passes of vLLM's two model runners, played by objects with the attributes that are used."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reap_driver.integrations.vllm.engine import parallel
from reap_driver.integrations.vllm.engine.runners import Passes, without_graphs
from reap_driver.integrations.vllm.engine.step import Batch
from reap_kernels.errors import UnsupportedModel


class Mode(enum.Enum):
    NONE = 0
    FULL = 2


@dataclass(frozen=True)
class Described:
    """What V1 pads a batch to."""

    num_tokens: int
    num_reqs: int | None = None


@dataclass(frozen=True)
class Execution:
    """The same of V2."""

    cg_mode: Mode
    num_tokens: int
    num_reqs: int | None
    uniform_token_count: int | None = None
    max_query_len: int | None = None
    num_active_loras: int = 0


class Dispatcher:
    """V1: pads to 8 tokens."""

    def dispatch(self, num_tokens: int, uniform_decode: bool = False) -> tuple[Mode, Described]:
        return Mode.FULL, Described(8, num_tokens)


class Manager:
    """V2: pads to 8 tokens and 8 requests."""

    def dispatch(
        self, num_reqs: int, num_tokens: int, uniform: int | None, num_active_loras: int
    ) -> Execution:
        return Execution(Mode.FULL, 8, 8, uniform, 1, num_active_loras)


def scheduled(
    tokens: dict[str, int], drafts: dict[str, list[int]] | None = None, finished: object = ()
) -> Any:
    """A scheduler's output."""
    return SimpleNamespace(
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        scheduled_spec_decode_tokens=drafts or {},
        finished_req_ids=set(finished),  # type: ignore[call-overload]
    )


class RunnerV1:
    """Its input batch orders requests, and has places left of others."""

    def __init__(self) -> None:
        self.cudagraph_dispatcher = Dispatcher()
        self.positions = torch.arange(16)
        self.input_batch = SimpleNamespace(num_reqs=0, req_ids=[])
        self.ran: list[Any] = []

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> str:
        self.input_batch.req_ids = [*reversed(scheduler_output.num_scheduled_tokens), "old"]
        self.input_batch.num_reqs = len(scheduler_output.num_scheduled_tokens)
        return "prepared"

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> str:
        if scheduler_output.total_num_scheduled_tokens:
            assert self._prepare_inputs(scheduler_output, None) == "prepared"
            self.ran.append(self.cudagraph_dispatcher.dispatch(num_tokens=3))
        return "output"


class RunnerV2:
    """Chooses a graph before it prepares inputs, and runs dummies in the same method."""

    def __init__(self) -> None:
        self.cudagraph_manager = Manager()
        self.ran: list[Any] = []

    def prepare_inputs(self, scheduler_output: Any, batch_req_state: Any) -> Any:
        requests = sorted(scheduler_output.num_scheduled_tokens)
        return SimpleNamespace(req_ids=requests, positions=torch.arange(16))

    def execute_model(self, scheduler_output: Any, dummy_run: bool = False) -> str:
        if scheduler_output.total_num_scheduled_tokens:
            self.ran.append(self.cudagraph_manager.dispatch(2, 3, None, num_active_loras=1))
            if not dummy_run:
                assert self.prepare_inputs(scheduler_output, None).req_ids
        return "output"


@dataclass
class Calls:
    """What a runner's passes called, in order."""

    eager: bool = True
    seen: list[Any] = field(default_factory=list)

    def hook(self, runner: Any) -> None:
        Passes(
            runner,
            lambda requests: self.seen.append(("finished", requests)),
            lambda: self.seen.append("enter"),
            lambda batch: self.seen.append(batch()),
            lambda: self.seen.append("leave"),
            lambda: self.eager,
        ).install()


RUNNERS: list[Callable[[], Any]] = [RunnerV1, RunnerV2]


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_pass_of_requests(runner: Callable[[], Any]) -> None:
    made, calls = runner(), Calls()
    calls.hook(made)
    assert made.execute_model(scheduled({"a": 4, "b": 1}, {"a": [7, 8, 9]}, {"c"})) == "output"
    finished, entered, batch, left = calls.seen
    assert (finished, entered, left) == (("finished", {"c"}), "enter", "leave")
    assert isinstance(batch, Batch)
    order = ["b", "a"] if runner is RunnerV1 else ["a", "b"]
    tokens, drafted = {"a": 4, "b": 1}, {"a": 3, "b": 0}
    assert list(batch.requests) == order
    assert list(batch.tokens) == [tokens[name] for name in order]
    assert list(batch.drafted) == [drafted[name] for name in order]
    assert batch.positions[:5].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_step_without_tokens_only_finishes_requests(runner: Callable[[], Any]) -> None:
    made, calls = runner(), Calls()
    calls.hook(made)
    last = scheduled({}, finished={"a"})
    assert made.execute_model(scheduler_output=last) == "output"
    assert calls.seen == [("finished", {"a"})]


def test_a_dummy_run_is_no_pass() -> None:
    made, calls = RunnerV2(), Calls()
    calls.hook(made)
    made.execute_model(scheduled({"_dummy_req_0": 3}), dummy_run=True)
    assert calls.seen == []
    assert made.ran[0].cg_mode == Mode.FULL


def test_an_observed_pass_replays_no_graph() -> None:
    first, second, calls = RunnerV1(), RunnerV2(), Calls()
    for runner in (first, second):
        calls.hook(runner)
        for eager in (True, False):
            calls.eager = eager
            runner.execute_model(scheduled({"a": 3}))
    assert first.ran == [(Mode.NONE, Described(3)), (Mode.FULL, Described(8, 3))]
    assert second.ran == [
        Execution(Mode.NONE, 3, 2, None, None, 1),
        Execution(Mode.FULL, 8, 8, None, 1, 1),
    ]
    assert "dispatch" not in vars(first.cudagraph_dispatcher)
    assert "dispatch" not in vars(second.cudagraph_manager)


def test_a_pass_that_fails_is_left() -> None:
    runner, calls = RunnerV1(), Calls()
    runner.positions = None  # type: ignore[assignment]
    runner.cudagraph_dispatcher.dispatch = None  # type: ignore[assignment, method-assign]
    calls.eager = False
    calls.hook(runner)
    with pytest.raises(TypeError):
        runner.execute_model(scheduled({"a": 3}))
    assert calls.seen[-1] == "leave"


def test_without_graphs_before_there_are_any() -> None:
    runner = SimpleNamespace(cudagraph_manager=None)
    with without_graphs(runner):
        assert runner.cudagraph_manager is None


def test_refuses_an_unknown_runner() -> None:
    runner = SimpleNamespace(execute_model=print)
    with pytest.raises(UnsupportedModel, match="SimpleNamespace has neither `prepare_inputs` nor"):
        Calls().hook(runner)
    assert runner.execute_model is print


def worker(path: str = "", value: object = None) -> Any:
    """A worker of one process without special features, but for one."""
    made = SimpleNamespace(
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, enable_elastic_ep=False),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        model_runner=SimpleNamespace(adaptive_verification=None, model_state=SimpleNamespace()),
        kv_transfer_config=None,
    )
    place: Any = made
    *parents, name = path.split(".")
    for parent in parents:
        place = getattr(place, parent)
    if name:
        setattr(place, name, value)
    return made


def test_plain_engines_are_observed_and_masked() -> None:
    assert parallel.observation_refusal(worker()) is None
    assert parallel.mask_refusal(worker()) is None


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("parallel_config.decode_context_parallel_size", 2, "`--decode-context-parallel-size`"),
        ("parallel_config.enable_elastic_ep", True, "`--enable-elastic-ep`"),
        ("cache_config.kv_sharing_fast_prefill", True, "`--kv-sharing-fast-prefill`"),
        ("model_runner.adaptive_verification", object(), "adaptive verification decides"),
        ("model_runner.model_state.num_new_sampled_tokens_per_step", 0, "several times"),
    ],
)
def test_engines_that_cannot_be_observed(path: str, value: object, reason: str) -> None:
    assert reason in str(parallel.observation_refusal(worker(path, value)))


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("kv_transfer_config", object(), "`--kv-transfer-config`"),
        ("parallel_config.enable_elastic_ep", True, "`--enable-elastic-ep`"),
    ],
)
def test_engines_that_cannot_be_masked(path: str, value: object, reason: str) -> None:
    assert reason in str(parallel.mask_refusal(worker(path, value)))
