"""Allocation: how many experts each layer loses, and which; pure functions of scores.

`uniform` takes the same share of every layer, `pooled` ranks the experts of all layers together.
Both leave every router enough to choose from, and protected experts where they are. Routers that
choose among groups of experts (n_group > 1) need as many experts in every group, so each group
loses its own lowest, as many as the others. Among equal scores the lower index stays.
"""

from reap_driver.allocate.budget import Budget, Router, check_ratio, kept_experts, ranked, ratio_of
from reap_driver.allocate.explicit import explicit, max_removable, removal_steps
from reap_driver.allocate.pooled import NORMALISATIONS, pooled, removal_target
from reap_driver.allocate.select import protected_experts, select_layers, super_experts
from reap_driver.allocate.served import SERVED_STEP, is_served, served_advice
from reap_driver.allocate.uniform import uniform

__all__ = [
    "NORMALISATIONS",
    "SERVED_STEP",
    "Budget",
    "Router",
    "check_ratio",
    "explicit",
    "is_served",
    "kept_experts",
    "max_removable",
    "pooled",
    "protected_experts",
    "ranked",
    "ratio_of",
    "removal_steps",
    "removal_target",
    "select_layers",
    "served_advice",
    "super_experts",
    "uniform",
]
