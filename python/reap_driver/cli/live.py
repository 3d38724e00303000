"""`reap-kernels live`: watch a vLLM server that runs with our plugin, and tell it what to do."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap_driver.cli.arguments import add, add_output, add_overwrite, positive, read, words
from reap_driver.cli.help import Help, usage
from reap_driver.workflow.console import Console
from reap_driver.workflow.fields import refused
from reap_driver.workflow.rank_options import (
    RATIO,
    AllocationOptions,
    BudgetOptions,
    RankOptions,
)

if TYPE_CHECKING:  # it imports torch, and --help must not
    from reap_driver.integrations.vllm.client import Server
    from reap_driver.integrations.vllm.live.look import Wanted

NAME = "live"
SUMMARY = "watch, plan and mask the experts of a running vLLM server"
DESCRIPTION = """\
Talks to a server that was started with `VLLM_PLUGINS=reap vllm serve MODEL`. Without an ACTION it
shows what the server observes: tokens, the scores of all experts as a strip per layer, the margin
of the plan that they would give now, and the mask in force. On a terminal it goes on until q or
Ctrl-C; elsewhere it prints the picture once.

An ACTION is done once, for scripts. Statistics that `save` writes are those of `observe`: plan,
report and apply take them. A mask hides experts from the router of the running model, as if they
were removed; what `plan` writes can be masked, judged, and unmasked.

The server's API key is read from the variable VLLM_API_KEY.
"""
EXAMPLES = """\
examples:
  reap-kernels live http://127.0.0.1:8000
  reap-kernels live http://127.0.0.1:8000 start --groups code,chat
  reap-kernels live http://127.0.0.1:8000 start --mode shadow --every 8
  reap-kernels live http://127.0.0.1:8000 status --json
  reap-kernels live http://127.0.0.1:8000 stop
  reap-kernels live http://127.0.0.1:8000 save stats.safetensors
  reap-kernels live http://127.0.0.1:8000 plan --ratio 0.25 --out plan.json
  reap-kernels live http://127.0.0.1:8000 mask plan.json
  reap-kernels live http://127.0.0.1:8000 mask off
"""
_OFF = "off"
_INTERVAL, _CRITERION = 5.0, "reap"
# Arguments of the view, and their flags.
_VIEW = {
    "once": "--once",
    "interval": "--interval",
    "shown_ratio": "--ratio",
    "shown_criterion": "--criterion",
}
_SHOWN = ("shown_ratio", "shown_criterion")
_OF_PICTURES = ("once", *_SHOWN)
_STATUS, _PLAN = "status", "plan"


def configure(parser: argparse.ArgumentParser) -> None:
    """The server, the view, and the actions."""
    parser.add_argument("url", metavar="URL", help="of the server, such as http://127.0.0.1:8000")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="seconds to wait for an answer (default: %(default)g)",
    )
    view = parser.add_argument_group("view")
    view.add_argument(
        "--once", action="store_true", help="print the picture once, without colors, and end"
    )
    view.add_argument(
        "--interval",
        type=_seconds,
        metavar="S",
        help=f"seconds from one look to the next (default: {_INTERVAL:g})",
    )
    _add_shown(view, None)
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", title="actions", help="done once; see below"
    )
    for name, (summary, described, configured, _) in _ACTIONS.items():
        sub = actions.add_parser(
            name,
            help=summary,
            description=described,
            formatter_class=Help,
            allow_abbrev=False,
        )
        configured(sub)
        add_output(sub, argparse.SUPPRESS)
        sub.usage = usage(sub)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Does an action, or shows the server."""
    from reap_driver.integrations.vllm.client import Server

    server = Server(args.url, timeout=args.timeout)
    if args.action is None:
        return _view(server, args, console)
    for name, flag in _VIEW.items():
        if getattr(args, name) and not (args.action == _STATUS and name in _OF_PICTURES):
            own = args.action == _PLAN and name in _SHOWN  # the action has one of this name
            behind = f", or put it behind {_PLAN}" if own else ""
            raise refused(f"{flag}: of the view; leave it out{behind}")
    *_, act = _ACTIONS[args.action]
    return {"action": args.action, "url": server.url, **act(server, args, console)}


def _view(server: "Server", args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The picture, once or as long as the user looks."""
    from reap_driver.integrations.vllm.live import screen

    if args.once or args.json or args.quiet or not screen.is_terminal():
        return _status(server, args, console)
    screen.watch(server, _wanted(args), args.interval or _INTERVAL)
    return {"url": server.url}


def _status(server: "Server", args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The picture, once."""
    import time

    from reap_driver.integrations.vllm.live import screen
    from reap_driver.integrations.vllm.live.look import look

    seen = look(server, _wanted(args), time.monotonic())
    console.say(screen.plain(seen))
    return seen.facts()


def _wanted(args: argparse.Namespace) -> "Wanted":
    """The plan whose margin is shown."""
    from reap_driver.integrations.vllm.live.look import Wanted
    from reap_driver.planning.criteria import criterion_named

    wanted = Wanted(args.shown_ratio or RATIO, args.shown_criterion or _CRITERION)
    try:
        criterion_named(wanted.criterion)
    except ValueError as error:
        raise refused(f"`criterion`: {error}") from error
    return wanted


def _configure_status(parser: argparse.ArgumentParser) -> None:
    _add_shown(parser, argparse.SUPPRESS)  # what stands before the action counts, too


def _add_shown(parser: argparse._ActionsContainer, default: Any) -> None:
    """What a picture is of; not by the names that the action `plan` has for its own."""
    parser.add_argument(
        "--ratio",
        type=_share,
        dest="shown_ratio",
        default=default,
        metavar="SHARE",
        help=f"of the plan whose margin is shown (default: {RATIO})",
    )
    parser.add_argument(
        "--criterion",
        dest="shown_criterion",
        default=default,
        metavar="NAME",
        help=f"of the scores that are shown (default: {_CRITERION})",
    )


def _configure_start(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode",
        choices=("replace", "shadow"),
        default="replace",
        help="replace: outputs of layers are made from the observed outputs of experts, equal "
        "within rounding; shadow: they stay bit for bit, and experts run once more (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--every",
        type=positive,
        default=1,
        metavar="N",
        help="observe each Nth step only (default: %(default)s)",
    )
    parser.add_argument(
        "--groups",
        type=words,
        metavar="NAME,...",
        help="calibration groups, which requests name in the header X-Reap-Group; tokens of all "
        "others count as the group all",
    )
    parser.add_argument(
        "--no-reset",
        action="store_true",
        help="go on with the statistics that are there, instead of new ones",
    )


def _start(server: "Server", args: argparse.Namespace, console: Console) -> dict[str, Any]:
    groups = list(args.groups or ())
    status = server.start(args.mode, args.every, groups, not args.no_reset)
    return _said(status, console)


def _stop(server: "Server", _: argparse.Namespace, console: Console) -> dict[str, Any]:
    return _said(server.stop(), console)


def _reset(server: "Server", _: argparse.Namespace, console: Console) -> dict[str, Any]:
    return _said(server.reset(), console)


def _said(status: dict[str, Any], console: Console) -> dict[str, Any]:
    """What a server says after a change of its observation."""
    every = status.get("every") or 1
    which = "" if every == 1 or status["mode"] == "off" else f", one step in {every}"
    tokens = sum(status["groups"].values())
    mode = "not observing" if status["mode"] == "off" else f"observing ({status['mode']}{which})"
    named = f" in the groups {', '.join(status['groups'])}" if len(status["groups"]) > 1 else ""
    console.say(f"{mode}; {tokens:,} tokens counted{named}")
    if status.get("error"):
        console.note(f"the observation had ended itself: {status['error']}")
    return {"status": status}


def _configure_plan(parser: argparse.ArgumentParser) -> None:
    add(parser, RankOptions, AllocationOptions, BudgetOptions)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="where to save the plan"
    )
    add_overwrite(parser)


def _plan(server: "Server", args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from reap_driver.workflow.jobs import PlanOptions
    from reap_driver.workflow.outputs import check_file
    from reap_driver.workflow.plan import make

    check_file(args.out, overwrite=args.overwrite, inputs=[])
    args.stats = server.stats()
    found = make(read(PlanOptions, args), console)
    console.say(
        f"wrote {found.out}; next: reap-kernels live {server.url} mask {found.out}, or "
        f"reap-kernels apply MODEL {found.out} --out DIR"
    )
    return found.facts()


def _configure_mask(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        metavar="FILE",
        help="a plan, a file of `apply --as-masks`, or a Reap-It-Yourself profile; off: no mask "
        "(a file of this name is ./off)",
    )


def _mask(server: "Server", args: argparse.Namespace, console: Console) -> dict[str, Any]:
    said = server.unmask() if args.file == _OFF else server.mask(Path(args.file))
    removed = server.masked()["removed"]
    experts = sum(map(len, removed.values()))
    console.say(
        f"{experts} experts are masked in {len(removed)} layers; `mask off` brings them back"
        if experts
        else "no experts are masked"
    )
    if said.get("in_flight"):
        console.note(str(said["in_flight"]))
    return {"mask": said, "removed": removed}


def _configure_save(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="where to save the statistics on this machine"
    )
    parser.add_argument(
        "--there",
        action="store_true",
        help="save on the server instead, under this name in the folder that its variable "
        "REAP_STATS_FOLDER names",
    )
    add_overwrite(parser)


def _save(server: "Server", args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from reap_driver.workflow.outputs import check_file

    if args.there:
        path = server.save(str(args.file), args.overwrite)
        console.say(f"wrote {path} on the server")
        return {"out": path, "there": True}
    check_file(args.file, overwrite=args.overwrite, inputs=[])
    stats = server.stats(args.file)
    tokens = max(int(layer.tokens.sum()) for layer in stats.layers.values())
    console.say(
        f"wrote {args.file}: {tokens:,} tokens in {len(stats.layers)} layers; next: reap-kernels "
        f"plan {args.file} --out plan.json"
    )
    facts = {"out": str(args.file), "there": False, "tokens": tokens}
    return {**facts, "groups": stats.groups, "layers": len(stats.layers)}


def _configure_nothing(_: argparse.ArgumentParser) -> None:
    """Takes no arguments of its own."""


def _seconds(text: str) -> float:
    """A number of seconds above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


def _share(text: str) -> float:
    """A share above 0 and below 1."""
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0 and below 1, such as 0.5")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


_Action = Callable[["Server", argparse.Namespace, Console], dict[str, Any]]
# Name: its line in --help, its description, its arguments, and what it does.
_ACTIONS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None], _Action]] = {
    _STATUS: (
        "print the picture once",
        "Prints once what the view shows, without colors; with --json, what the server says and "
        "the measures of the view.",
        _configure_status,
        _status,
    ),
    "start": (
        "begin to observe",
        "Begins to observe the requests that the server gets.",
        _configure_start,
        _start,
    ),
    "stop": (
        "end observing; the statistics stay",
        "Ends observing. The statistics stay on the server.",
        _configure_nothing,
        _stop,
    ),
    "reset": (
        "empty the statistics",
        "Empties the statistics on the server.",
        _configure_nothing,
        _reset,
    ),
    "save": (
        "save the statistics",
        "Saves the statistics so far. They are those that `observe` makes of the same tokens.",
        _configure_save,
        _save,
    ),
    _PLAN: (
        "plan from the statistics so far",
        "Makes a plan from the statistics so far, as the command `plan` does.",
        _configure_plan,
        _plan,
    ),
    "mask": (
        "hide experts from the router, or bring them back",
        "Hides the experts that a plan removes from the routers of the running model.",
        _configure_mask,
        _mask,
    ),
}
