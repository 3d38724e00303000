"""Tokens are counted once in the passes of vLLM's scheduler: chunks, preemption, steps left out."""

from pathlib import Path
from typing import Any

import pytest

from reap_driver.demo.run import MODEL
from reap_driver.integrations.vllm.ranks import merged
from tests.interop.vllm.plugged_in import Engine, Generated, computed
from tests.interop.vllm.traffic import SUMS, compare, observed, prompts

VOCABULARY = 2048


@pytest.fixture(scope="module")
def engine(metadata: Path) -> Engine:
    """Steps of at most 48 tokens, and memory for less than half of the requests of these tests."""
    return Engine(
        MODEL,
        metadata,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_batched_tokens=48,
        block_size=32,
        num_gpu_blocks_override=13,
    )


@pytest.fixture(scope="module")
def run(engine: Engine) -> dict[str, Any]:
    """Six requests whose prompts are chunked and that lose their memory while they generate."""
    engine.call("start", mode="replace")
    requests = engine.generate(prompts(6, 90, vocabulary=VOCABULARY), 40)
    status = engine.call("status")
    return {
        "requests": requests,
        "status": status,
        "statistics": merged(engine.call_all("statistics")),
    }


def test_counts_each_token_once(run: dict[str, Any]) -> None:
    status = run["status"]
    assert status["tokens"] == {"all": computed(run["requests"])}
    assert status["not_counted"]["drafted"] == 0
    assert status["not_counted"]["recomputed"] > 0
    assert status["steps"] == status["observed_steps"] > 40
    assert status["error"] is None


def test_statistics_are_those_of_the_sequences(run: dict[str, Any]) -> None:
    sequences = {"all": [request.computed for request in run["requests"]]}
    assert compare(run["statistics"], observed(MODEL, sequences), ["all"]) < SUMS


def test_requests_computed_again_generate_the_same(engine: Engine, run: dict[str, Any]) -> None:
    engine.call("stop")
    alone: list[Generated] = []
    for request in run["requests"][:2]:
        alone += engine.generate([request.prompt], 40)
    assert alone == run["requests"][:2]
    assert engine.call("status")["tokens"] == run["status"]["tokens"]


def test_no_mark_of_a_request_stays(engine: Engine, run: dict[str, Any]) -> None:
    """The last requests of a run finish in a step without tokens."""
    assert run["status"]["tokens"]
    worker = engine.llm.llm_engine.model_executor.driver_worker.worker
    assert worker._reap_observer.step._slots == {}


def test_every_third_step(engine: Engine) -> None:
    [request] = engine.generate(prompts(1, 40, vocabulary=VOCABULARY, seed=1), 1)
    prompt = len(request.prompt)
    assert prompt <= 48
    engine.call("start", mode="shadow", every=3)
    engine.generate([request.prompt], 8)  # a step of the prompt and seven of a token
    status = engine.call("stop")
    assert (status["steps"], status["observed_steps"]) == (8, 3)
    assert status["tokens"] == {"all": prompt + 2}


def test_groups_of_requests(engine: Engine) -> None:
    from vllm import SamplingParams

    engine.call("start", mode="replace", groups=["code", "chat"])
    core = engine.llm.llm_engine
    once = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    texts = prompts(4, 40, vocabulary=VOCABULARY, seed=2)
    for name, text in zip(("code:1", "chat:1", "code:2", "other:1"), texts, strict=True):
        core.add_request(name, {"prompt_token_ids": text}, once)
    while core.has_unfinished_requests():
        core.step()
    sizes = [len(text) for text in texts]
    groups = {"all": sizes[3], "code": sizes[0] + sizes[2], "chat": sizes[1]}
    assert engine.call("stop")["tokens"] == groups
    live = merged(engine.call_all("statistics"))
    named = {"code": [texts[0], texts[2]], "chat": [texts[1]], "all": [texts[3]]}
    assert compare(live, observed(MODEL, named), named) < SUMS


def test_masked_experts_get_no_rows(engine: Engine) -> None:
    layers = list(engine.call("facts")["layers"])
    removed = {name: [0, 5, 31] for name in layers[1:]}
    assert engine.call("mask", removed=removed, source="a test")["masked"] == removed
    engine.call("start", mode="replace")
    engine.generate(prompts(3, 40, vocabulary=VOCABULARY), 4)
    live = merged(engine.call_all("statistics"))
    for name in layers:
        rows = live.layers[name].count[0, [0, 5, 31]].sum()
        assert (rows == 0) == (name in removed)
    status = engine.call("mask", removed={})
    assert (status["masked"], status["source"]) == ({}, "")
    engine.call("stop")


def test_weights_are_exchanged_without_a_mask(engine: Engine, monkeypatch: Any) -> None:
    layers = list(engine.call("facts")["layers"])
    removed = {layers[1]: [0, 5, 31]}
    engine.call("start", mode="replace")
    engine.generate(prompts(1, 20, vocabulary=VOCABULARY), 2)
    engine.call("mask", removed=removed, source="a test")
    masked = engine.generate(prompts(2, 40, vocabulary=VOCABULARY), 8)
    assert engine.call("status")["masked"] == removed
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    during = []

    def reload() -> None:
        during.append(engine.call_all("status")[0]["masked"])

    monkeypatch.setattr(runner, "reload_weights", reload)
    engine.llm.collective_rpc("reload_weights")
    status = engine.call_all("status")[0]
    assert during == [{}]
    assert (status["masked"], status["source"], status["mode"]) == (removed, "a test", "off")
    assert "exchanged the model's weights (`reload_weights`)" in status["error"]
    assert "start again with `reset`" in engine.refusal("statistics")
    assert engine.generate(prompts(2, 40, vocabulary=VOCABULARY), 8) == masked
    engine.call("reset")
    engine.call("mask", removed={})


def test_refuses_and_goes_on(engine: Engine) -> None:
    first = next(iter(engine.call("facts")["layers"]))
    message = engine.refusal("mask", removed={"layers.9": [1]})
    assert message.startswith("layer layers.9 is none of this model's 4 MoE layers")
    assert "experts are left" in engine.refusal("mask", removed={first: list(range(29))})
    assert "`mode` is 'both'" in engine.refusal("start", mode="both")
    engine.call("reset")
    assert engine.call("status")["masked"] == {}
    [request] = engine.generate(prompts(1, 20, vocabulary=VOCABULARY), 2)
    assert len(request.tokens) == 2


def test_says_where_a_layer_is_not_called(engine: Engine, monkeypatch: Any) -> None:
    worker = engine.llm.llm_engine.model_executor.driver_worker.worker
    layer = list(worker._reap_observer.layers.values())[2]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "calls", lambda: 0)
        engine.call("start", mode="replace")
        engine.generate(prompts(1, 20, vocabulary=VOCABULARY), 2)
    status = engine.call_all("status")[0]
    assert status["mode"] == "off"
    assert status["error"].startswith(f"layer {layer.name} was not called in a step")
    assert "these statistics are wrong" in engine.refusal("statistics")
    assert "start with `reset`" in engine.refusal("start", mode="replace", reset=False)
    assert engine.call("start", mode="replace")["error"] is None
    engine.call("stop")
