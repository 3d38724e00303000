"""Two ranks of tensor parallelism count the same, and answer one call after the other."""

from pathlib import Path

import pytest

from reap_driver.demo.run import MODEL
from reap_driver.integrations.vllm.ranks import merged
from tests.interop.vllm.plugged_in import Engine, computed
from tests.interop.vllm.traffic import SUMS, compare, observed, prompts


@pytest.fixture(scope="module")
def engine(metadata: Path) -> Engine:
    """Steps of at most 64 tokens, and too little memory for all requests at once."""
    with pytest.MonkeyPatch.context() as patch:  # workers are processes, which look for the plugin
        patch.setenv("PYTHONPATH", str(metadata), prepend=":")
        return Engine(
            MODEL,
            metadata,
            enforce_eager=True,
            tensor_parallel_size=2,
            enable_prefix_caching=False,
            max_num_batched_tokens=64,
            block_size=32,
            num_gpu_blocks_override=13,
        )


def test_ranks_count_the_same(engine: Engine) -> None:
    engine.call("start", mode="replace")
    requests = engine.generate(prompts(4, 90, vocabulary=2048), 30)
    first, second = engine.call_all("status")
    assert first == second
    assert first["tokens"] == {"all": computed(requests)}
    assert first["not_counted"]["recomputed"] > 0
    answers = engine.call_all("statistics")
    assert [bool(answer["file"]) for answer in answers] == [True, False]
    sequences = {"all": [request.computed for request in requests]}
    assert compare(merged(answers), observed(MODEL, sequences), ["all"]) < SUMS


def test_a_refusal_leaves_no_answer_unread(engine: Engine) -> None:
    before = engine.generate(prompts(2, 30, vocabulary=2048), 4)
    assert engine.refusal("mask", removed={"layers.9": [1]}).startswith("layer layers.9 is none")
    assert engine.generate(prompts(2, 30, vocabulary=2048), 4) == before
    layer = next(iter(engine.call("facts")["layers"]))
    assert engine.call("mask", removed={layer: [1, 2]})["masked"] == {layer: [1, 2]}
    assert [answer["masked"] for answer in engine.call_all("status")] == [{layer: [1, 2]}] * 2
