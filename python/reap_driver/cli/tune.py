"""`reap-kernels tune`: measure the kernels' launches on this machine's GPU, save a launch table."""

import argparse
from pathlib import Path
from typing import Any

from reap_driver.cli.arguments import add_overwrite
from reap_driver.workflow.console import Console

NAME = "tune"
SUMMARY = "measure which kernels and tiles are fastest on this GPU, save a launch table"
DESCRIPTION = """\
Times the tiles of the grouped products for the layers of a model, on this machine's GPU, then the
backends of each stage: Triton or, if it is built, CUDA for the sort and saliency; our products or
torch's grouped_mm. Saves the fastest as a launch table; the shipped tables work without it. Only
the model's configuration is read, no weights. Point REAP_TUNING at the file to use it.
"""
EXAMPLES = """\
examples:
  reap-kernels tune MODEL --out launches.json
  reap-kernels tune --shape 128,8,2048,768 --dtype bfloat16 --out launches.json
  REAP_TUNING=launches.json reap-kernels observe MODEL --data code.jsonl \\
      --out stats.safetensors
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Shapes, dtype, output."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "model", metavar="MODEL", nargs="?", help="checkpoint folder or hub id; for its shapes"
    )
    what.add_argument(
        "--shape",
        type=shape,
        action="append",
        metavar="E,K,H,I",
        help="experts, experts a token, hidden size, width of an expert; may be repeated",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="where to save the table (.json)"
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="of the weights (default: %(default)s; bfloat16 and float16 share a table)",
    )
    parser.add_argument("--device", help="the GPU (default: cuda, the current one)")
    add_overwrite(parser)
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run model code that comes with the checkpoint; read it first",
    )


def shape(text: str) -> tuple[int, int, int, int]:
    """E,K,H,I."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not E,K,H,I, four whole numbers above 0 such as 128,8,2048,768"
        )
    experts, top_k, hidden, intermediate = (int(part) for part in parts)
    if top_k > experts:
        raise argparse.ArgumentTypeError(f"{text!r} routes to {top_k} of {experts} experts")
    return experts, top_k, hidden, intermediate


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measures and saves."""
    import torch

    from reap_driver.workflow.inspection import device_of, inspect_model
    from reap_driver.workflow.options import RunOptions
    from reap_driver.workflow.outputs import check_file
    from reap_kernels.errors import BackendUnavailable
    from reap_kernels.tune import Measured, Shape, tune

    inputs = [Path(args.model)] if args.model and Path(args.model).exists() else []
    check_file(args.out, overwrite=args.overwrite, inputs=inputs)
    if args.device is None and not torch.cuda.is_available():
        raise BackendUnavailable(
            "tune times kernels on a GPU, and torch sees none here; run it where `reap-kernels "
            "doctor` shows one"
        )
    where = device_of(RunOptions(device=args.device or "cuda"))
    shapes = [Shape(*sizes) for sizes in args.shape or ()]
    if args.model is not None:
        keys = ("num_experts", "top_k", "hidden_size", "intermediate_size")
        model = inspect_model(args.model, trust_remote_code=args.trust_remote_code)
        layers = model.provenance["layers"].values()
        shapes = list(dict.fromkeys(Shape(*(facts[key] for key in keys)) for facts in layers))
    counts = {"measured": 0, "refused": 0}
    with console.progress("measuring launches", "launch") as progress:

        def seen(measured: Measured) -> None:
            counts["refused" if measured.milliseconds is None else "measured"] += 1
            progress.add(1)

        table = tune(shapes, getattr(torch, args.dtype), where, seen=seen)
    table.save(args.out)
    console.say(
        f"measured {counts['measured']} launches on {table.arch} ({counts['refused']} could not "
        f"serve); wrote {args.out}: use it with REAP_TUNING={args.out}"
    )
    facts: dict[str, Any] = {"out": str(args.out), "arch": table.arch, "origin": table.origin}
    return {**facts, **counts, "entries": [entry.as_json() for entry in table.entries]}
