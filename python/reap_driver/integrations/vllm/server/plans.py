"""Plans from live statistics, by the options and the code of `reap_driver.plan`."""

from collections.abc import Mapping
from typing import Any

from reap_driver.base.json_text import json_in_lines
from reap_driver.workflow.jobs import PlanOptions
from reap_driver.workflow.plan import make
from reap_driver.workflow.recipes import build
from reap_kernels import SaliencyStats


def plan_text(stats: SaliencyStats, asked: Mapping[str, Any]) -> str:
    """A plan as its file holds it.

    Args:
        stats: live statistics.
        asked: options of `PlanOptions` by name, as `bodies.PLAN` lets them through: no files.

    Raises:
        OptionError: options contradict each other.
        PlanError, DataError: the plan is not possible, by these options or these statistics.
    """
    planned = make(build(PlanOptions, {"stats": stats, **asked}))
    return json_in_lines(planned.plan.check())
