"""Requests to a server, and what this project and transformers compute of the same tokens."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reap_driver as rd
from reap_kernels import SaliencyStats
from reap_kernels.stats import EXTREMA
from tests.interop.vllm.server import Server

# Greatest relative difference of a sum over the rows of an expert from what `rd.observe` sums.
SUMS = 1e-5
# Greatest difference of a log-probability, in nats, of one model computed by two engines.
ENGINES = 2e-5
# Between two orders of summation in one engine.
ROUNDING = 1e-5
# Masks and pruning move log-probabilities by more.
MOVED = 1e-2


@dataclass(frozen=True)
class Completion:
    """What a server computed of a request.

    Attributes:
        prompt: ids of its tokens.
        generated: ids of the tokens after it.
        logprobs: float64, of every prompt token but the first and of every generated one.
    """

    prompt: list[int]
    generated: list[int]
    logprobs: Tensor

    @property
    def computed(self) -> list[int]:
        """The tokens that went through the model: the last one generated did not."""
        return [*self.prompt, *self.generated[:-1]]


def prompts(count: int, longest: int, *, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random tokens without special ones; lengths from a quarter of `longest` up to it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, number: int) -> list[int]:
        return torch.randint(low, high, (number,), generator=generator).tolist()

    return [draw(3, vocabulary, size) for size in draw(longest // 4, longest + 1, count)]


def complete(
    server: Server,
    prompt: Sequence[int],
    *,
    tokens: int = 1,
    headers: Mapping[str, str] | None = None,
) -> Completion:
    """A greedy completion of `tokens` tokens, whose prompt is computed whole."""
    body = {
        "model": server.model,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "add_special_tokens": False,
        "logprobs": 1,
        "prompt_logprobs": 0,
        "return_token_ids": True,
    }
    [choice] = server.ask("POST", "/v1/completions", body, headers)["choices"]
    assert choice["prompt_token_ids"] == list(prompt)
    assert len(choice["token_ids"]) == tokens
    entries = zip(choice["prompt_logprobs"][1:], prompt[1:], strict=True)
    logprobs = [entry[str(token)]["logprob"] for entry, token in entries]
    logprobs += choice["logprobs"]["token_logprobs"]
    return Completion(
        list(prompt), choice["token_ids"], torch.tensor(logprobs, dtype=torch.float64)
    )


def complete_all(
    server: Server, texts: Iterable[Sequence[int]], *, tokens: int = 1
) -> list[Completion]:
    """One request after the other."""
    return [complete(server, text, tokens=tokens) for text in texts]


def at_once(server: Server, requests: Sequence[dict[str, Any]]) -> list[Completion]:
    """All of them together; each holds the arguments of `complete`."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: complete(server, **request), requests))


def chat(server: Server, message: str, *, tokens: int) -> Completion:
    """A chat of one message, without log-probabilities."""
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": message}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = server.ask("POST", "/v1/chat/completions", body)
    [choice] = answer["choices"]
    assert len(choice["token_ids"]) == tokens
    return Completion(answer["prompt_token_ids"], choice["token_ids"], torch.empty(0))


def difference(left: Sequence[Completion], right: Sequence[Completion | Tensor]) -> float:
    """The greatest of log-probabilities of the same tokens, in nats."""
    found = 0.0
    for mine, other in zip(left, right, strict=True):
        theirs = other.logprobs if isinstance(other, Completion) else other
        assert mine.logprobs.shape == theirs.shape
        found = max(found, float((mine.logprobs - theirs).abs().max()))
    return found


def same_bits(left: Sequence[Completion], right: Sequence[Completion]) -> bool:
    """Whether tokens and log-probabilities are equal."""
    return all(
        mine.generated == other.generated and torch.equal(mine.logprobs, other.logprobs)
        for mine, other in zip(left, right, strict=True)
    )


def references(model: Path, completions: Iterable[Completion]) -> list[Tensor]:
    """Log-probabilities by transformers of the tokens that `Completion.logprobs` is of."""
    loaded = rd.load_model(model, dtype=torch.float32)
    found = []
    for completion in completions:
        ids = torch.tensor([completion.prompt + completion.generated])
        with torch.no_grad():
            logits = loaded(input_ids=ids, use_cache=False).logits[0, :-1]
        logprobs = logits.double().log_softmax(-1)
        found.append(logprobs.gather(1, ids[0, 1:, None])[:, 0])
    return found


def observed(model: Path, groups: Mapping[str, Iterable[Sequence[int]]]) -> SaliencyStats:
    """What `rd.observe` finds of the sequences of each group, one by one."""
    loaded = rd.load_model(model, dtype=torch.float32)
    with rd.observe(loaded) as observer:
        for name, sequences in groups.items():
            with observer.group(name):
                for sequence in sequences:
                    observer(input_ids=torch.tensor([list(sequence)]))
    return observer.stats


def statistics(server: Server, folder: Path) -> SaliencyStats:
    """The file that the server gives now, read as any other."""
    answer = server.request("GET", "/reap/stats")
    assert answer.status == 200, answer.body[:2000]
    assert answer.headers["content-type"] == "application/octet-stream"
    file = folder / "stats.safetensors"
    file.write_bytes(answer.body)
    return SaliencyStats.load(file)


def compare(live: SaliencyStats, offline: SaliencyStats, groups: Iterable[str]) -> float:
    """Asserts that counts are equal in each of the groups; returns how far the sums are apart.

    Returns:
        The greatest relative difference of a sum of an expert.
    """
    assert list(live.layers) == list(offline.layers)
    found = 0.0
    for group in groups:
        mine, theirs = (stats.groups.index(group) for stats in (live, offline))
        for name, layer in live.layers.items():
            left = {key: value[mine] for key, value in layer.fields().items()}
            right = {key: value[theirs] for key, value in offline.layers[name].fields().items()}
            assert left.keys() == right.keys()
            for key in ("tokens", "count", "nonfinite"):
                assert torch.equal(left.pop(key), right.pop(key)), f"{name} {group}: {key}"
            for key, value in left.items():
                used = right["norm_sum"] != 0
                assert torch.equal(value[~used], right[key][~used]), f"{name} {group}: {key}"
                apart = (value[used] - right[key][used]).abs()
                scale = right[key][used].abs()
                # Extreme elements may be near zero by chance, so all of a layer have one scale.
                apart /= scale.max() if key in EXTREMA else scale
                found = max(found, float(apart.max()))
    return found
