"""Profiles of Reap-It-Yourself, an expert pruning at load time proposed for vLLM
(github.com/vllm-project/vllm/pull/37824): pairs of a decoder layer and an expert that goes.
"""

from pathlib import Path
from typing import Any

from reap_driver.interchange.content import ModelFacts, Source
from reap_driver.interchange.json_files import checked, read_json, unfit, write_json
from reap_driver.planning.plan import Plan
from reap_driver.planning.planner import plan_of_kept
from reap_driver.planning.public_provenance import public_name
from reap_kernels.provenance import MAX_EXPERTS
from reap_kernels.schema import Int, Kind, ListOf, Record, Text

WHAT = "Reap-It-Yourself profile"
_VERSION = 1
# Of version 2. Dropping after top-k runs fewer experts for a token, by weights that do not sum to
# what the router meant: no choice of experts before top-k does that.
_MASK, _DROP = "pre_topk_mask", "post_topk_drop"
# The server reads `pruned_experts` alone; the others are for people.
_OTHERS: dict[str, Kind] = {
    "version": Int(_VERSION, 2),
    "routing_mode": Text(choices=(_MASK, _DROP)),
    **dict.fromkeys(("model", "quantization", "workload"), Text(10_000)),
}
_KIND = Record(
    {"pruned_experts": ListOf(ListOf(Int(0, MAX_EXPERTS - 1), 2, 2))}, _OTHERS, open=True
)


def read(path: Path, model: ModelFacts) -> Plan:
    """The plan that a profile is of this model.

    Args:
        path: of the profile.
        model: that it is for.

    Raises:
        PlanError: it is no profile, or not of this model.
    """
    return _plan(read_json(path, WHAT, _KIND), path, model)


def parse(profile: bytes, where: str, model: ModelFacts) -> Plan:
    """The plan that the content of a profile is of this model.

    Args:
        profile: JSON.
        where: names it in messages, such as "the body".
        model: that it is for.

    Raises:
        PlanError: see `read`.
    """
    return _plan(checked(profile, where, WHAT, _KIND), where, model)


def _plan(content: dict[str, Any], where: Path | str, model: ModelFacts) -> Plan:
    """The plan of checked content."""
    if content.get("version") == 2 and "routing_mode" not in content:
        raise unfit(where, WHAT, f"of version 2 without its routing_mode, such as {_MASK}")
    if content.get("routing_mode") == _DROP:
        raise unfit(
            where,
            f"{WHAT} of a pruned model",
            f"its routing_mode is {_DROP}, which drops experts after the router has chosen and "
            f"leaves a token fewer of them; only {_MASK} routes as a pruned model does",
        )
    names, gone = model.numbers(), dict[str, set[int]]()
    for number, expert in content["pruned_experts"]:
        if number not in names:
            raise unfit(where, f"{WHAT} of this model", f"its layer {number} has no experts")
        name = names[number]
        if expert >= model.experts(name):
            raise unfit(
                where,
                f"{WHAT} of this model",
                f"layer {number} has {model.experts(name)} experts, none of them {expert}",
            )
        gone.setdefault(name, set()).add(expert)
    kept = {name: sorted(set(range(model.experts(name))) - ids) for name, ids in gone.items()}
    file = f" {where.name}" if isinstance(where, Path) else ""
    note = f"imported from the {WHAT}{file}{_said_of(content)}"
    return plan_of_kept(kept, model.record, criterion="imported", notes=[note])


def write(path: Path, source: Source) -> list[str]:
    """Writes the profile of a plan.

    Args:
        path: of the profile.
        source: with a plan of whole experts; layers may keep different numbers.

    Returns:
        What to know of it.

    Raises:
        PlanError: the plan is not of whole experts, or its layers cannot be numbered.
    """
    plan = source.experts_plan(WHAT)
    gone = [
        [number, expert]
        for number, name in sorted(source.model.numbers().items())
        if name in plan.layers
        for expert in plan.layers[name].removed
    ]
    content: dict[str, Any] = {
        "version": _VERSION,
        "model": public_name(source.model.name),
        "workload": ", ".join(plan.calibrated_on) or f"plan by {plan.criterion}",
        "pruned_experts": gone,
    }
    write_json(path, content)
    return []


def _said_of(content: dict[str, Any]) -> str:
    """What a profile says of its model and workload, in words."""
    said = [f"{key} {content[key]!r}" for key in ("model", "workload") if content.get(key)]
    return f" ({', '.join(said)})" if said else ""
