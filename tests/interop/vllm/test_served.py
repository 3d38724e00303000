"""Statistics and masks of a server that compiles its model, as vLLM does unless told otherwise."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reap_driver.demo.run import MODEL
from reap_kernels import SaliencyStats
from tests.interop.vllm import counting
from tests.interop.vllm.checks import START, TOKENS, check_mask, check_statistics
from tests.interop.vllm.server import Server, serve
from tests.interop.vllm.traffic import (
    SUMS,
    Completion,
    at_once,
    chat,
    compare,
    complete,
    complete_all,
    observed,
    prompts,
    same_bits,
    statistics,
)

VOCABULARY = 2048
TEXTS = prompts(6, 60, vocabulary=VOCABULARY)
# Keys and values of this many tokens of a prompt are kept, and not computed again.
BLOCK = 128
SHORT = prompts(8, 40, vocabulary=VOCABULARY, seed=4)
REQUESTS = 200
# Bytes that the allocators of all processes may keep of what was freed.
KEPT = 64 * 2**20


@pytest.fixture(scope="module")
def server(metadata: Path) -> Iterator[Server]:
    """The demo's model, which the engine compiles."""
    flags = ("--enable-prompt-tokens-details", *counting.FLAGS)
    with serve(MODEL, metadata, *flags, environment=counting.ENVIRONMENT) as running:
        yield running


@pytest.fixture(autouse=True)
def _off(server: Server) -> Iterator[None]:
    """A test that fails leaves nothing on for the next."""
    yield
    server.ask("POST", "/reap/stop")
    server.ask("DELETE", "/reap/mask")


@pytest.fixture(scope="module")
def before(server: Server) -> list[Completion]:
    """Completions of `TEXTS` before anything is observed."""
    return complete_all(server, TEXTS, tokens=TOKENS)


@pytest.mark.parametrize("mode", ["replace", "shadow"])
def test_sums_are_those_of_the_same_tokens_offline(
    mode: str, server: Server, before: list[Completion], tmp_path: Path
) -> None:
    check_statistics(server, MODEL, before, mode, tmp_path)


def test_masked_is_the_pruned_checkpoint(
    server: Server, before: list[Completion], tmp_path: Path
) -> None:
    check_statistics(server, MODEL, before, "replace", tmp_path)
    check_mask(server, MODEL, before, tmp_path)


def test_requests_at_once_count_in_their_groups(server: Server, tmp_path: Path) -> None:
    groups = ["code", "chat"]
    server.ask("POST", "/reap/start", START | {"groups": groups})
    requests: list[dict[str, Any]] = []
    for number, text in enumerate(prompts(18, 60, vocabulary=VOCABULARY, seed=1)):
        headers = [
            {"X-Reap-Group": "code"},
            {"X-Request-Id": f"chat:{number}"},
            {"X-Request-Id": f"other:{number}"},
        ][number % 3]
        requests.append({"prompt": text, "tokens": 1 + number % 5, "headers": headers})
    seen = at_once(server, requests)
    status = server.ask("POST", "/reap/stop")
    live = statistics(server, tmp_path)
    computed = {
        name: [completion.computed for completion in seen[place::3]]
        for place, name in enumerate(["code", "chat", "all"])
    }
    assert compare(live, observed(MODEL, computed), computed) < SUMS
    assert {name: status["groups"][name] for name in computed} == {
        name: sum(map(len, sequences)) for name, sequences in computed.items()
    }


def test_chats_count_with_their_template_and_answer(server: Server, tmp_path: Path) -> None:
    server.ask("POST", "/reap/start", START)
    seen = [chat(server, text, tokens=5) for text in ("Where is the key?", "Who came home?")]
    server.ask("POST", "/reap/stop")
    offline = observed(MODEL, {"all": [completion.computed for completion in seen]})
    assert compare(statistics(server, tmp_path), offline, ["all"]) < SUMS


def test_tokens_that_are_cached_do_not_count(server: Server, tmp_path: Path) -> None:
    [text] = prompts(1, 8, vocabulary=VOCABULARY, seed=2)
    text = (text * 100)[: BLOCK + 40]
    body = {"model": server.model, "prompt": text, "max_tokens": 1, "add_special_tokens": False}
    for cached in (0, BLOCK):
        server.ask("POST", "/reap/start", START)
        usage = server.ask("POST", "/v1/completions", body)["usage"]
        status = server.ask("POST", "/reap/stop")
        assert (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0) == cached
        assert status["tokens"] == len(text) - cached


def test_every_second_step_is_observed(server: Server, tmp_path: Path) -> None:
    server.ask("POST", "/reap/start", START | {"mode": "shadow", "every": 2})
    seen = complete(server, TEXTS[0], tokens=9)
    status = server.ask("POST", "/reap/stop")
    live = statistics(server, tmp_path)
    assert (status["steps"], status["observed_steps"]) in {(9, 4), (9, 5)}
    # Steps after the first have one token each.
    assert status["tokens"] in {4, len(seen.prompt) + 4}
    [tokens] = {layer.tokens.sum().item() for layer in live.layers.values()}
    assert tokens == status["tokens"]


def test_statistics_add_up_until_they_are_reset(server: Server, tmp_path: Path) -> None:
    server.ask("POST", "/reap/start", START)
    first = complete(server, TEXTS[0], tokens=2)
    server.ask("POST", "/reap/stop")
    complete(server, TEXTS[1], tokens=2)  # not observed
    server.ask("POST", "/reap/start", START | {"reset": False})
    second = complete(server, TEXTS[2], tokens=2)
    server.ask("POST", "/reap/stop")
    offline = observed(MODEL, {"all": [first.computed, second.computed]})
    assert compare(statistics(server, tmp_path), offline, ["all"]) < SUMS
    assert server.ask("POST", "/reap/reset")["tokens"] == 0


def test_statistics_merge_with_those_observed_offline(server: Server, tmp_path: Path) -> None:
    server.ask("POST", "/reap/start", START)
    seen = [completion.computed for completion in complete_all(server, TEXTS[:2])]
    server.ask("POST", "/reap/stop")
    live = statistics(server, tmp_path)
    more = prompts(2, 60, vocabulary=VOCABULARY, seed=3)
    merged = live.merge(observed(MODEL, {"all": more}))
    assert isinstance(merged, SaliencyStats)
    assert compare(merged, observed(MODEL, {"all": [*seen, *more]}), ["all"]) < SUMS


def test_metrics_show_what_is_observed(server: Server) -> None:
    server.ask("POST", "/reap/start", START | {"groups": ["code"]})
    seen = complete(server, TEXTS[0], tokens=2, headers={"X-Reap-Group": "code"})
    server.ask("POST", "/reap/stop")
    lines = server.request("GET", "/metrics").body.decode().splitlines()
    values = {line.rpartition(" ")[0]: line.rpartition(" ")[2] for line in lines}
    [observed_tokens] = [
        key for key in values if key.startswith('reap_observed_tokens{group="code"')
    ]
    assert float(values[observed_tokens]) == len(seen.computed)
    [masked] = [key for key in values if key.startswith("reap_masked_experts")]
    assert float(values[masked]) == 0


def tensors(server: Server) -> dict[str, int]:
    """What the worker holds."""
    [found] = server.ask("POST", "/collective_rpc", {"method": "count_tensors"})["results"]
    return {name: int(number) for name, number in found.items()}


def memory(server: Server) -> int:
    """Bytes that all processes of the server hold."""
    return sum(counting.resident(process) for process in server.processes())


def test_each_answer_is_of_one_of_the_two_models(server: Server) -> None:
    """Two hundred requests, between which masks and observation change at random."""
    server.ask("POST", "/reap/start", START)
    complete_all(server, SHORT)
    server.ask("POST", "/reap/stop")
    plan = server.ask("POST", "/reap/plan", {"ratio": 0.25})
    whole = complete_all(server, SHORT, tokens=3)
    server.ask("POST", "/reap/mask", plan)
    masked = complete_all(server, SHORT, tokens=3)
    assert not any(same_bits([left], [right]) for left, right in zip(masked, whole, strict=True))
    choose, on, held, used = random.Random(0), True, tensors(server), memory(server)
    expected = {True: masked, False: whole}
    for number in range(REQUESTS):
        if choose.random() < 0.5:
            on = not on
            server.ask(*(("POST", "/reap/mask", plan) if on else ("DELETE", "/reap/mask")))
        if choose.random() < 0.3:
            start = START | {"mode": "shadow", "groups": choose.choice([[], ["code"]])}
            server.ask("POST", "/reap/start", start)
        elif choose.random() < 0.3:
            server.ask("POST", "/reap/stop")
        place = choose.randrange(len(SHORT))
        answer = complete(server, SHORT[place], tokens=3)
        assert same_bits([answer], [expected[on][place]]), f"request {number}, masked: {on}"
    server.ask("POST", "/reap/start", START)
    server.ask("POST", "/reap/stop")
    assert tensors(server) == held
    assert memory(server) < used + KEPT
    assert server.process.poll() is None
