"""vLLM's `EngineClient` with workers that count made-up rows, in this process."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Glm4MoeConfig, Qwen3MoeConfig

import reap_kernels as rk
from reap_driver.integrations.vllm.engine.stats_bytes import bytes_of
from reap_driver.integrations.vllm.server.served_model import ServedModel, served_model

EXPERTS, TOP_K, HIDDEN = 8, 2, 32
DENSE = 1  # decoder layers without experts, before the others
OURS = tuple(f"model.layers.{number}.mlp.experts" for number in (1, 2, 3))
THEIRS = tuple(f"model.layers.{number}.mlp.routed" for number in (1, 2, 3))
_SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts_per_tok": TOP_K,
    "vocab_size": 64,
}


def qwen(folder: Path) -> Path:
    """A folder with the configuration of a model without routing groups."""
    config = Qwen3MoeConfig(**_SIZES, num_experts=EXPERTS, mlp_only_layers=[0])
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    return folder


def glm(folder: Path) -> Path:
    """A folder with the configuration of a model with two routing groups, of which it takes one."""
    config = Glm4MoeConfig(
        **_SIZES, n_routed_experts=EXPERTS, n_group=2, topk_group=1, first_k_dense_replace=DENSE
    )
    config.architectures = ["Glm4MoeForCausalLM"]
    config.save_pretrained(folder)
    return folder


def facts(names: Sequence[str] = THEIRS, **other: Any) -> dict[str, dict[str, Any]]:
    """What a worker says of its layers, with other values for some facts."""
    layer = {
        "num_experts": EXPERTS,
        "top_k": TOP_K,
        "n_group": 1,
        "topk_group": 1,
        "hidden_size": HIDDEN,
        "intermediate_size": 16,
        "scale": 1.0,
        "refusal": None,
        "mask_refusal": None,
    }
    return {name: {**layer, **other} for name in names}


def served(folder: Path, **other: Any) -> ServedModel:
    """The model of a folder, as vLLM's workers would describe it."""
    return served_model(str(folder), None, [{"layers": facts(**other)}])


def counted(
    tokens: Mapping[str, int],
    names: Sequence[str] = THEIRS,
    experts: Sequence[int] = range(EXPERTS),
    seed: int = 1,
) -> rk.SaliencyStats:
    """Statistics of tokens by group, whose rows of `experts` alone are counted."""
    random = torch.Generator().manual_seed(seed)
    layers = {}
    for name in names:
        layers[name] = rk.LayerStats(EXPERTS, len(tokens))
        for group, number in enumerate(tokens.values()):
            scores = torch.rand(number, EXPERTS, generator=random)
            ids = scores.topk(TOP_K).indices.flatten()
            rows = torch.randn(number * TOP_K, HIDDEN, generator=random)
            weights = torch.rand(number * TOP_K, generator=random)
            held = torch.isin(ids, torch.tensor(list(experts)))
            rk.accumulate(rows[held], ids[held], weights[held], layers[name], group=group)
            layers[name].add_tokens(number, group)
    return rk.SaliencyStats(layers, list(tokens))


@dataclass
class Rank:
    """A worker: what it answers, and what it was asked."""

    layers: dict[str, dict[str, Any]] = field(default_factory=facts)
    place: dict[str, Any] = field(default_factory=dict)
    mode: str = "off"
    counted_in: list[str] = field(default_factory=lambda: ["replace"])
    every: int = 1
    tokens: dict[str, int] = field(default_factory=lambda: {"all": 0})
    masked: dict[str, list[int]] = field(default_factory=dict)
    source: str = ""
    error: str | None = None
    refuses: dict[str, dict[str, str]] = field(default_factory=dict)

    def answer(self, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the call of a worker answers."""
        if method in self.refuses:
            return {"error": self.refuses[method]}
        result: dict[str, Any] = getattr(self, method.removeprefix("reap_"))(**given)
        return result

    def facts(self) -> dict[str, Any]:
        return {"rank": 0, "layers": self.layers, **self.place}

    def start(self, mode: str, every: int, groups: list[str], reset: bool) -> dict[str, Any]:
        self.mode, self.every = mode, every
        if reset:
            self.counted_in = [mode]
            self.tokens = dict.fromkeys(["all", *groups], 0)
        return self.status()

    def stop(self) -> dict[str, Any]:
        self.mode = "off"
        return self.status()

    def reset(self) -> dict[str, Any]:
        self.tokens = dict.fromkeys(self.tokens, 0)
        return self.status()

    def status(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "every": self.every,
            "counted_in": list(self.counted_in),
            "tokens": dict(self.tokens),
            "not_counted": {"drafted": 3, "recomputed": 0},
            "steps": 9,
            "observed_steps": 7,
            "masked": {name: list(ids) for name, ids in self.masked.items()},
            "source": self.source,
            "error": self.error,
        }

    def statistics(self) -> dict[str, Any]:
        place = {"share": "whole", "tp": 1, "pp": 1, "dp": 1}
        place |= {"tp_rank": 0, "pp_rank": 0, "dp_rank": 0, "ep_rank": 0}
        file = bytes_of(counted(self.tokens, list(self.layers)))
        return {**place, **self.place, "file": file}

    def mask(self, removed: Mapping[str, Sequence[int]], source: str = "") -> dict[str, Any]:
        self.masked = {name: list(ids) for name, ids in removed.items() if name in self.layers}
        self.source = source if removed else ""
        return self.status()


class FakeClient:
    """The client of an engine.

    Attributes:
        ranks: its workers.
        calls: names of what it was asked, in order.
        fails: {name: what is raised in its place}.
        errored: whether the engine has died.
    """

    def __init__(self, model: Path, ranks: Sequence[Rank] | None = None) -> None:
        self.ranks = list(ranks or [Rank()])
        self.calls: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.errored = self.paused = False
        self.cache_reset: Callable[[], bool] = lambda: True
        self.model_config = SimpleNamespace(
            model=str(model), revision=None, trust_remote_code=False
        )
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))

    async def _asked(self, name: str) -> None:
        self.calls.append(name)
        await asyncio.sleep(0)
        if name in self.fails:
            raise self.fails[name]

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple = (), kwargs: Any = None
    ) -> list[dict[str, Any]]:
        await self._asked(method)
        return [rank.answer(method, kwargs or {}) for rank in self.ranks]

    async def is_sleeping(self) -> bool:
        return self.paused

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("keep", False)
        await self._asked("pause")
        self.paused = True

    async def resume_generation(self) -> None:
        await self._asked("resume")
        self.paused = False

    async def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        assert self.paused
        assert reset_running_requests
        assert reset_connector
        await self._asked("reset_prefix_cache")
        return self.cache_reset()
