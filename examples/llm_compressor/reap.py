"""Prunes a model by llm-compressor's REAP, with its experts observed by reap-kernels.

    python reap.py MODEL OUT --sparsity 0.25 --data code.jsonl:500

OUT also gets kept.json, llm-compressor's report of the experts that stay.
"""

import argparse

from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer

import reap_driver as rd
from reap_driver.integrations.llm_compressor import KernelREAPPruningModifier, causal_attention


def prune(model, out, *, sparsity=0.25, data=(), seq_len=2048):
    """Writes the pruned checkpoint; see the options below."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    batches = rd.calibration(model, data, seq_len=seq_len)
    rows = [row.tolist() for _, batch in batches for row in batch["input_ids"]]
    recipe = KernelREAPPruningModifier(sparsity=sparsity, report_path=f"{out}/kept.json")
    with causal_attention():
        oneshot(
            model=loaded,
            dataset=Dataset.from_dict({"input_ids": rows}),
            recipe=recipe,
            num_calibration_samples=len(rows),
            max_seq_length=seq_len,
        )
    loaded.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="prunes a model by llm-compressor's REAP")
    parser.add_argument("model", metavar="MODEL", help="its folder, or its name on the hub")
    parser.add_argument("out", metavar="OUT", help="folder of the pruned one")
    parser.add_argument("--sparsity", type=float, default=0.25, help="share of experts that go")
    parser.add_argument("--data", nargs="*", default=(), help="text, as `prune` takes it")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a sequence")
    prune(**vars(parser.parse_args()))
