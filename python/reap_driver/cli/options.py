"""Options that several commands share, and the types of their values."""

import argparse
import re

SEQ_LEN = 2048
FOLDS = 8
PACKINGS = ("concat", "isolated", "none")


def add_common(parser: argparse.ArgumentParser) -> None:
    """--json and --quiet, of every command."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout (errors too)"
    )
    group.add_argument(
        "-q", "--quiet", action="store_true", help="print no progress, notes or results"
    )


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """--overwrite."""
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what is there, once the new is complete"
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """--trust-remote-code."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run model or tokenizer code that comes with the checkpoint; read it first",
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """What is observed, and how the model runs."""
    group = add_data(parser)
    group.add_argument(
        "--folds",
        type=positive,
        default=FOLDS,
        metavar="F",
        help="deal the sequences of each source to F shares and keep the statistics of each beside "
        "those of the whole, which tell how far a plan depends on the sample (default: "
        "%(default)s; 1: none)",
    )
    add_running(parser)
    _add_journal(parser)
    _add_dry_run(parser)


def add_data(parser: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    """What text the model runs on, for every command that runs it; `check_data` checks them."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="[GROUP=]SOURCE[:N]",
        help="a .jsonl, .parquet or .txt file, compressed or not, a folder of them, or a data set "
        "of the hub, owner/name[subset](split); :N takes a random sample of N records, :2Mtok one "
        "of 2 million tokens; GROUP names the statistics (default: the file's name); give it again "
        "for more",
    )
    group.add_argument(
        "--recipe",
        action="append",
        default=[],
        metavar="FILE",
        help="sources listed in a .yaml or .json file, or a recipe that comes along, by name",
    )
    group.add_argument(
        "--packing",
        choices=PACKINGS,
        default=PACKINGS[0],
        help="how documents make sequences: concat (default) end to end, attention crossing their "
        "boundaries as in the reference implementation; isolated, the same but kept apart, where "
        "the model can; none, a sequence for every document",
    )
    group.add_argument(
        "--seq-len",
        type=positive,
        metavar="L",
        help=f"tokens in a sequence (default: {SEQ_LEN}, or the model's maximum if that is less)",
    )
    group.add_argument(
        "--max-len",
        type=positive,
        metavar="L",
        help="with --packing none: tokens after which a document is cut off (same default)",
    )
    group.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    _add_reading(group)
    parser.set_defaults(refuse=parser.error)
    return group


def _add_reading(group: "argparse._ArgumentGroup") -> None:
    """How records are read."""
    group.add_argument(
        "--answers-only",
        action="store_true",
        help="count only what the assistant says, or the answer to an instruction or prompt; the "
        "rest is read, not counted",
    )
    group.add_argument(
        "--enable-thinking",
        action=argparse.BooleanOptionalAction,
        help="for chat templates that know it (default: as the template has it)",
    )
    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out records that are malformed or that the chat template refuses, and count "
        "them, instead of ending",
    )
    group.add_argument(
        "--no-cache",
        dest="cache",
        action="store_false",
        help="tokenize again, and keep nothing for the next run",
    )


def add_running(parser: argparse.ArgumentParser) -> None:
    """Where and how the model runs, for every command that runs it."""
    run = parser.add_argument_group("running the model")
    run.add_argument(
        "--batch-size",
        type=batch_size,
        default="auto",
        metavar="B",
        help="sequences at a time (of --packing none: as many documents as have their tokens): a "
        "whole number, or auto (default) for as many as give an expert 256 rows on average "
        "and a GPU 16384 tokens, within half of the memory that is free once the model "
        "is loaded; another size changes rounding only: the model's own, and the sums' (about "
        "1e-12)",
    )
    run.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, ... (default: a GPU where there is one, each rank its own)",
    )
    run.add_argument(
        "--device-map",
        choices=("auto", "balanced", "balanced_low_0", "sequential"),
        metavar="MAP",
        help="spread the model over GPUs, main memory and disk as accelerate does by this name: "
        "auto, balanced, balanced_low_0 or sequential; one sequence at a time unless --batch-size "
        "says more",
    )
    run.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="of the weights in memory (default: as in the checkpoint)",
    )
    run.add_argument(
        "--backend", help="kernels to use, without falling back; `reap-kernels doctor` lists them"
    )
    run.add_argument(
        "--stream",
        choices=("auto", "always", "never"),
        default="auto",
        help="hold one decoder layer in memory at a time, each read once for all data: auto "
        "(default) where the whole model would take more than 90%% of the memory that is free",
    )


def _add_journal(parser: argparse.ArgumentParser) -> None:
    """--resume and what is written for it."""
    group = parser.add_argument_group(
        "journal",
        "Statistics and position are kept beside the output, in OUT.journal, until it is written:\n"
        "after each decoder layer of a streamed model, after batches of a resident one.",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on where an interrupted run of the same command stopped; the outcome has the bits "
        "of a run that was never interrupted",
    )
    group.add_argument(
        "--journal-every",
        type=positive,
        metavar="N",
        help="write it every N layers or batches (default: as often as takes less than 5%% of the "
        "time)",
    )
    group.add_argument(
        "--no-journal", dest="journal", action="store_false", help="write none; Ctrl-C ends at once"
    )


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    """--dry-run and --tokens; what they make optional is checked by `check_calibration`."""
    group = parser.add_argument_group("planning")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print what the run would read, hold and compute, and how long that takes at the "
        "rates measured here; write nothing. MODEL may have no weights, or be a config .json file; "
        "--out may be left out",
    )
    group.add_argument(
        "--tokens",
        type=count,
        metavar="N",
        help="with --dry-run: plan for N tokens, such as 24M, instead of reading data",
    )


def check_data(args: argparse.Namespace) -> None:
    """Ends with a usage error where options of `add_data` contradict each other."""
    apart = args.packing == "none"
    if args.max_len is not None and not apart:
        args.refuse(
            "argument --max-len: only with --packing none; packed sequences have --seq-len tokens"
        )
    if args.seq_len is not None and apart:
        args.refuse(
            "argument --seq-len: not together with --packing none, where a sequence is a document; "
            "give --max-len to cut long ones"
        )


def check_calibration(args: argparse.Namespace) -> None:
    """Ends with a usage error where arguments are missing, or contradict each other."""
    check_data(args)
    if args.resume and not args.journal:
        args.refuse("argument --resume: not together with --no-journal, which leaves none")
    if args.device_map is not None and (args.device != "auto" or args.stream == "always"):
        args.refuse(
            "argument --device-map: not together with --device or --stream always; a map says "
            "where every layer is"
        )
    _check_planning(args)


def _check_planning(args: argparse.Namespace) -> None:
    """That data and output are there, or a dry run needs none."""
    data = bool(args.data or args.recipe)
    if args.tokens is not None and not args.dry_run:
        args.refuse(
            "argument --tokens: only with --dry-run; a real run counts the tokens of --data"
        )
    if args.tokens is not None and data:
        given = "--data" if args.data else "--recipe"
        args.refuse(f"argument --tokens: not together with {given}, whose tokens are counted")
    if args.dry_run and args.tokens is None and not data:
        args.refuse("argument --dry-run: give --tokens N, or the --data to count them in")
    missing = [
        name for name, there in (("--out", args.out), ("--data or --recipe", data)) if not there
    ]
    if missing and not args.dry_run:
        args.refuse(f"the following arguments are required: {', '.join(missing)}")


def add_force_model(parser: argparse.ArgumentParser) -> None:
    """Plans of other models."""
    parser.add_argument(
        "--force-model",
        action="store_true",
        help="take a plan of a model that routes otherwise or has other sizes, where it can be "
        "applied at all, and note what differs; a plan of a model that differs in neither, such as "
        "the base of a fine-tuned one, is taken anyway",
    )


def add_writing(parser: argparse.ArgumentParser) -> None:
    """How the checkpoint is written."""
    group = parser.add_argument_group("writing the checkpoint")
    group.add_argument(
        "--mtp",
        choices=("drop", "keep"),
        default="drop",
        help="multi-token-prediction layers: leave them out (default), or keep them where they "
        "have no experts of their own",
    )
    group.add_argument(
        "--shard-size",
        type=size,
        metavar="BYTES",
        help="largest weight file, such as 5GB (default: as the source is divided)",
    )
    group.add_argument(
        "--non-uniform",
        action="store_true",
        help="write a checkpoint whose layers keep different numbers of experts, where the plan "
        "says so; reap-kernels and the load_pruned.py in DIR load it, transformers' own "
        "from_pretrained, vLLM and SGLang do not",
    )


def positive(text: str) -> int:
    """A whole number above 0."""
    if not re.fullmatch(r"\d+", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def count(text: str) -> int:
    """A whole number above 0, with k, M, G or T (powers of 1000)."""
    value = _scaled(text, r"(\d+(?:\.\d+)?)([kMGT]?)")
    if value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens such as 24M or 65536")
    return int(value)


def batch_size(text: str) -> int | None:
    """A whole number above 0, or `auto`: None."""
    if text == "auto":
        return None
    try:
        return positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor auto") from error


def size(text: str) -> int:
    """Bytes, with kB, MB, GB or TB (powers of 1000)."""
    value = _scaled(text, r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?")
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 800MB")
    return int(value)


def _scaled(text: str, pattern: str) -> float:
    """A number and its power of 1000, as `pattern` finds them; 0 where it does not fit."""
    match = re.fullmatch(pattern, text)
    return float(match[1]) * 1000 ** " kMGT".index(match[2] or " ") if match else 0
