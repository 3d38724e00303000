"""GGUF files of pruned checkpoints compute in llama.cpp what transformers computes."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

import reap_driver as rd
from examples.gguf import CONVERTER, convert, serve
from tests.interop.engines.fixtures import Compare, Pairs, Ran
from tests.interop.engines.models import (
    BOUND,
    TOKENS,
    Checkpoint,
    difference,
    divergence,
    write_narrow,
    write_quantized,
    write_unequal,
)
from tests.interop.engines.sources import SOURCES

# The server gives the probabilities that follow a prompt; these are the last tokens of five.
ROWS = [7, 11, 15, 19, 23]
# A token that is a whole character: the server gives no probabilities with a part of one.
LETTER = 70


def fields(file: Path) -> dict[str, int]:
    """The fields of a GGUF file that are numbers, without the architecture before their names."""
    sys.path[:0] = [str(CONVERTER / "gguf-py")]
    from gguf import GGUFReader

    values = {name: field.contents() for name, field in GGUFReader(file).fields.items()}
    return {
        name.rpartition(".")[2]: value for name, value in values.items() if isinstance(value, int)
    }


def logprobs(file: Path, vocabulary: int) -> torch.Tensor:
    """`[ROWS, vocabulary]`, whatever token the server chooses."""
    server, rows = serve(file), []
    for row in ROWS:
        answer = server.handle_completions(
            {
                "prompt": TOKENS[: row + 1],
                "max_tokens": 1,
                "n_probs": vocabulary,
                "logprobs": vocabulary,
                "logit_bias": [[LETTER, 1000.0]],  # of the choice; not of what is reported
                "temperature": 0,
                "cache_prompt": False,
            }
        )
        [token] = answer["choices"][0]["logprobs"]["content"]
        assert token["id"] == LETTER
        found = {entry["id"]: entry["logprob"] for entry in token["top_logprobs"]}
        rows.append([found[i] for i in range(vocabulary)])
    return torch.tensor(rows)


@pytest.fixture
def same_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter reads files or code of the publishers' tokenizers for two models; here they
    have the tokenizer of the others.
    """
    sys.path[:0] = [str(CONVERTER), str(CONVERTER / "gguf-py")]
    from conversion.base import TextModel
    from conversion.ernie import Ernie4_5MoeModel
    from conversion.hunyuan import HunYuanMoEModel

    for converter in (Ernie4_5MoeModel, HunYuanMoEModel):
        monkeypatch.setattr(converter, "set_vocab", TextModel._set_vocab_gpt2)


@pytest.mark.usefixtures("same_tokenizer")
@pytest.mark.parametrize("architecture", SOURCES)
def test_logprobs_are_those_of_transformers(
    architecture: str, compare: Compare, tmp_path: Path
) -> None:
    def run(checkpoint: Checkpoint) -> Ran:
        file = convert(checkpoint.folder, tmp_path / f"{checkpoint.folder.name}.gguf")
        found = fields(file)
        said = logprobs(file, checkpoint.logprobs.shape[1])
        return Ran(found["expert_count"], found["expert_used_count"], ROWS, said)

    if architecture == "flex_olmo":
        message = "Architecture 'FlexOlmoForCausalLM' not supported"
        compare.refuse(architecture, run, message, "not known")
    else:
        compare.agree(architecture, run)


@pytest.mark.parametrize("architecture", ["deepseek_v3", "minimax_m2"])
def test_fp8_checkpoints_are_converted_as_they_are(
    architecture: str, pairs: Pairs, tmp_path: Path
) -> None:
    checkpoint = write_quantized(pairs(architecture), tmp_path)
    file = convert(checkpoint.folder, tmp_path / "pruned.gguf")
    found = logprobs(file, checkpoint.logprobs.shape[1])
    assert fields(file)["expert_count"] == checkpoint.experts
    assert difference(checkpoint, ROWS, found) < BOUND


@pytest.mark.parametrize("architecture", ["qwen3_moe", "glm4_moe", "deepseek_v3"])
def test_experts_with_fewer_neurons_compute_the_same(
    architecture: str, pairs: Pairs, tmp_path: Path
) -> None:
    checkpoint = write_narrow(pairs(architecture), tmp_path / "narrow")
    file = convert(checkpoint.folder, tmp_path / "narrow.gguf")
    found = logprobs(file, checkpoint.logprobs.shape[1])
    assert fields(file)["expert_feed_forward_length"] == 24
    assert difference(checkpoint, ROWS, found) < BOUND


def test_groups_of_experts_are_in_the_file(pairs: Pairs, tmp_path: Path) -> None:
    """DeepSeek-R1 routes within 4 of 8 groups, of 32 experts each, of 24 when pruned."""
    found = fields(convert(pairs("deepseek_v3").pruned.folder, tmp_path / "pruned.gguf"))
    counts = {name: found[name] for name in ("expert_count", "expert_group_count")}
    assert counts == {"expert_count": 192, "expert_group_count": 8}
    assert found["expert_group_used_count"] == 4


def test_pruned_layers_of_multi_token_prediction_are_in_the_file(
    pairs: Pairs, tmp_path: Path
) -> None:
    pair = pairs("glm4_moe")
    rd.apply_plan(pair.whole.folder, pair.plan, tmp_path / "pruned", mtp="prune")
    file = convert(tmp_path / "pruned", tmp_path / "pruned.gguf")
    assert fields(file)["nextn_predict_layers"] == 1
    assert fields(file)["expert_count"] == pair.pruned.experts
    found = logprobs(file, pair.pruned.logprobs.shape[1])
    assert difference(pair.pruned, ROWS, found) < BOUND


def test_eight_bits_cost_the_pruned_model_little(pairs: Pairs, tmp_path: Path) -> None:
    """The converter's own Q8_0; `llama-quantize`, for fewer bits, is in no wheel."""
    checkpoint = pairs("qwen3_moe").pruned
    file = convert(checkpoint.folder, tmp_path / "pruned.gguf", "q8_0")
    found = logprobs(file, checkpoint.logprobs.shape[1])
    assert 1e-5 < divergence(checkpoint, ROWS, found) < 5e-3


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "glm4_moe"])
def test_layers_of_unequal_counts_are_refused_by_the_converter(
    architecture: str, pairs: Pairs, tmp_path: Path
) -> None:
    unequal = write_unequal(pairs(architecture), tmp_path / "unequal")
    with pytest.raises(ValueError, match="Unprocessed experts"):
        convert(unequal, tmp_path / "unequal.gguf")


def test_the_example_says_the_same_in_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gguf.py", str(tmp_path)])
    runpy.run_path("examples/gguf.py", run_name="__main__")
    lines = dict(line.split(":", 1) for line in capfd.readouterr().out.splitlines()[-2:])
    assert lines["llama.cpp"].strip() == lines["transformers"].strip()
