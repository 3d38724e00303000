"""llm-compressor's REAP pruning alone and with our modifier, side by side in one run; CPU.

Both prune the CPU bench model by the same tokens, in turn, over several rounds; seconds are those
of the process in the whole `oneshot`. A ratio is the median over rounds of the ratio in one round.
llm-compressor needs an environment of its own: `make test-interop ENVS=llmcompressor` builds it.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from importlib import util
from pathlib import Path
from typing import Any

import torch

from bench import cpu_model, rows

LENGTH = 512
INSTALL = (
    "llm-compressor is not installed here; build its environment with `make test-interop "
    "ENVS=llmcompressor` and run `out/interop/llmcompressor/bin/python -m bench "
    "llm_compressor_cpu`, or run `pip install reap-kernels[llmcompressor]`"
)


def _modifiers() -> dict[str, Any]:
    """The modifiers that are compared."""
    from llmcompressor.modifiers.pruning import REAPPruningModifier
    from loguru import logger

    from reap_driver.integrations.llm_compressor import KernelREAPPruningModifier

    logger.remove()
    return {"alone": REAPPruningModifier, "ours": KernelREAPPruningModifier}


def _tokenizer() -> Any:
    """llm-compressor asks for one; the data are tokens already."""
    from transformers import AutoTokenizer

    folder = rows.ROOT / "python" / "reap_driver" / "demo" / "model"
    return AutoTokenizer.from_pretrained(folder)


def _pruned(
    modifier: Any, source: Path, sequences: int, options: Mapping[str, Any]
) -> tuple[float, Mapping[str, list[int]]]:
    """Seconds of one run on a fresh model, and the experts it kept, by MoE block."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    from reap_driver.integrations.llm_compressor import causal_attention
    from reap_kernels.documents import parse_json

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    ids = torch.cat(cpu_model.tokens(sequences, LENGTH, 1)).tolist()
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * LENGTH} for row in ids])
    with tempfile.TemporaryDirectory() as folder, causal_attention():
        report = Path(folder) / "kept.json"
        recipe = [modifier(sparsity=0.25, report_path=str(report))]
        start = time.process_time()
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            processor=_tokenizer(),
            num_calibration_samples=sequences,
            max_seq_length=LENGTH,
            **options,
        )
        seconds = time.process_time() - start
        return seconds, parse_json(report.read_bytes())


def measure(
    dtype: torch.dtype, pipeline: str, every: bool, sequences: int, rounds: int
) -> dict[str, object]:
    """One row.

    Args:
        dtype: of the model.
        pipeline: of llm-compressor.
        every: its `moe_calibrate_all_experts`, on by default: every expert sees every token.
        sequences: of `LENGTH` tokens.
        rounds: of both modifiers in turn.

    Raises:
        SystemExit: they keep different experts in the first MoE layer, whose inputs are the same.
    """
    options = {"pipeline": pipeline, "moe_calibrate_all_experts": every}
    taken: dict[str, list[float]] = {"alone": [], "ours": []}
    with tempfile.TemporaryDirectory(prefix="reap-llmc-") as source:
        cpu_model.build(dtype).save_pretrained(source)
        for _ in range(rounds):
            kept = {}
            for name, modifier in _modifiers().items():
                seconds, kept[name] = _pruned(modifier, Path(source), sequences, options)
                taken[name].append(seconds)
    first = next(iter(kept["alone"]))
    if kept["alone"][first] != kept["ours"][first]:
        raise SystemExit(f"{first}: {kept['alone'][first]} alone, {kept['ours'][first]} ours")
    ratios = [alone / ours for alone, ours in zip(taken["alone"], taken["ours"], strict=True)]
    same = sum(kept["alone"][block] == kept["ours"][block] for block in kept["alone"])
    return {
        "llmcompressor": rows.version("llmcompressor"),
        "dtype": str(dtype).removeprefix("torch."),
        "pipeline": pipeline,
        "all_experts": "yes" if every else "no",
        "sequences": sequences,
        "length": LENGTH,
        "rounds": rounds,
        "alone_s": f"{statistics.median(taken['alone']):.2f}",
        "ours_s": f"{statistics.median(taken['ours']):.2f}",
        "alone/ours": f"{statistics.median(ratios):.2f}",
        "lowest_ratio": f"{min(ratios):.2f}",
        "layers_alike": f"{same} of {len(kept['alone'])}",
    }


def main(arguments: list[str]) -> None:
    """Runs both pipelines, with every expert for every token and without, and appends the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench llm_compressor_cpu", description=__doc__)
    parser.add_argument("--sequences", type=int, default=16, help="sequences of 512 tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--pipeline", choices=("basic", "sequential"), action="append")
    parser.add_argument("--all-experts", choices=("yes", "no"), action="append")
    parser.add_argument("--dry-run", action="store_true", help="print rows, do not append them")
    options = parser.parse_args(arguments)
    if util.find_spec("llmcompressor") is None:
        raise SystemExit(INSTALL)
    torch.set_num_threads(1)
    for pipeline in options.pipeline or ("basic", "sequential"):
        for every in options.all_experts or ("yes", "no"):
            row = measure(
                getattr(torch, options.dtype),
                pipeline,
                every == "yes",
                options.sequences,
                options.rounds,
            )
            if options.dry_run:
                print(row, flush=True)
            else:
                rows.write("llm_compressor_cpu", [row])
