"""The jobs that exchange files with other tools as plain functions of Python, as in `calls`."""

from pathlib import Path
from typing import Any

from reap_driver.planning.plan import Plan
from reap_driver.workflow import convert as converting
from reap_driver.workflow.calls import Heard, job_call, listener_of
from reap_driver.workflow.exchange_jobs import ConvertOptions
from reap_driver.workflow.plan import Planned
from reap_driver.workflow.recipes import build
from reap_kernels import SaliencyStats


@job_call(ConvertOptions)
def convert(
    source: str | Path | SaliencyStats | Plan | Planned,
    to: str,
    *,
    out: str | Path | None = None,
    progress: Heard = None,
    **options: Any,
) -> converting.Converted:
    """Converts statistics and plans from and to files of other tools.

    What `reap-kernels convert` does, whose `--from` is `from_` here.

    Args:
        source: statistics or a plan, or the name of their file or of one of another tool.
        to: what to write, "stats", "plan" or a format of another tool; see `ConvertOptions`.
        out: where to write it; may be left out where the result is statistics or a plan.
        progress: see `prune`.
        **options: of `ConvertOptions`.

    Returns:
        The statistics or the plan, as `content`.

    Raises:
        OptionError: options are unknown or contradict each other, or the format of the source is
            not known.
        ReapError: the source is damaged or not of this model, or cannot be said in the format.

    Example:
        >>> rd.convert(plan, "riy", out="profile.json").out.name
        'profile.json'
        >>> again = rd.convert("profile.json", "plan", model="MODEL").content
        >>> again.kept == plan.kept
        True
    """
    given = {"source": source, "to": to, "out": out, **options}
    return converting.convert(build(ConvertOptions, given), listener_of(progress))
