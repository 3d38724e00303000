"""The automatic batch size: enough rows per expert, within the free memory."""

import bisect
import math
from typing import Any

import pytest
import torch

from reap_driver.compat.pretrained import meta_model
from reap_driver.memory.batch_size import Footprint, footprint_of, full_batch, token_footprint
from reap_driver.memory.host_memory import Free
from reap_driver.memory.machine import free_device_memory
from reap_driver.memory.workload import Workload, workload
from reap_driver.model.discover import find_moe_layers
from tests.driver import zoo
from tests.driver.observation.test_architectures import NAMES

PLENTY = 1 << 50
SMALL = Footprint(held=1000, experts=1000)


def choose(**changed: Any) -> int:
    """The choice for 128 experts, 8 per token, on the CPU: 4096 tokens give each 256 rows."""
    known: dict[str, Any] = {
        "sequences": 1000,
        "seq_len": 512,
        "experts_per_choice": 16.0,
        "accelerator": False,
        "footprint": SMALL,
        "free": PLENTY,
    }
    known.update(changed)
    footprint, free = known.pop("footprint"), known.pop("free")
    tokens = known["sequences"] * known["seq_len"]
    return Workload(tokens, known["seq_len"], footprint, full_batch(**known)).batch(free)


@pytest.mark.parametrize(
    ("changed", "size"),
    [
        ({}, 8),
        ({"seq_len": 500}, 9),  # rounded up: 4096 tokens are needed
        ({"seq_len": 8192}, 1),
        ({"sequences": 3}, 3),
        ({"experts_per_choice": 8 / 3}, 2),
        ({"accelerator": True}, 32),  # 16384 tokens
        ({"accelerator": True, "experts_per_choice": 128.0}, 64),  # 32768 tokens for 256 rows
        ({"free": None}, 1),
        ({"free": 0}, 1),
        ({"free": 2 * 2000 * 512 * 5}, 5),  # half of it holds five sequences
        ({"free": 2 * 2000 * 512 * 5 - 1}, 4),
    ],
)
def test_size(changed: dict[str, Any], size: int) -> None:
    assert choose(**changed) == size


@pytest.mark.parametrize("held", [1, 300, 1000, 5000])
@pytest.mark.parametrize("experts", [1, 300, 1000, 5000])
def test_the_most_that_fits(held: int, experts: int) -> None:
    """By search: experts take at most a quarter of the free memory, all activations half."""
    free = 4_000_000
    nbytes = lambda n: n * held + min(n * experts, free // 4)  # noqa: E731
    most = bisect.bisect_right(range(1, free), free // 2, key=nbytes)
    assert nbytes(most) <= free // 2 < nbytes(most + 1)
    assert abs(Footprint(held, experts).tokens_within(free) - most) <= 1


def test_bytes_of_a_batch_where_experts_are_computed_in_parts() -> None:
    small = Footprint(held=3, experts=10)
    assert small.nbytes(100, free=4000) == 300 + 1000
    assert small.nbytes(100, free=3999) == 300 + 999
    for free in range(0, 5000, 7):
        tokens = small.tokens_within(free)
        assert small.nbytes(tokens, free) <= max(free // 2, 0)


def test_a_planned_run_has_the_footprint_of_the_real_one() -> None:
    """A model on meta with a given device and dtype, or the model itself."""
    config, model = zoo.tiny("qwen3_moe")
    layers = find_moe_layers(model)
    meta = meta_model(config).to(torch.bfloat16)
    cpu, gpu = (torch.device(name) for name in ("cpu", "cuda"))
    planned = footprint_of(meta, layers, 100, device=cpu, dtype=torch.float32)
    assert planned == footprint_of(model, layers, 100)
    half = footprint_of(meta, layers, 100, device=gpu, dtype=torch.bfloat16)
    assert half.experts * 2 == planned.experts
    assert footprint_of(meta, layers, 100, device=cpu) == planned  # computed in float32


def test_more_memory_never_gives_less() -> None:
    sizes = [choose(free=free) for free in range(0, 2 * 2000 * 512 * 10, 100_000)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (1, 8)


def test_what_a_token_takes() -> None:
    plain = {"itemsize": 2, "hidden_size": 2048, "widest": 4096, "logits": 0, "eager_scores": 0}
    base = token_footprint(**plain, expert_values=8 * (2048 + 768))
    assert base.experts == 2 * 8 * 2816
    assert base.held == 2 * (16 * 2048 + 8 * 4096)
    eager = token_footprint(**{**plain, "eager_scores": 32 * 512}, expert_values=0)
    assert eager.held - base.held == 32 * 512 * (4 + 2)
    logits = token_footprint(**{**plain, "logits": 1000}, expert_values=0)
    assert logits.held - base.held == 1000 * (4 + 2)


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_has_a_footprint(name: str) -> None:
    """Widths are found under any name; eager attention takes more for longer sequences."""
    config, model = zoo.tiny(name)
    layers = find_moe_layers(model)
    text = config.get_text_config()
    short, long = (footprint_of(model, layers, seq_len) for seq_len in (100, 200))
    assert long.held - short.held == 8 * 100 * text.num_attention_heads > 0
    assert short.held > 4 * 16 * text.hidden_size
    k = layers[0].top_k
    assert short.experts == 4 * k * (layers[0].hidden_size + layers[0].intermediate_size)
    text._attn_implementation = "sdpa"
    assert footprint_of(model, layers, 200).held < short.held
    cpu = torch.device("cpu")
    work = workload(model, layers, tokens=16_000, seq_len=16, device=cpu, dtype=torch.float32)
    assert work.batch(PLENTY) == math.ceil(256 * 8 / k / 16)


def test_free_memory_heeds_what_the_host_says(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, said = torch.device("cpu"), Free(7, "of a test")
    assert free_device_memory(cpu).nbytes > 1 << 20
    monkeypatch.setattr("reap_driver.memory.machine.free_host_memory", lambda: said)
    assert free_device_memory(cpu) == said
    monkeypatch.setattr("reap_driver.memory.machine.free_host_memory", lambda: None)
    assert free_device_memory(cpu) is None
    assert free_device_memory(torch.device("meta")) is None


def test_free_memory_of_a_gpu_counts_torchs_own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (1000, 9000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: 500)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: 200)
    assert free_device_memory(torch.device("cuda")).nbytes == 1300
