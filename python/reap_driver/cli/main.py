"""The command line: parses, runs one command, and turns its outcome into text or JSON and an exit
code.

Nothing here imports torch, so `--help` answers at once; a command imports what it needs when it
runs. Exit codes: 0 done, 2 usage, 3 bad input, 4 resources, 128 and a signal's number where one
ended the run: 130 for Ctrl-C, 143 for SIGTERM. Errors are one line on stderr; with --json they are
a JSON object on stdout too.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from reap_driver.base.interrupts import Interrupted, Terminated, terminations_raised
from reap_driver.base.requirements import Unmet, check
from reap_driver.cli.arguments import add_output
from reap_driver.cli.commands import COMMANDS
from reap_driver.cli.help import Help, usage
from reap_driver.workflow.console import Console, emit, flags, printable

PROGRAM = "reap-kernels"
USAGE, BAD_INPUT, RESOURCES = 2, 3, 4

_DESCRIPTION = """\
Make a Mixture-of-Experts model smaller by removing the experts that matter least on your data.

One command does it all; it reads the model, writes a new checkpoint, and never touches the old one:

  reap-kernels prune MODEL --data code.jsonl --ratio 0.5 --out MODEL-half

The same in steps, so that you can observe once and try several plans:

  reap-kernels observe MODEL --data code.jsonl --out stats.safetensors
  reap-kernels plan stats.safetensors --ratio 0.5 --out plan.json
  reap-kernels apply MODEL plan.json --out MODEL-half

MODEL is a Hugging Face checkpoint folder (safetensors) or a hub id. No model at hand? Try:

  reap-kernels demo
"""

_EPILOG = """\
`reap-kernels COMMAND --help` explains a command, with examples.
Exit codes: 0 done, 2 wrong usage, 3 bad input, 4 out of disk, memory or backend, 130 interrupted,
143 terminated.
"""


class UsageError(Exception):
    """The command line does not parse; carries argparse's message and the usage line."""

    def __init__(self, message: str, usage: str) -> None:
        super().__init__(message)
        self.usage = usage


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that `main` reports every error in one way."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.format_usage())


def build_parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of the whole command line.

    Args:
        words: that it will parse. Where the first one names a command, the other commands are
            made without their arguments, which would take most of the time.
    """
    parser = _Parser(
        prog=PROGRAM,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    named = {command.NAME for command in COMMANDS} & set(words[:1])
    for command in COMMANDS:
        sub = commands.add_parser(
            command.NAME,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            epilog=command.EXAMPLES,
            formatter_class=Help,
            allow_abbrev=False,
        )
        if named and command.NAME not in named:
            continue
        command.configure(sub)
        add_output(sub)
        sub.usage = usage(sub)
        sub.set_defaults(run=command.run, usage=sub.format_usage)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: arguments without the program's name; default those of this process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words
    try:
        with terminations_raised():
            return _run(words, as_json=as_json)
    except UsageError as error:
        print(error.usage, end="", file=sys.stderr)
        return _fail("UsageError", str(error), USAGE, as_json)
    except Unmet as error:
        return _fail("ImportError", str(error), RESOURCES, as_json)
    except KeyboardInterrupt as error:
        text = str(error) or "interrupted; no half-written output is left behind"
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        return _fail("KeyboardInterrupt", text, 128 + number, as_json)
    except Terminated as error:
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun ends its ranks so; one has said why
            return 128 + error.number
        name = signal.Signals(error.number).name
        text = f"ended by {name}; no half-written output is left behind"
        return _fail("Terminated", text, 128 + error.number, as_json)
    except Exception as error:
        known = _explain(error)
        if known is None:  # a bug: its traceback says where
            raise
        return _fail(type(error).__name__, *known, as_json, getattr(error, "known", {}))


def _run(words: Sequence[str], *, as_json: bool) -> int:
    """Parses and runs one command.

    Raises:
        UsageError: the words are no command line.
    """
    for word in words:
        if word != word.encode(errors="replace").decode():
            raise UsageError(
                f"argument {word!r}: its bytes are no UTF-8 text, and no file could record such a "
                "name; rename it (or, where the name is fine, set PYTHONUTF8=1)",
                "",
            )
    args = build_parser(words).parse_args(words)
    if args.version:
        check()
        from reap_kernels import __version__

        emit(f"{PROGRAM} {__version__}")
        return 0
    if args.command is None:
        raise UsageError("a COMMAND is missing", build_parser().format_help())
    check()
    console = Console(quiet=args.quiet, as_json=as_json)
    try:
        with console.library_progress():
            result = args.run(args, console)
    except Exception as error:
        from reap_driver.workflow.errors import OptionError  # with it comes torch

        if not isinstance(error, OptionError):
            raise
        raise UsageError(flags(str(error)), args.usage()) from error
    if as_json and result is not None:  # of several ranks, one has something to say
        facts = result if isinstance(result, dict) else result.facts()
        emit(json.dumps({"command": args.command, **facts}))
    return 0


def _fail(
    kind: str, message: str, code: int, as_json: bool, known: Mapping[str, Any] | None = None
) -> int:
    """Reports an error on stderr (and as JSON on stdout, after what was known when it occurred);
    returns its exit code.
    """
    line = printable(flags(" ".join(message.split())))
    if os.environ.get("WORLD_SIZE", "1") != "1":
        line = f"rank {os.environ.get('RANK', '?')}: {line}"
    print(f"{PROGRAM}: error: {line}", file=sys.stderr)
    if as_json:
        facts = {"type": kind, "message": line, "exit_code": code}
        emit(json.dumps({**(known or {}), "error": facts}))
    return code


def _explain(error: Exception) -> tuple[str, int] | None:
    """Message and exit code of an error a user can do something about; None for any other."""
    from reap_kernels.errors import ReapError

    if isinstance(error, ReapError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError) or _out_of_memory(error):
        remedy = "use a smaller `seq_len` or `batch_size`, a narrower `dtype`, or a larger machine"
        return f"out of memory ({_first_line(error)}); {remedy}", RESOURCES
    if isinstance(error, OSError):
        return _explain_os(error)
    return _explain_library(error)


def _explain_library(error: Exception) -> tuple[str, int] | None:
    """What the library raised in a model's own code, called with a configuration it cannot serve;
    None where the error is in code of ours, or of theirs that ours was wrong to call.
    """
    from reap_driver.compat.library_errors import described, place_in_library

    place = place_in_library(error)
    if place is None:
        return None
    remedy = (
        "check config.json and the model's other files, or use the transformers version they were "
        "made for"
    )
    return f"the model cannot be run: {place} failed ({described(error)}); {remedy}", BAD_INPUT


def _explain_os(error: OSError) -> tuple[str, int]:
    from reap_kernels.files import NO_SPACE

    full = error.errno in NO_SPACE
    remedy = "free some space or choose another disk" if full else "check the path and its rights"
    what = f"{error.filename}: {error.strerror}" if error.filename else _first_line(error)
    return f"{what}; {remedy}", RESOURCES if full else BAD_INPUT


def _out_of_memory(error: Exception) -> bool:
    """Whether torch failed to allocate, on a GPU or on the CPU (a plain RuntimeError there)."""
    import torch

    text = str(error)
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text
    return isinstance(error, torch.OutOfMemoryError) or on_cpu


def _first_line(error: BaseException) -> str:
    lines: list[Any] = str(error).strip().splitlines()
    return str(lines[0]) if lines else type(error).__name__
