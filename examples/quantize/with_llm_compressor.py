"""Quantizes a pruned checkpoint with llm-compressor, on the text that its experts were observed on.

    python with_llm_compressor.py PRUNED OUT --scheme w4a16 --data code.jsonl:500

w4a16 is GPTQ: weights of 4 bits that share a scale in groups of 128. fp8 is FP8 for weights and
activations, which needs no text. PRUNED stays as it is.
"""

import argparse
import shutil
from pathlib import Path

from compressed_tensors.quantization import preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

import reap_driver as rd

# The routers and the gates of shared experts have few weights, and decide where each token goes.
PLAIN = ["lm_head", "re:.*gate$"]


def quantize(pruned, out, *, scheme="w4a16", data=(), seq_len=2048, group_size=128):
    """Writes the quantized checkpoint, with the record of the pruning; see the options below."""
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype="auto")
    if scheme == "fp8":
        recipe = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=PLAIN)
        oneshot(model=model, recipe=recipe)
    else:
        rows = [
            row.tolist()
            for _, batch in rd.calibration(pruned, data, seq_len=seq_len)
            for row in batch["input_ids"]
        ]
        w4a16 = preset_name_to_scheme("W4A16", ["Linear"])
        w4a16.weights.group_size = group_size
        oneshot(
            model=model,
            dataset=Dataset.from_dict({"input_ids": rows}),
            recipe=GPTQModifier(config_groups={"group_0": w4a16}, ignore=PLAIN),
            pipeline="basic",  # in its sequential one, tokens attend to later ones
            num_calibration_samples=len(rows),
            max_seq_length=seq_len,
        )
    model.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(pruned).save_pretrained(out)
    record = Path(pruned, "reap")
    if record.is_dir():
        shutil.copytree(record, Path(out, "reap"), dirs_exist_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="quantizes a pruned checkpoint")
    parser.add_argument("pruned", metavar="PRUNED", help="its folder")
    parser.add_argument("out", metavar="OUT", help="folder of the quantized one")
    parser.add_argument("--scheme", choices=("w4a16", "fp8"), default="w4a16")
    parser.add_argument("--data", nargs="*", default=(), help="text, as `prune` takes it")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--group-size", type=int, default=128, help="weights with one scale")
    quantize(**vars(parser.parse_args()))
