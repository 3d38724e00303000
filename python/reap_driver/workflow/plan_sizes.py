"""Plans of a size: from statistics, and from the model that they are of."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reap_driver.memory.checkpoint_size import stored_files
from reap_driver.planning.criteria import Scores
from reap_driver.planning.plan import Plan
from reap_driver.workflow.inspection import Model, inspect_model
from reap_driver.workflow.jobs import PlanOptions
from reap_driver.workflow.listener import Listener
from reap_driver.workflow.options import WriteOptions
from reap_driver.workflow.sizes import Sizing, sized_plan
from reap_kernels import SaliencyStats
from reap_kernels.errors import CheckpointError, DataError
from reap_kernels.model_match import differences


def plan_of_size(
    options: PlanOptions, stats: SaliencyStats, scores: Scores, listener: Listener
) -> Plan:
    """The plan that removes least of those that keep the size that is asked for.

    Args:
        options: with `target_size` or `fits`.
        stats: the statistics.
        scores: by the criterion that is asked for.
        listener: hears how the size is reached.

    Raises:
        DataError: the model that the statistics name is not found, or the one given is another.
        PlanError: see `Sizing.amount`.
    """
    trust = options.trust_remote_code
    model = model_of(options.model, stats.provenance, trust=trust)
    folder = Path(model.path)
    files = stored_files(folder, model.config) if folder.is_dir() else None
    write = WriteOptions(non_uniform=True)  # whether that is wanted, the writer is told
    try:
        sizing = Sizing(model, model.path, files, write, dtype="auto", trust=trust)
    except DataError as error:
        raise DataError(
            f"{model.path}: its configuration names no dtype, so its size is that of its weights; "
            "give the folder that holds them by `model`"
        ) from error
    plan = sized_plan(sizing, scores, options.rank, options.budget, options.allocation, stats)
    for line in sizing.leaves(plan, options.rank).lines():
        listener.say(line)
    return plan


def model_of(
    given: str | Path | None, record: Mapping[str, Any], *, trust: bool, what: str = "statistics"
) -> Model:
    """The model that is given, checked to be that of the statistics, or else the one they name.

    Args:
        given: folder or hub id, if any.
        record: of the model, as their provenance has it.
        trust: run model code that comes with the checkpoint.
        what: has the record: statistics, or a plan.

    Raises:
        DataError: it is another model, or not found.
    """
    if given is None:
        model = _named(record, trust, what)
    else:
        model = inspect_model(str(given), trust_remote_code=trust)
    found = differences(record, model.provenance)
    if found.deciding or found.unnamed:
        raise DataError(
            f"`model={model.path}`: is not the model of the {what}: "
            f"{', '.join(found.deciding) or found.text}; give the one that was observed"
        )
    return model


def _named(record: Mapping[str, Any], trust: bool, what: str) -> Model:
    """The model that statistics or a plan name."""
    name = str((record.get("model") or {}).get("id") or "")
    if not name:
        raise DataError(f"the model of the {what} is not named there; give it by `model`")
    missing = f"the model of the {what}, {name}, is not found here; give it by `model`"
    if not Path(name).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise DataError(missing)  # and is no name of the hub
    try:
        return inspect_model(name, trust_remote_code=trust)
    except CheckpointError as error:
        raise DataError(missing) from error
