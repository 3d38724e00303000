"""The jobs that exchange files with other tools as plain functions of Python, as in `calls`."""

from pathlib import Path
from typing import Any

from reap_driver.planning.plan import Plan
from reap_driver.workflow import check as checking
from reap_driver.workflow import convert as converting
from reap_driver.workflow.calls import Heard, job_call, listener_of
from reap_driver.workflow.exchange_jobs import CheckOptions, ConvertOptions
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


@job_call(CheckOptions)
def check(
    source: str | Path | Plan | Planned,
    serve: str,
    *,
    tp: int = 1,
    ep: int = 1,
    progress: Heard = None,
    **options: Any,
) -> checking.Checked:
    """Tells whether an engine would serve what a plan leaves, or a checkpoint.

    What `reap-kernels check` does, which ends with an error where there are obstacles: so does
    `require()` of what is returned.

    Args:
        source: a plan, or a checkpoint as folder or hub id.
        serve: "vllm" or "sglang".
        tp: its tensor-parallel size.
        ep: GPUs that share the experts out; 1: none.
        progress: see `prune`.
        **options: of `CheckOptions`.

    Returns:
        What the engine would refuse, as `obstacles`.

    Raises:
        OptionError: options are unknown.
        ReapError: there is no such plan or model, or they do not go together.

    Example:
        >>> rd.check(plan, "sglang", tp=2).obstacles
        ()
    """
    given = {"source": source, "serve": serve, "tp": tp, "ep": ep, **options}
    return checking.check(build(CheckOptions, given), listener_of(progress))
