"""Compiled, with cached prefixes and drafted tokens: neither is counted."""

from pathlib import Path

import pytest

from reap_driver.demo.run import MODEL
from reap_driver.integrations.vllm.ranks import merged
from tests.interop.vllm.plugged_in import Engine, computed
from tests.interop.vllm.traffic import SUMS, compare, observed, prompts

BLOCK = 32


@pytest.fixture(scope="module")
def engine(metadata: Path) -> Engine:
    """Drafts of up to three tokens, where the last ones occurred before."""
    return Engine(
        MODEL,
        metadata,
        block_size=BLOCK,
        max_num_batched_tokens=256,
        enable_prefix_caching=True,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 2,
            "prompt_lookup_min": 1,
        },
    )


def test_cached_prefixes_and_drafts(engine: Engine) -> None:
    [text] = prompts(1, 60, vocabulary=2048)
    engine.call("start", mode="replace")
    first = engine.generate([text], 1)
    assert engine.call("status")["tokens"] == {"all": len(text)}
    live = merged(engine.call_all("statistics"))
    assert compare(live, observed(MODEL, {"all": [first[0].computed]}), ["all"]) < SUMS
    again = engine.generate([text], 1)
    cached = (len(text) - 1) // BLOCK * BLOCK  # whole blocks, and a token is always computed
    assert again == first
    assert engine.call("status")["tokens"] == {"all": 2 * len(text) - cached}


def test_drafts_do_not_count(engine: Engine) -> None:
    engine.call("stop")
    text = [*prompts(1, 8, vocabulary=2048)[0], *[7, 8, 9] * 12]
    [plain] = engine.generate([text], 40)
    engine.llm.reset_prefix_cache()
    engine.call("start", mode="replace")
    [request] = engine.generate([text], 40)
    status = engine.call("stop")
    assert request == plain
    counted, drafted = status["tokens"]["all"], status["not_counted"]["drafted"]
    assert drafted > 0
    assert status["not_counted"]["recomputed"] == 0
    # Of each step one token is sure: the prompt's in the first, then one.
    assert counted == len(text) + status["steps"] - 1
    # What is missing are drafts that were accepted.
    assert 0 < computed([request]) - counted <= drafted
