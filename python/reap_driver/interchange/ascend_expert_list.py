"""Expert lists for vllm-ascend, which prunes Qwen3-MoE models when it loads them
(github.com/vllm-project/vllm-ascend/pull/12525): JSON lines, one per layer, of all experts from the
best to the worst. The server cuts the list itself, by its own ratio.
"""

import json
from pathlib import Path

from reap_driver.interchange.content import Source, uniform_count
from reap_driver.planning.budget import ranked
from reap_driver.planning.scoring import score
from reap_kernels.errors import PlanError

WHAT = "expert list"


def write(path: Path, source: Source) -> list[str]:
    """Writes the ranking of the experts of every layer.

    Args:
        path: of the list.
        source: with statistics and the criterion that ranks; where there is a plan, its kept
            experts come first.

    Returns:
        What to know of it: how the server cuts the list as the plan does.

    Raises:
        PlanError: the criterion is unknown, or the router chooses among groups of experts, which
            the server's cut would leave unequal; or the plan is not of whole experts.
        DataError: the statistics do not record what the criterion needs; see `rd.score`.
    """
    model, lines = source.model, []
    for name, facts in model.layers.items():
        if (facts.get("n_group") or 1) > 1:
            raise PlanError(
                f"layer {name}: its router chooses among {facts['n_group']} groups of experts, and "
                f"the server cuts the {WHAT} without regard to groups; prune the checkpoint instead"
            )
    scores = score(source.all_statistics(WHAT), source.criterion)
    if source.plan is not None:
        source.experts_plan(WHAT)
        uniform_count(source, WHAT)
    for number, name in sorted(model.numbers().items()):
        best, kept = ranked(scores[name], 1)[0].tolist(), set(source.kept(name))
        order = sorted(best, key=lambda expert: expert not in kept)  # stable: by score among each
        lines.append(json.dumps({str(number): order}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return _notes(source)


def _notes(source: Source) -> list[str]:
    """How the server is told of the list."""
    model = source.model
    found = []
    kind = (model.record.get("model") or {}).get("model_type")
    if kind not in (None, "qwen3_moe"):
        found.append(f"vllm-ascend prunes by a list only Qwen3-MoE models, and this one is {kind}")
    counts = {(model.experts(name), len(source.kept(name))) for name in model.layers}
    if source.plan is None or len(counts) > 1:  # layers of different sizes: no ratio is all theirs
        return found
    [(experts, kept)] = counts
    return [
        *found,
        f'with --additional-config \'{{"expert_list_file": "...", "expert_prune_ratio": '
        f"{server_ratio(experts, kept):g}}}' the server keeps the {kept} experts of the plan",
    ]


def server_ratio(experts: int, kept: int) -> float:
    """The ratio by which the server keeps so many experts of a list: it takes int(experts *
    (1 - ratio)), so the middle of the ratios that give this number is safe from rounding.
    """
    return round(1 - (kept + 0.5) / experts, 6) if kept < experts else 0.0
