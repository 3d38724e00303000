"""Small models, whole and pruned, and what transformers computes.

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
from transformers import PreTrainedModel

import reap_driver as rd
from tests.driver.published.checkpoint import write_small, write_tokenizer
from tests.driver.published.expected import dequantized, read_tensors
from tests.driver.published.reduce import get_field
from tests.driver.writer import narrow_plans
from tests.interop.engines.sources import SOURCES

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
    stats: rd.SaliencyStats
    plan: rd.Plan
    whole: Checkpoint
    pruned: Checkpoint


def write_pair(architecture: str, folder: Path, *, zeroed: str = "", packed: bool = False) -> Pair:
    """Writes both checkpoints under `folder`, the second by observing and pruning the first.

    Args:
        architecture: of `SOURCES`.
        folder: for both.
        zeroed: regular expression of tensors that are zero.
        packed: experts are quantized as published, and all else is in float32.
    """
    whole = folder / "whole"
    _write_whole(architecture, whole, plain=not packed, zeroed=zeroed, float32=packed)
    stats = _observed(whole)
    plan = rd.make_plan(rd.score(stats), ratio=RATIO)
    rd.apply_plan(whole, plan, folder / "pruned")
    pruned = _checkpoint(architecture, folder / "pruned")
    pair = Pair(architecture, stats, plan, _checkpoint(architecture, whole), pruned)
    assert pair.pruned.experts == pair.whole.experts - int(RATIO * pair.whole.experts)
    assert _difference(pair.pruned.logprobs, pair.whole.logprobs) > MOVED
    return pair


def write_unequal(pair: Pair, folder: Path) -> Path:
    """The model, whose first MoE layer keeps half of its experts and the others three quarters."""
    ratios = {next(iter(pair.stats.layers)): 0.5}
    plan = rd.make_plan(rd.score(pair.stats), ratio=RATIO, layer_ratios=ratios)
    rd.apply_plan(pair.whole.folder, plan, folder, non_uniform=True)
    return folder


def write_kept(pair: Pair, kept: int, folder: Path) -> Checkpoint:
    """The model, whose MoE layers keep so many experts."""
    plan = rd.make_plan(rd.score(pair.stats), ratio=1 - kept / pair.whole.experts)
    rd.apply_plan(pair.whole.folder, plan, folder)
    checkpoint = _checkpoint(pair.architecture, folder)
    assert checkpoint.experts == kept
    return checkpoint


def write_narrow(pair: Pair, folder: Path) -> Checkpoint:
    """The pruned model, whose experts keep three quarters of their neurons and get new, random down
    projections. Shared experts, which the same field sizes, become two, wider than before.
    """
    model = rd.load_model(pair.whole.folder)
    plan = narrow_plans.narrowed(pair.plan, model, lambda width: 3 * width // 4)
    matrices = narrow_plans.random_matrices(model, plan)
    rd.apply_plan(pair.whole.folder, plan, folder, matrices=matrices)
    return _checkpoint(pair.architecture, folder)


def write_quantized(pair: Pair, folder: Path) -> Checkpoint:
    """The pruned model in its publisher's FP8; the reference has the same values in float32."""
    whole = _write_whole(pair.architecture, folder / "whole")
    rd.apply_plan(whole, pair.plan, folder / "pruned")
    config = json.loads((folder / "pruned/config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "fp8"
    plain = folder / "plain"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    save_file(dequantized(read_tensors(folder / "pruned")), plain / "model.safetensors")
    return dataclasses.replace(_checkpoint(pair.architecture, plain), folder=folder / "pruned")


def divergence(checkpoint: Checkpoint, rows: list[int], logprobs: torch.Tensor) -> float:
    """The mean KL divergence in nats of an engine's `[rows, vocabulary]` from the reference."""
    expected = checkpoint.logprobs[rows]
    assert logprobs.shape == expected.shape
    return float((expected.exp() * (expected - logprobs)).sum(-1).mean())


def difference(checkpoint: Checkpoint, rows: list[int], logprobs: torch.Tensor) -> float:
    """As `distance`; the likeliest token is the same after every token."""
    assert torch.equal(logprobs.argmax(-1), checkpoint.logprobs[rows].argmax(-1))
    return distance(checkpoint, rows, logprobs)


def distance(checkpoint: Checkpoint, rows: list[int], logprobs: torch.Tensor) -> float:
    """The greatest difference in nats between an engine's log-probabilities and the reference.

    Args:
        checkpoint: that the engine ran.
        rows: which of `TOKENS` each row of `logprobs` follows.
        logprobs: `[rows, vocabulary]`.
    """
    expected = checkpoint.logprobs[rows]
    assert logprobs.shape == expected.shape
    return _difference(logprobs, expected)


def _difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


def _observed(folder: Path) -> rd.SaliencyStats:
    model = _loaded(folder)
    tokens = torch.randint(3, 259, (4, 96), generator=torch.Generator().manual_seed(0))
    with rd.observe(model) as observer:
        observer(input_ids=tokens)
    return observer.stats


def _write_whole(
    architecture: str,
    folder: Path,
    *,
    plain: bool = False,
    zeroed: str = "",
    float32: bool = False,
) -> Path:
    source = SOURCES[architecture]
    entry, config = source.entry, dict(source.config)
    if float32:
        entry = dataclasses.replace(entry, float32="")
        config["torch_dtype"] = "float32"
    write_small(entry, config, folder, plain=plain, zeroed=zeroed)
    write_tokenizer(folder, special=_SPECIAL, merges=_MERGES)
    return folder


def _loaded(folder: Path) -> PreTrainedModel:
    """A model whose tensors, but for quantized ones, are in float32; all are when it is loaded."""
    model = rd.load_model(folder)
    assert model.dtype == torch.float32
    return model.float()


def _checkpoint(architecture: str, folder: Path) -> Checkpoint:
    config = json.loads((folder / "config.json").read_text())
    entry = SOURCES[architecture].entry
    [experts] = {get_field(config, field) for field in entry.counts}
    top_k = get_field(config, entry.top_k)
    if isinstance(top_k, list):  # Hunyuan's, one of each layer
        [top_k] = set(top_k)
    model = _loaded(folder)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
    return Checkpoint(folder, experts, top_k, logits.log_softmax(-1))
