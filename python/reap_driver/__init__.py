"""reap-kernels, the driver: from a Mixture-of-Experts checkpoint to a smaller one.

    with rd.observe(model) as obs:
        for batch in batches:
            obs(**batch)
    plan = rd.make_plan(rd.score(obs.stats), ratio=0.5)
    rd.apply_plan("path/to/model", plan, "path/to/out")

Names load what they need on first use, so importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reap_driver.budget_search.search import search_plan
    from reap_driver.compat.model_config import load_config
    from reap_driver.evaluation.audit import check_permutation
    from reap_driver.evaluation.models import compare_models
    from reap_driver.evaluation.router_masks import masked_experts
    from reap_driver.evaluation.routing import orphans, retained
    from reap_driver.evaluation.sequences import Comparison
    from reap_driver.load.resident import load_model
    from reap_driver.model.discover import MoELayer, find_moe_layers, record_of
    from reap_driver.observation.observer import Observer, observe
    from reap_driver.observation.streamed import observe_streamed
    from reap_driver.plan.criteria import Scores
    from reap_driver.plan.plan import LayerPlan, Plan
    from reap_driver.plan.planner import make_plan, plan_of_removals, random_plan
    from reap_driver.plan.scoring import score
    from reap_driver.writer.apply import apply_plan
    from reap_driver.writer.mask_file import load_masks, save_masks
    from reap_driver.writer.report import ApplyReport
    from reap_kernels import LayerStats, SaliencyStats, __version__

_HOMES = {
    "ApplyReport": "reap_driver.writer.report",
    "Comparison": "reap_driver.evaluation.sequences",
    "LayerPlan": "reap_driver.plan.plan",
    "LayerStats": "reap_kernels",
    "MoELayer": "reap_driver.model.discover",
    "Observer": "reap_driver.observation.observer",
    "Plan": "reap_driver.plan.plan",
    "SaliencyStats": "reap_kernels",
    "Scores": "reap_driver.plan.criteria",
    "__version__": "reap_kernels",
    "apply_plan": "reap_driver.writer.apply",
    "check_permutation": "reap_driver.evaluation.audit",
    "compare_models": "reap_driver.evaluation.models",
    "find_moe_layers": "reap_driver.model.discover",
    "load_config": "reap_driver.compat.model_config",
    "load_masks": "reap_driver.writer.mask_file",
    "load_model": "reap_driver.load.resident",
    "make_plan": "reap_driver.plan.planner",
    "masked_experts": "reap_driver.evaluation.router_masks",
    "observe": "reap_driver.observation.observer",
    "observe_streamed": "reap_driver.observation.streamed",
    "orphans": "reap_driver.evaluation.routing",
    "plan_of_removals": "reap_driver.plan.planner",
    "random_plan": "reap_driver.plan.planner",
    "record_of": "reap_driver.model.discover",
    "retained": "reap_driver.evaluation.routing",
    "save_masks": "reap_driver.writer.mask_file",
    "score": "reap_driver.plan.scoring",
    "search_plan": "reap_driver.budget_search.search",
}

__all__ = [
    "ApplyReport",
    "Comparison",
    "LayerPlan",
    "LayerStats",
    "MoELayer",
    "Observer",
    "Plan",
    "SaliencyStats",
    "Scores",
    "__version__",
    "apply_plan",
    "check_permutation",
    "compare_models",
    "find_moe_layers",
    "load_config",
    "load_masks",
    "load_model",
    "make_plan",
    "masked_experts",
    "observe",
    "observe_streamed",
    "orphans",
    "plan_of_removals",
    "random_plan",
    "record_of",
    "retained",
    "save_masks",
    "score",
    "search_plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
