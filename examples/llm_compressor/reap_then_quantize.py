"""Prunes a model by llm-compressor's REAP and quantizes what stays, in one recipe.

    python reap_then_quantize.py MODEL OUT --then w4a16 --data code.jsonl:500

w4a16 is GPTQ: weights of 4 bits that share a scale in groups of 128. nvfp4 is NVFP4 for weights and
activations.
"""

import argparse

from compressed_tensors.quantization import preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

import reap_driver as rd
from reap_driver.integrations.llm_compressor import KernelREAPPruningModifier, causal_attention

# The routers and the gates of shared experts have few weights, and decide where each token goes.
PLAIN = ["lm_head", "re:.*gate$"]


def quantizer(scheme, group_size):
    """The modifier that quantizes every Linear layer but `PLAIN`."""
    if scheme == "nvfp4":
        return QuantizationModifier(targets="Linear", scheme="NVFP4", ignore=PLAIN)
    w4a16 = preset_name_to_scheme("W4A16", ["Linear"])
    w4a16.weights.group_size = group_size
    return GPTQModifier(config_groups={"group_0": w4a16}, ignore=PLAIN)


def compress(model, out, *, then="w4a16", sparsity=0.25, data=(), seq_len=2048, group_size=128):
    """Writes the pruned and quantized checkpoint; see the options below."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    batches = rd.calibration(model, data, seq_len=seq_len)
    rows = [row.tolist() for _, batch in batches for row in batch["input_ids"]]
    with causal_attention():
        oneshot(
            model=loaded,
            dataset=Dataset.from_dict({"input_ids": rows}),
            # Each calibrates on a pass of its own: the second sees the pruned model.
            recipe=[KernelREAPPruningModifier(sparsity=sparsity), quantizer(then, group_size)],
            num_calibration_samples=len(rows),
            max_seq_length=seq_len,
        )
    loaded.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="prunes by llm-compressor's REAP and quantizes")
    parser.add_argument("model", metavar="MODEL", help="its folder, or its name on the hub")
    parser.add_argument("out", metavar="OUT", help="folder of the compressed one")
    parser.add_argument("--then", choices=("w4a16", "nvfp4"), default="w4a16")
    parser.add_argument("--sparsity", type=float, default=0.25, help="share of experts that go")
    parser.add_argument("--data", nargs="*", default=(), help="text, as `prune` takes it")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--group-size", type=int, default=128, help="weights with one scale")
    compress(**vars(parser.parse_args()))
