"""What vLLM computes of a checkpoint, in this process: import it before vLLM."""

import gc
import json
import os
import sys
from pathlib import Path

import torch

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_PLUGINS": "",  # none
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CACHE_ROOT": str(Path(sys.prefix) / "cache"),  # deleted with the environment
}

from vllm import LLM, SamplingParams
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.models.registry import ModelRegistry

from tests.interop.engines.fixtures import Ran
from tests.interop.engines.models import TOKENS

ROWS = list(range(len(TOKENS)))


def run(folder: Path, *, dtype: str = "float32") -> Ran:
    """Loads a checkpoint, computes and forgets it. Errors of vLLM come as they are."""
    _import_class(folder)
    # float32 is asked for: "auto" makes bfloat16 of it.
    engine = LLM(
        str(folder),
        dtype=dtype,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=2 * len(TOKENS),
        max_num_seqs=1,
        max_logprobs=-1,
        disable_log_stats=True,
    )
    try:
        model = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.get_model()
        layers = [layer for layer in model.modules() if isinstance(layer, MoERunner)]
        [experts] = {layer.routed_experts.w13_weight.shape[0] for layer in layers}
        [top_k] = {layer.router.top_k for layer in layers}
        return Ran(experts, top_k, ROWS, _logprobs(engine))
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()


def _import_class(folder: Path) -> None:
    """Imports the model's class here; vLLM would start a process first that looks at it."""
    for name in json.loads((folder / "config.json").read_text())["architectures"]:
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def _logprobs(engine: LLM) -> torch.Tensor:
    """`[ROWS, vocabulary]`: of the prompt, and of what follows it."""
    every = SamplingParams(max_tokens=1, prompt_logprobs=-1, logprobs=-1, detokenize=False)
    [answer] = engine.generate([{"prompt_token_ids": TOKENS}], every, use_tqdm=False)
    rows = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
    return torch.tensor([[row[i].logprob for i in range(len(row))] for row in rows])
