"""vLLM's engine in this process, with a small model whose layers tests hook themselves."""

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

import reap_driver as rd
from reap_driver.integrations.vllm.engine.layer import HookedLayer
from reap_driver.integrations.vllm.engine.layers import find_layers
from tests.driver import zoo

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
}
# Attention of vLLM on the CPU has heads of 32 and more, its experts multiples of 32.
_SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
_OVERRIDES = {
    "gpt_oss": {"intermediate_size": 32},
    "llama4": {"attention_chunk_size": 128, "num_experts_per_tok": 1},
}
# Of experts that a plan removes: where a token has one, a quarter may be none that it needs.
_RATIOS = {"llama4": 0.5}
# Text of no special tokens.
TOKENS = torch.randint(3, 96, (24,), generator=torch.Generator().manual_seed(1)).tolist()


@dataclass
class Pass:
    """What layers ask of a forward pass, as a test wants it: every token counts, in one group."""

    observed: bool = False
    mode: str = "replace"
    real: bool = True
    num_groups: int = 1
    marks: list[bool] | None = None
    of_groups: list[int] | None = None

    def counted(self, tokens: int) -> Tensor:
        marks = [True] * tokens if self.marks is None else self.marks
        return torch.tensor(marks)

    def groups(self, tokens: int) -> Tensor:
        return torch.tensor([0] * tokens if self.of_groups is None else self.of_groups)


@dataclass
class Engine:
    """A model in vLLM whose MoE layers are hooked, and what this project says of it offline.

    Attributes:
        llm: vLLM's.
        stats: of `TOKENS`, observed in transformers.
        plan: that removes the least salient experts.
        whole, pruned: log-probabilities of the model and of the checkpoint that the plan makes, in
            transformers, as `Engine.logprobs`.
        step: what layers are told.
        layers: name -> layer, in order. vLLM may have other names than transformers.
    """

    llm: LLM
    stats: rd.SaliencyStats
    plan: rd.Plan
    whole: Tensor
    pruned: Tensor
    step: Pass = field(default_factory=Pass)
    layers: dict[str, HookedLayer] = field(default_factory=dict)

    @property
    def worker(self) -> Any:
        """vLLM's worker, which holds the model."""
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker

    def logprobs(self) -> Tensor:
        """Of each of `TOKENS` after those before it, [tokens - 1], computed in one pass."""
        asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts = [{"prompt_token_ids": TOKENS}]
        [answer] = self.llm.generate(prompts, asked, use_tqdm=False)  # type: ignore[arg-type]
        assert answer.prompt_logprobs is not None
        rows = zip(answer.prompt_logprobs[1:], TOKENS[1:], strict=True)
        return torch.tensor([row[token].logprob for row, token in rows if row is not None])

    def observe(self, mode: str, num_groups: int = 1) -> Tensor:
        """`logprobs` of a pass that is observed into new statistics."""
        for layer in self.layers.values():
            layer.reset()
            layer.begin(num_groups)
        self.step.mode, self.step.observed = mode, True
        try:
            found = self.logprobs()
        finally:
            self.step.observed = False
        assert [layer.error for layer in self.layers.values()] == [None] * len(self.layers)
        return found


def _logprobs(model: PreTrainedModel) -> Tensor:
    """As `Engine.logprobs`, by transformers."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
    return logits.log_softmax(-1)[torch.arange(len(TOKENS) - 1), torch.tensor(TOKENS[1:])]


@contextlib.contextmanager
def running(name: str, folder: Path) -> Iterator[Engine]:
    """The tiny model of an architecture in vLLM, its layers hooked.

    What transformers computes comes first: where vLLM uses its classes, it changes them.
    """
    _, model = zoo.tiny(name, **_SIZES | _OVERRIDES.get(name, {}))
    model.save_pretrained(folder / "whole")
    with rd.observe(model) as observer:
        observer(input_ids=torch.tensor([TOKENS]))
    plan = rd.make_plan(rd.score(observer.stats), ratio=_RATIOS.get(name, 0.25))
    rd.apply_plan(folder / "whole", plan, folder / "pruned")
    whole, pruned = _logprobs(model), _logprobs(rd.load_model(folder / "pruned"))
    with mock.patch.dict(os.environ, _ENVIRONMENT):
        llm = LLM(
            str(folder / "whole"),
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=8,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
        )
        engine = Engine(llm, observer.stats, plan, whole, pruned)
        for found, runner in find_layers(engine.worker.model_runner.get_model()).items():
            engine.layers[found] = HookedLayer(found, runner, engine.step)
            engine.layers[found].install()
        yield engine
        del engine, llm
    gc.collect()
    cleanup_dist_env_and_memory()
