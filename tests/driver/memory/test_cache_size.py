"""The key-value cache: bytes as the library's own cache has them, over every small model."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from reap_driver.compat.text_model import text_model
from reap_driver.memory.cache_size import CacheSize, cache_size
from reap_driver.model.discover import find_moe_layers
from tests.driver import zoo
from tests.driver.observation.test_architectures import NAMES

SHORT, LONG = 40, 100  # tokens, less and more than the windows of the small models
# Sparse latent attention, for which older library versions cache expanded keys and values:
# (layers with a latent of 12 values and a rotary key of 8, indexers with a key of 16).
BY_HAND = {"deepseek_v32": (3, 3), "glm_moe_dsa": (3, 3), "axk2": (3, 3), "hy_v4": (3, 2)}
# The library keeps one state for two convolutions in a row, and a further vector of 8 values, in
# each of two layers.
BESIDES = {"zaya": 2 * (8 - 96)}


def tensors(found: Any) -> Iterator[torch.Tensor]:
    """Every tensor of values in an object of the library; not those of positions."""
    if torch.is_tensor(found):
        yield from [found] if found.is_floating_point() else []
    elif isinstance(found, dict | list | tuple):
        for value in found.values() if isinstance(found, dict) else found:
            yield from tensors(value)
    elif type(found).__module__.startswith("transformers.cache"):
        yield from tensors(vars(found))


def cached_bytes(model: torch.nn.Module, tokens: int) -> int:
    """Bytes of the library's cache after a forward."""
    ids = torch.arange(tokens)[None] % 90 + 3
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).get("past_key_values")
    if cache is None:  # of a model that reads in both directions
        return 0
    states = getattr(cache, "linear_cache", [])  # MiniMax keeps its states beside the layers
    return sum(t.nbytes for t in tensors([cache.layers, states]))


def predicted(name: str) -> tuple[CacheSize, torch.nn.Module]:
    _, model = zoo.tiny(name)
    size = cache_size(model, find_moe_layers(model), torch.float32)
    return size, text_model(model).eval()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in (*BY_HAND, "glm5_next")])
def test_bytes_are_those_of_the_library(name: str) -> None:
    size, model = predicted(name)
    besides = 4 * BESIDES.get(name, 0)
    assert size.of(SHORT) + besides == cached_bytes(model, SHORT)
    # With a window of W the library keeps W - 1 tokens, to which the next one is added.
    besides -= sum(size.per_window.values())
    assert all(SHORT < window < LONG for window in size.per_window) or name == "inkling"
    if name != "inkling":  # whose window of 512 is longer than both
        assert size.of(LONG) + besides == cached_bytes(model, LONG)
    assert not size.uncounted


@pytest.mark.parametrize("name", BY_HAND)
def test_latent_attention_keeps_the_latent_and_the_rotary_key(name: str) -> None:
    latents, indexers = BY_HAND[name]
    size, _ = predicted(name)
    assert size.of(SHORT) == SHORT * 4 * (latents * (12 + 8) + indexers * 16)
    assert (size.per_window, size.state) == ({}, 0)


def test_states_and_a_latent_without_a_rotary_key() -> None:
    """Linear attention in two of three layers: a convolution of 96 channels over 2 tokens, and a
    matrix of 8 x 8 for each of 4 heads.
    """
    size, _ = predicted("glm5_next")
    assert size.per_token == 4 * (12 + 16)
    assert size.state == 2 * 4 * (96 * 2 + 4 * 8 * 8)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("qwen3_moe", 2 * 2 * (8 + 8)),  # layers, key-value heads, key and value
        ("deepseek_v3", 3 * (12 + 8)),
        ("jamba", 2 * 2 * (8 + 8)),  # of four layers, two attend
    ],
)
def test_values_of_a_token_by_hand(name: str, values: int) -> None:
    size, _ = predicted(name)
    assert size.per_token == 4 * values
    half = cache_size(zoo.tiny(name)[1], find_moe_layers(zoo.tiny(name)[1]), torch.bfloat16)
    assert half.per_token == 2 * values


def test_windows_bound_the_tokens_and_states_do_not_grow() -> None:
    size = CacheSize(per_token=3, per_window={10: 5}, state=7)
    assert [size.of(tokens) for tokens in (0, 4, 10, 50)] == [7, 39, 87, 207]
