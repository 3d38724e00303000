"""Small models of published configurations, whole and pruned, and what transformers computes.

The fields of `config.json` and the names of tensors are the publisher's: engines read fields that
transformers renames when it saves (`rope_theta`, `num_experts`) or does not know (`scoring_func`),
and the property under test is that pruning keeps what it finds. Weights are random, in float32.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

import reap_driver as rd
from tests.driver.published.checkpoint import write_checkpoint, write_tokenizer
from tests.driver.published.expected import dequantized, read_tensors
from tests.driver.published.models import MODELS
from tests.driver.published.reduce import get_field
from tests.driver.writer import narrow_plans

# Architecture -> the published model whose configuration it is tested with.
PUBLISHED = {
    "qwen3_moe": "qwen3-30b-a3b",
    "qwen2_moe": "qwen1.5-moe-a2.7b",
    "mixtral": "mixtral-8x7b",
    "olmoe": "olmoe-1b-7b",
    "glm4_moe": "glm-4.5-air",
    "deepseek_v3": "deepseek-r1",
    "minimax_m2": "minimax-m2",
}
RATIO = 0.25
# Greatest difference between an engine's log-probabilities and those of transformers, in nats; both
# compute in float32. Pruning moves them by more than MOVED.
BOUND = 2e-5
MOVED = 1e-2
# Bytes of text, none of them special.
TOKENS = torch.randint(3, 99, (24,), generator=torch.Generator().manual_seed(1)).tolist()
# llama.cpp looks for these tokens in GLM's tokenizer, and reads no tokenizer without merges.
_SPECIAL = ("[gMASK]", "<|user|>", "<|endoftext|>", "<|observation|>")
_MERGES = (("d", "e"), ("f", "o"))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, and what an engine must find in it.

    Attributes:
        folder: of the checkpoint.
        experts: how many every MoE layer has.
        top_k: how many of them a token is routed to.
        logprobs: `[tokens, vocabulary]` float32, of `TOKENS` by transformers.
    """

    folder: Path
    experts: int
    top_k: int
    logprobs: torch.Tensor


@dataclass(frozen=True)
class Pair:
    """The control, a whole model, and the same model without a quarter of its experts."""

    architecture: str
    plan: rd.Plan
    whole: Checkpoint
    pruned: Checkpoint


def write_pair(architecture: str, folder: Path) -> Pair:
    """Writes both checkpoints under `folder`, the second by observing and pruning the first."""
    name = PUBLISHED[architecture]
    whole = write_checkpoint(name, folder / "whole", plain=True)
    write_tokenizer(whole, special=_SPECIAL, merges=_MERGES)
    plan = rd.make_plan(rd.score(_observed(whole)), ratio=RATIO)
    rd.apply_plan(whole, plan, folder / "pruned")
    pair = Pair(architecture, plan, _checkpoint(name, whole), _checkpoint(name, folder / "pruned"))
    assert pair.pruned.experts == pair.whole.experts - int(RATIO * pair.whole.experts)
    assert _difference(pair.pruned.logprobs, pair.whole.logprobs) > MOVED
    return pair


def write_unequal(whole: Checkpoint, folder: Path) -> Path:
    """The model, whose first MoE layer keeps half of its experts and the others three quarters."""
    stats = _observed(whole.folder)
    ratios = {next(iter(stats.layers)): 0.5}
    plan = rd.make_plan(rd.score(stats), ratio=RATIO, layer_ratios=ratios)
    rd.apply_plan(whole.folder, plan, folder, non_uniform=True)
    return folder


def write_narrow(pair: Pair, folder: Path) -> Checkpoint:
    """The pruned model, whose experts keep three quarters of their neurons and get new, random down
    projections. Shared experts, which the same field sizes, become two, wider than before.
    """
    model = rd.load_model(pair.whole.folder)
    plan = narrow_plans.narrowed(pair.plan, model, lambda width: 3 * width // 4)
    matrices = narrow_plans.random_matrices(model, plan)
    rd.apply_plan(pair.whole.folder, plan, folder, matrices=matrices)
    return _checkpoint(PUBLISHED[pair.architecture], folder)


def write_quantized(pair: Pair, folder: Path) -> Checkpoint:
    """The pruned model in its publisher's FP8; the reference has the same values in float32."""
    name = PUBLISHED[pair.architecture]
    whole = write_checkpoint(name, folder / "whole")
    write_tokenizer(whole, special=_SPECIAL, merges=_MERGES)
    rd.apply_plan(whole, pair.plan, folder / "pruned")
    config = json.loads((folder / "pruned/config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "fp8"
    plain = folder / "plain"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    save_file(dequantized(read_tensors(folder / "pruned")), plain / "model.safetensors")
    return dataclasses.replace(_checkpoint(name, plain), folder=folder / "pruned")


def divergence(checkpoint: Checkpoint, rows: list[int], logprobs: torch.Tensor) -> float:
    """The mean KL divergence in nats of an engine's `[rows, vocabulary]` from the reference."""
    expected = checkpoint.logprobs[rows]
    assert logprobs.shape == expected.shape
    return float((expected.exp() * (expected - logprobs)).sum(-1).mean())


def difference(checkpoint: Checkpoint, rows: list[int], logprobs: torch.Tensor) -> float:
    """The greatest difference in nats between an engine's log-probabilities and the reference.

    Args:
        checkpoint: that the engine ran.
        rows: which of `TOKENS` each row of `logprobs` follows.
        logprobs: `[rows, vocabulary]`.
    """
    expected = checkpoint.logprobs[rows]
    assert logprobs.shape == expected.shape
    assert torch.equal(logprobs.argmax(-1), expected.argmax(-1))
    return _difference(logprobs, expected)


def _difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


def _observed(folder: Path) -> rd.SaliencyStats:
    model = rd.load_model(folder)
    tokens = torch.randint(3, 259, (4, 96), generator=torch.Generator().manual_seed(0))
    with rd.observe(model) as observer:
        observer(input_ids=tokens)
    return observer.stats


def _checkpoint(name: str, folder: Path) -> Checkpoint:
    config = json.loads((folder / "config.json").read_text())
    [experts] = {get_field(config, field) for field in MODELS[name].counts}
    model = rd.load_model(folder)
    assert model.dtype == torch.float32
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
    top_k = get_field(config, MODELS[name].top_k)
    return Checkpoint(folder, experts, top_k, logits.log_softmax(-1))
