"""Options that say how many experts go, and which, for the commands that rank."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap_driver.cli.options import positive
from reap_driver.plan.criteria import CRITERIA, criterion_named

if TYPE_CHECKING:  # they import torch, and --help must not
    from reap_driver.plan.criteria import Scores
    from reap_driver.plan.plan import Plan
    from reap_kernels import SaliencyStats
    from reap_kernels.schema import Kind

SUPER = "super"
# What --protect takes: SUPER, ids of layers, or a file of them.
Protected = str | tuple[str, tuple[int, ...]] | Path


def add_ranking(parser: argparse.ArgumentParser, *, searched: bool = False) -> None:
    """How many experts go, and which; no allocation to choose where it is searched."""
    group = parser.add_argument_group("which experts go")
    group.add_argument(
        "--ratio",
        type=float,
        default=0.5,
        help="share of experts to remove, above 0 and below 1 (default: %(default)s)",
    )
    group.add_argument(
        "--criterion",
        type=criterion,
        default="reap",
        metavar="NAME",
        help="what experts are ranked by (default: %(default)s); one of "
        + "; ".join(f"{name}: {c.formula}" for name, c in CRITERIA.items())
        + "; S(b,alpha,p): n^-b sum g^alpha ||f||^p; random:SEED: by chance, to compare with",
    )
    group.add_argument(
        "--weights",
        type=weights,
        metavar="GROUP=W,...",
        help="count the groups as if their tokens had these shares (default: as observed)",
    )
    group.add_argument(
        "--protect",
        type=protected,
        action="append",
        default=[],
        metavar="WHAT",
        help="experts that stay; again for more: super for those with extreme activations (above "
        "the 99.5th percentile and a tenth of the largest); LAYER:ID,ID for experts by id; or a "
        "JSON or YAML file {LAYER: [ID, ...]}",
    )
    _add_allocation(parser, searched)


def _add_allocation(parser: argparse.ArgumentParser, searched: bool) -> None:
    """How many experts each layer loses."""
    group = parser.add_argument_group(
        "how many experts each layer loses",
        "LAYER is the name of an experts module, the number in it, or a pattern such as '*.3.*'.\n"
        "Transformers and serving engines read one number of experts for all layers, so every\n"
        "choice here but the default makes a checkpoint they cannot load as it is.",
    )
    if searched:
        parser.set_defaults(allocation="uniform", normalize=None)
    else:
        group.add_argument(
            "--allocation",
            choices=("uniform", "global"),
            default="uniform",
            help="uniform (default): the same share of each layer; global: the lowest scores of "
            "all layers together, but never more than a router can spare",
        )
        group.add_argument(
            "--normalize",
            choices=("mean", "max", "none"),
            help="with --allocation global: divide each layer's scores by their mean (default) or "
            "maximum before comparing layers, or compare them as they are",
        )
    group.add_argument(
        "--layer-ratios",
        type=Path,
        metavar="FILE",
        help="JSON or YAML {LAYER: RATIO} of layers that lose another share, 0 for none, as for "
        "layers that no token reached; of several that fit a layer the last counts; the other "
        "layers lose --ratio all the same",
    )
    for end, where in (("first", "first"), ("last", "last")):
        group.add_argument(
            f"--skip-{end}",
            type=positive,
            default=0,
            metavar="N",
            help=f"keep all experts of the {where} N MoE layers; the others lose no more for it",
        )
    parser.set_defaults(refuse=parser.error)


def check_ranking(args: argparse.Namespace) -> None:
    """Ends with a usage error where arguments contradict each other."""
    if args.normalize is not None and args.allocation != "global":
        args.refuse("argument --normalize: only with --allocation global, which compares layers")


def planned(
    args: argparse.Namespace, scores: "Scores", stats: "SaliencyStats | None" = None
) -> "Plan":
    """The plan that the arguments ask for.

    Args:
        args: of `add_ranking`.
        scores: of every layer.
        stats: what they are of; None where there are none yet, and super experts are unknown.

    Raises:
        DataError: a file cannot be read or holds something else.
        PlanError: a layer or an expert that was named is not there, or the plan is not possible.
    """
    from reap_driver.plan.planner import make_plan

    return make_plan(
        scores,
        args.ratio,
        allocation=args.allocation,
        protected=_protected(args, scores, stats),
        layer_ratios=_layer_ratios(args, list(scores), scores.unobserved),
        normalize=args.normalize,
    )


def foreseen(args: argparse.Namespace, blank: "Scores") -> "list[Plan]":
    """Plans as far from each other as those that the arguments can lead to, before any statistics.

    A uniform allocation removes as many experts of a layer whatever their scores. A global one may
    empty the first layers as far as it can and leave the last alone: that is the second plan.

    Args:
        blank: scores of the model that is to be pruned; their values do not matter.
    """
    from reap_driver.plan.criteria import Scores

    plans = [planned(args, blank)]
    if args.allocation == "global":
        highest = max(len(values) for values in blank.values())
        rising = {name: v + n * highest for n, (name, v) in enumerate(blank.items())}
        facts = {"model": blank.model, "layers": blank.layers}
        scores = Scores(rising, criterion=blank.criterion, provenance=facts)
        extreme = argparse.Namespace(**{**vars(args), "normalize": "none"})
        plans.append(planned(extreme, scores))
    return plans


def _protected(
    args: argparse.Namespace, scores: "Scores", stats: "SaliencyStats | None"
) -> dict[str, frozenset[int]]:
    """{layer: ids} of everything --protect names."""
    from reap_driver.plan.scoring import score
    from reap_driver.plan.selection import protected_experts, super_experts

    wanted: list[tuple[str, tuple[int, ...]]] = []
    for what in args.protect:
        if isinstance(what, tuple):
            wanted.append(what)
        elif isinstance(what, Path):
            for layer, ids in _read(what, _Experts()).items():
                wanted.append((layer, tuple(ids if isinstance(ids, list) else [ids])))
        elif stats is not None:
            peaks = super_experts(score(stats, "max_activation"))
            wanted += [(layer, tuple(ids)) for layer, ids in peaks.items()]
    return protected_experts(wanted, {name: len(values) for name, values in scores.items()})


def _layer_ratios(
    args: argparse.Namespace, layers: list[str], unobserved: list[str]
) -> dict[str, float]:
    """{layer: ratio} of layers that do not lose --ratio; --skip-first and --skip-last count those
    that were observed.
    """
    from reap_driver.plan.selection import select_layers
    from reap_kernels.errors import PlanError
    from reap_kernels.schema import Real

    path, share = args.layer_ratios, Real(low=0, below=1)
    found: dict[str, float] = {}
    for selector, ratio in (_read(path, share) if path else {}).items():
        found |= dict.fromkeys(select_layers(selector, [*layers, *unobserved]), float(ratio))
    first, last = args.skip_first, args.skip_last
    if first + last >= len(layers) > 0:
        raise PlanError(
            f"--skip-first {first} and --skip-last {last} leave none of the {len(layers)} MoE "
            "layers to prune; skip fewer"
        )
    skipped = [*layers[:first], *layers[len(layers) - last :]]
    return found | dict.fromkeys(skipped, 0.0)


class _Experts:
    """An id of an expert, or a list of them."""

    def check(self, value: Any, at: str) -> None:
        from reap_kernels.schema import Int, ListOf

        ids = Int()
        (ListOf(ids) if isinstance(value, list) else ids).check(value, at)


def _read(path: Path, kind: "Kind") -> dict[str, Any]:
    """A JSON or YAML mapping from layers to what `kind` says; layers can be numbers there.

    Raises:
        DataError: the file cannot be read, or a value in it is something else.
    """
    from reap_driver.base.yaml_text import MAX_BYTES, parse_yaml
    from reap_kernels.documents import read_bytes
    from reap_kernels.errors import DataError
    from reap_kernels.schema import MapOf, Mismatch, check

    try:
        content: dict[str, Any] = parse_yaml(read_bytes(path, MAX_BYTES))  # JSON is YAML
        check(content, MapOf(kind, shortest=1))
    except Mismatch as error:
        raise DataError(f"{path}: {error}; see --help for what it should hold") from error
    except ValueError as error:
        raise DataError(f"{path} {error}; correct the file") from error
    return content


def criterion(text: str) -> str:
    """Name of a criterion."""
    try:
        criterion_named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def protected(text: str) -> Protected:
    """`super`, LAYER:ID,ID or a JSON or YAML file."""
    if text == SUPER:
        return text
    if found := re.fullmatch(r"(.+):(\d+(?:,\d+)*)", text):
        return found[1], tuple(int(number) for number in found[2].split(","))
    if Path(text).suffix in (".json", ".yaml", ".yml"):
        return Path(text)
    raise argparse.ArgumentTypeError(
        f"{text!r} is not super, LAYER:ID,ID such as 3:17,40, or a .json or .yaml file"
    )


def weights(text: str) -> dict[str, float]:
    """GROUP=NUMBER, separated by commas."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise argparse.ArgumentTypeError(f"{part!r} is not GROUP=NUMBER, such as code=0.7")
    return found
