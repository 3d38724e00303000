"""reap-kernels, the driver: from a Mixture-of-Experts checkpoint to a smaller one.

In one call, or step by step on a model of your own:

    rd.prune("MODEL", data=["code.jsonl"], ratio=0.5, out="MODEL-half")

    with rd.observe(model) as obs:
        for batch in batches:
            obs(**batch)
    plan = rd.make_plan(rd.score(obs.stats), ratio=0.5)
    rd.apply_plan("MODEL", plan, "MODEL-half")

Names load what they need on first use, so importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reap_driver.compat.model_config import load_config
    from reap_driver.compensation.hessians import down_hessians
    from reap_driver.compensation.refit import LayerRefit, refit_layer
    from reap_driver.compensation.rows import ExpertRows
    from reap_driver.compensation.width import WidthCut, prune_width
    from reap_driver.data.recipe import Recipe
    from reap_driver.evaluation.audit import check_permutation
    from reap_driver.evaluation.compensation import compensated
    from reap_driver.evaluation.models import compare_models
    from reap_driver.evaluation.router_masks import masked_experts
    from reap_driver.evaluation.routing import orphans
    from reap_driver.evaluation.sequences import Comparison
    from reap_driver.files.gram_folder import GramFolder, GramWriter
    from reap_driver.files.matrices import Matrices
    from reap_driver.fusing.fusion import Fused, fused
    from reap_driver.load.resident import load_model
    from reap_driver.merging.merged import merged_experts
    from reap_driver.merging.observer import VectorObserver, observe_vectors
    from reap_driver.merging.vectors import LayerVectors
    from reap_driver.model.discover import MoELayer, find_moe_layers, record_of
    from reap_driver.observation.observer import Observer, observe
    from reap_driver.observation.streamed import observe_streamed
    from reap_driver.plan_search.budget_search import search_plan
    from reap_driver.plan_search.shape_search import FoundShape, search_shape
    from reap_driver.planning.criteria import Scores
    from reap_driver.planning.plan import LayerPlan, Plan
    from reap_driver.planning.planner import make_plan, plan_of_removals, random_plan
    from reap_driver.planning.retained import retained
    from reap_driver.planning.scoring import score
    from reap_driver.refitting.engine import LayerFacts
    from reap_driver.refitting.models import RefitModels, refit_models
    from reap_driver.workflow.apply import Applied, Masked
    from reap_driver.workflow.calibration import Calibration
    from reap_driver.workflow.calls import (
        apply,
        calibration,
        compare,
        estimate,
        observe_data,
        plan,
        prune,
        refit,
        report,
        search,
    )
    from reap_driver.workflow.check import Checked
    from reap_driver.workflow.comparison_results import Compared, Comparisons
    from reap_driver.workflow.complete import Complete
    from reap_driver.workflow.convert import Converted
    from reap_driver.workflow.errors import OptionError
    from reap_driver.workflow.estimate import Estimate
    from reap_driver.workflow.exchange_calls import check, convert
    from reap_driver.workflow.exchange_jobs import CheckOptions, ConvertOptions
    from reap_driver.workflow.follow_up_jobs import CompareOptions, RefitOptions, ReportOptions
    from reap_driver.workflow.jobs import (
        ApplyOptions,
        CalibrationOptions,
        EstimateOptions,
        ObserveOptions,
        PlanOptions,
        PruneOptions,
        SearchOptions,
    )
    from reap_driver.workflow.listener import Listener, Progress
    from reap_driver.workflow.observe import Observed
    from reap_driver.workflow.options import (
        DataOptions,
        JournalOptions,
        RunOptions,
        WriteOptions,
    )
    from reap_driver.workflow.plan import Planned
    from reap_driver.workflow.prune import Pruned
    from reap_driver.workflow.recipes import load_recipe, recipe_names
    from reap_driver.workflow.refit_estimate import RefitEstimate
    from reap_driver.workflow.refit_results import RefitEvaluation, Refitted
    from reap_driver.workflow.report import Reported
    from reap_driver.workflow.search import Searched
    from reap_driver.workflow.shape_options import ShapeOptions
    from reap_driver.writer.apply import apply_plan
    from reap_driver.writer.constants_file import export_constants, load_constants
    from reap_driver.writer.mask_file import load_masks, save_masks
    from reap_driver.writer.replace import ReplaceReport, replace_matrices
    from reap_driver.writer.report import ApplyReport
    from reap_kernels import LayerStats, SaliencyStats, __version__

_HOMES = {
    "AllocationOptions": "reap_driver.workflow.rank_options",
    "Applied": "reap_driver.workflow.apply",
    "ApplyOptions": "reap_driver.workflow.jobs",
    "ApplyReport": "reap_driver.writer.report",
    "BudgetOptions": "reap_driver.workflow.rank_options",
    "Calibration": "reap_driver.workflow.calibration",
    "CalibrationOptions": "reap_driver.workflow.jobs",
    "CheckOptions": "reap_driver.workflow.exchange_jobs",
    "Checked": "reap_driver.workflow.check",
    "CompareOptions": "reap_driver.workflow.follow_up_jobs",
    "Complete": "reap_driver.workflow.complete",
    "Compared": "reap_driver.workflow.comparison_results",
    "Comparisons": "reap_driver.workflow.comparison_results",
    "Comparison": "reap_driver.evaluation.sequences",
    "ConvertOptions": "reap_driver.workflow.exchange_jobs",
    "Converted": "reap_driver.workflow.convert",
    "DataOptions": "reap_driver.workflow.options",
    "Estimate": "reap_driver.workflow.estimate",
    "EstimateOptions": "reap_driver.workflow.jobs",
    "ExpertRows": "reap_driver.compensation.rows",
    "Fused": "reap_driver.fusing.fusion",
    "GramFolder": "reap_driver.files.gram_folder",
    "GramWriter": "reap_driver.files.gram_folder",
    "JournalOptions": "reap_driver.workflow.options",
    "LayerFacts": "reap_driver.refitting.engine",
    "LayerPlan": "reap_driver.planning.plan",
    "LayerRefit": "reap_driver.compensation.refit",
    "LayerStats": "reap_kernels",
    "LayerVectors": "reap_driver.merging.vectors",
    "Listener": "reap_driver.workflow.listener",
    "Masked": "reap_driver.workflow.apply",
    "Matrices": "reap_driver.files.matrices",
    "MoELayer": "reap_driver.model.discover",
    "ObserveOptions": "reap_driver.workflow.jobs",
    "Observed": "reap_driver.workflow.observe",
    "Observer": "reap_driver.observation.observer",
    "OptionError": "reap_driver.workflow.errors",
    "Plan": "reap_driver.planning.plan",
    "PlanOptions": "reap_driver.workflow.jobs",
    "Planned": "reap_driver.workflow.plan",
    "Progress": "reap_driver.workflow.listener",
    "PruneOptions": "reap_driver.workflow.jobs",
    "Pruned": "reap_driver.workflow.prune",
    "RankOptions": "reap_driver.workflow.rank_options",
    "Recipe": "reap_driver.data.recipe",
    "RefitEstimate": "reap_driver.workflow.refit_estimate",
    "RefitEvaluation": "reap_driver.workflow.refit_results",
    "RefitModels": "reap_driver.refitting.models",
    "RefitOptions": "reap_driver.workflow.follow_up_jobs",
    "Refitted": "reap_driver.workflow.refit_results",
    "ReplaceReport": "reap_driver.writer.replace",
    "ReportOptions": "reap_driver.workflow.follow_up_jobs",
    "Reported": "reap_driver.workflow.report",
    "RunOptions": "reap_driver.workflow.options",
    "SaliencyStats": "reap_kernels",
    "Scores": "reap_driver.planning.criteria",
    "SearchOptions": "reap_driver.workflow.jobs",
    "Searched": "reap_driver.workflow.search",
    "ShapeOptions": "reap_driver.workflow.shape_options",
    "VectorObserver": "reap_driver.merging.observer",
    "WidthCut": "reap_driver.compensation.width",
    "WriteOptions": "reap_driver.workflow.options",
    "__version__": "reap_kernels",
    "apply": "reap_driver.workflow.calls",
    "apply_plan": "reap_driver.writer.apply",
    "calibration": "reap_driver.workflow.calls",
    "check": "reap_driver.workflow.exchange_calls",
    "check_permutation": "reap_driver.evaluation.audit",
    "compare": "reap_driver.workflow.calls",
    "compare_models": "reap_driver.evaluation.models",
    "compensated": "reap_driver.evaluation.compensation",
    "convert": "reap_driver.workflow.exchange_calls",
    "down_hessians": "reap_driver.compensation.hessians",
    "estimate": "reap_driver.workflow.calls",
    "export_constants": "reap_driver.writer.constants_file",
    "find_moe_layers": "reap_driver.model.discover",
    "fused": "reap_driver.fusing.fusion",
    "load_config": "reap_driver.compat.model_config",
    "load_constants": "reap_driver.writer.constants_file",
    "load_masks": "reap_driver.writer.mask_file",
    "load_model": "reap_driver.load.resident",
    "load_recipe": "reap_driver.workflow.recipes",
    "make_plan": "reap_driver.planning.planner",
    "masked_experts": "reap_driver.evaluation.router_masks",
    "merged_experts": "reap_driver.merging.merged",
    "observe": "reap_driver.observation.observer",
    "observe_data": "reap_driver.workflow.calls",
    "observe_streamed": "reap_driver.observation.streamed",
    "observe_vectors": "reap_driver.merging.observer",
    "orphans": "reap_driver.evaluation.routing",
    "plan": "reap_driver.workflow.calls",
    "plan_of_removals": "reap_driver.planning.planner",
    "prune": "reap_driver.workflow.calls",
    "prune_width": "reap_driver.compensation.width",
    "random_plan": "reap_driver.planning.planner",
    "recipe_names": "reap_driver.workflow.recipes",
    "record_of": "reap_driver.model.discover",
    "refit": "reap_driver.workflow.calls",
    "refit_layer": "reap_driver.compensation.refit",
    "refit_models": "reap_driver.refitting.models",
    "replace_matrices": "reap_driver.writer.replace",
    "report": "reap_driver.workflow.calls",
    "retained": "reap_driver.planning.retained",
    "save_masks": "reap_driver.writer.mask_file",
    "score": "reap_driver.planning.scoring",
    "search": "reap_driver.workflow.calls",
    "search_plan": "reap_driver.plan_search.budget_search",
    "FoundShape": "reap_driver.plan_search.shape_search",
    "search_shape": "reap_driver.plan_search.shape_search",
}

__all__ = [
    "AllocationOptions",
    "Applied",
    "ApplyOptions",
    "ApplyReport",
    "BudgetOptions",
    "Calibration",
    "CalibrationOptions",
    "CheckOptions",
    "Checked",
    "CompareOptions",
    "Compared",
    "Comparison",
    "Comparisons",
    "Complete",
    "ConvertOptions",
    "Converted",
    "DataOptions",
    "Estimate",
    "EstimateOptions",
    "ExpertRows",
    "FoundShape",
    "Fused",
    "GramFolder",
    "GramWriter",
    "JournalOptions",
    "LayerFacts",
    "LayerPlan",
    "LayerRefit",
    "LayerStats",
    "LayerVectors",
    "Listener",
    "Masked",
    "Matrices",
    "MoELayer",
    "ObserveOptions",
    "Observed",
    "Observer",
    "OptionError",
    "Plan",
    "PlanOptions",
    "Planned",
    "Progress",
    "PruneOptions",
    "Pruned",
    "RankOptions",
    "Recipe",
    "RefitEstimate",
    "RefitEvaluation",
    "RefitModels",
    "RefitOptions",
    "Refitted",
    "ReplaceReport",
    "ReportOptions",
    "Reported",
    "RunOptions",
    "SaliencyStats",
    "Scores",
    "SearchOptions",
    "Searched",
    "ShapeOptions",
    "VectorObserver",
    "WidthCut",
    "WriteOptions",
    "__version__",
    "apply",
    "apply_plan",
    "calibration",
    "check",
    "check_permutation",
    "compare",
    "compare_models",
    "compensated",
    "convert",
    "down_hessians",
    "estimate",
    "export_constants",
    "find_moe_layers",
    "fused",
    "load_config",
    "load_constants",
    "load_masks",
    "load_model",
    "load_recipe",
    "make_plan",
    "masked_experts",
    "merged_experts",
    "observe",
    "observe_data",
    "observe_streamed",
    "observe_vectors",
    "orphans",
    "plan",
    "plan_of_removals",
    "prune",
    "prune_width",
    "random_plan",
    "recipe_names",
    "record_of",
    "refit",
    "refit_layer",
    "refit_models",
    "replace_matrices",
    "report",
    "retained",
    "save_masks",
    "score",
    "search",
    "search_plan",
    "search_shape",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from reap_driver.base.requirements import check

    check()
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
