"""Runs one benchmark by name: `python -m bench NAME [options]`."""

import importlib
import sys

BENCHMARKS = {
    "observe_cpu": "observed forward beside transformers' unobserved one and all-experts, CPU",
    "first_call_cpu": "first observed forward beside the second: what checking layers costs, CPU",
    "gram_cpu": "observed forward with Gram matrices beside that without, CPU",
    "accuracy_cpu": "error of every statistic against a float64 oracle, CPU",
    "aot": "every kernel compiled for five architectures, its code inspected; needs no GPU",
    "ptxas": "reap_kernels._C built for every architecture, its kernels inspected; needs no GPU",
    "obs_cpu": "neurons removed by Optimal Brain Surgeon: bundled model, Qwen3's shape; CPU",
    "host_call_cpu": "host time of one small layer call, and of its parts, on the CPU",
    "calibration_cpu": "records read, tokenized and packed beside the tokenizer alone, CPU",
    "gpu": "everything a GPU is needed for: checks, layer timings, a whole model",
    "criteria_cpu": "criteria and allocations on held-out text, five calibration draws; CPU",
    "methods_cpu": "methods of pruning on held-out text, five draws; unseen domains; CPU",
    "demo": "the demo's perplexities and agreements, as rows",
    "plan_cpu": "`reap-kernels plan` on 92 layers of 512 experts in eight parts, step by step; CPU",
    "refit_cpu": "re-fit of a pruned model in observing passes of the same text; CPU",
    "search_cpu": "budgets searched on the bundled model: cost, acceptance on held-out text; CPU",
    "startup": "import and --help time beside `import torch`",
    "stream_cpu": "a checkpoint observed layer by layer beside resident: time, bytes, memory; CPU",
    "ranks_cpu": "one to three processes under torchrun beside one; CPU",
    "large_checkpoint": "a 29-GB checkpoint observed, killed, resumed and pruned in 8 GB; CPU",
    "llm_compressor_cpu": "llm-compressor's REAP alone and with our modifier; CPU",
    "vllm_cpu": "a layer of vLLM as our plugin leaves, masks and observes it, beside its own; CPU",
    "bench_writer": "checkpoint writer beside cp, 8 GB",
}


def main() -> None:
    """Dispatches to the benchmark's own `main`."""
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        print(__doc__)
        for name, what in BENCHMARKS.items():
            print(f"  {name:14} {what}")
        sys.exit(0 if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help") else 2)
    importlib.import_module(f"bench.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
