"""reap-kernels, the driver: from a Mixture-of-Experts checkpoint to a smaller one.

    with rd.observe(model) as obs:
        for batch in batches:
            obs(**batch)
    plan = rd.make_plan(rd.score(obs.stats), ratio=0.5)
    rd.apply_plan("path/to/model", plan, "path/to/out")

Names load what they need on first use, so importing the package costs nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reap_driver.checkpoint import ApplyReport, apply_plan
    from reap_driver.checkpoint.masks import load_masks, save_masks
    from reap_driver.compare import Comparison, compare
    from reap_driver.compat.models import load_config
    from reap_driver.criteria import Scores, score
    from reap_driver.discover import MoELayer, find_moe_layers, record_of
    from reap_driver.integrity import orphans, retained
    from reap_driver.loading import load_model
    from reap_driver.observe import Observer, observe
    from reap_driver.permutation import check_permutation
    from reap_driver.plan import LayerPlan, Plan
    from reap_driver.planning import make_plan, plan_of_removals, random_plan
    from reap_driver.router_mask import masked_experts
    from reap_driver.search.search import search_plan
    from reap_driver.streaming.observe import observe_streamed
    from reap_kernels import LayerStats, SaliencyStats, __version__

_HOMES = {
    "ApplyReport": "reap_driver.checkpoint",
    "Comparison": "reap_driver.compare",
    "LayerPlan": "reap_driver.plan",
    "LayerStats": "reap_kernels",
    "MoELayer": "reap_driver.discover",
    "Observer": "reap_driver.observe",
    "Plan": "reap_driver.plan",
    "SaliencyStats": "reap_kernels",
    "Scores": "reap_driver.criteria",
    "__version__": "reap_kernels",
    "apply_plan": "reap_driver.checkpoint",
    "check_permutation": "reap_driver.permutation",
    "compare": "reap_driver.compare",
    "find_moe_layers": "reap_driver.discover",
    "load_config": "reap_driver.compat.models",
    "load_masks": "reap_driver.checkpoint.masks",
    "load_model": "reap_driver.loading",
    "make_plan": "reap_driver.planning",
    "masked_experts": "reap_driver.router_mask",
    "observe": "reap_driver.observe",
    "observe_streamed": "reap_driver.streaming.observe",
    "orphans": "reap_driver.integrity",
    "plan_of_removals": "reap_driver.planning",
    "random_plan": "reap_driver.planning",
    "record_of": "reap_driver.discover",
    "retained": "reap_driver.integrity",
    "save_masks": "reap_driver.checkpoint.masks",
    "score": "reap_driver.criteria",
    "search_plan": "reap_driver.search.search",
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
    "compare",
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


class _Package(ModuleType):
    """This package, where a name of the public API means that, not a submodule called the same."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing reap_driver.observe would otherwise put the module in the function's place.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
