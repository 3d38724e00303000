"""Runs tasks of lm-evaluation-harness on the original and the pruned model."""

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from reap_driver.compat.library_errors import wrap_errors
from reap_driver.compat.text_model import text_model
from reap_driver.evaluation.compensation import PlannedModel
from reap_kernels.errors import DataError

# Task -> metric -> (value, standard error).
Results = dict[str, dict[str, tuple[float, float | None]]]


def check_installed() -> None:
    """Raises DataError if lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise DataError(
            "`tasks`: lm-evaluation-harness is not installed; run `pip install reap-kernels[eval]`"
        )


def evaluate(
    model: PreTrainedModel,
    tokenizer: str | Path,
    tasks: Sequence[str],
    *,
    plan: PlannedModel | None = None,
    folder: Path | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    chat_template: str | dict[str, str] | None = None,
    batch_size: int = 1,
    trust_remote_code: bool = False,
) -> Results:
    """Runs tasks on a model in memory.

    Args:
        model: a loaded model, in eval mode.
        tokenizer: folder or hub id of its tokenizer.
        tasks: names of tasks and task groups, of the harness or in `folder`.
        plan: put into the model meanwhile; None for the model as it is.
        folder: folder with more task files (.yaml).
        limit: questions per task; None for all.
        apply_chat_template: whether to put questions through the tokenizer's chat template.
        chat_template: used instead of the tokenizer's own.
        batch_size: requests per batch.
        trust_remote_code: run tokenizer code that comes with the checkpoint.

    Returns:
        Task -> metric (with its filter, such as "exact_match,strict-match") -> value and standard
        error.

    Raises:
        DataError: the harness is not installed or has no such task, or the tokenizer cannot be
            loaded.
    """
    check_installed()
    # Imported by name, because the package is optional and has no type information.
    harness, adapters, registry = map(
        import_module, ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks")
    )
    manager = registry.TaskManager(include_path=None if folder is None else str(folder))
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise DataError(
            f"`tasks`: lm-evaluation-harness has no task {unknown[0]!r}; `lm_eval ls tasks` lists "
            "its tasks, and `task_folder` adds others"
        )
    what = f"`tasks`: the tokenizer of {tokenizer} cannot be loaded"
    with wrap_errors(what, "add its files (tokenizer.json, ...)", error=DataError):
        own = AutoTokenizer.from_pretrained(str(tokenizer), trust_remote_code=trust_remote_code)
    if chat_template is not None:
        own.chat_template = chat_template
    with contextlib.nullcontext() if plan is None else plan.active():
        found = harness.simple_evaluate(
            model=adapters.HFLM(pretrained=text_model(model), tokenizer=own, batch_size=batch_size),
            tasks=list(tasks),
            limit=limit,
            apply_chat_template=apply_chat_template,
            task_manager=manager,
            log_samples=False,
        )
    return {task: dict(_metrics(values)) for task, values in found["results"].items()}


def _metrics(values: Mapping[str, Any]) -> Iterator[tuple[str, tuple[float, float | None]]]:
    """Metrics of one task with their standard errors, which the harness stores under other keys."""
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{filtered}")
        yield key, (float(value), float(error) if isinstance(error, int | float) else None)


def table(original: Results, pruned: Mapping[str, Results]) -> str:
    """A block for each metric of a task: the original and, by name, each pruned model."""
    width = max(len(name) for name in ("the original", *pruned))
    lines = []
    for task, metrics in original.items():
        for metric, (value, error) in metrics.items():
            lines.append(f"{task}, {metric.removesuffix(',none')}")
            lines.append(f"  {'the original':<{width}}  {_shown(value, error)}")
            for name, results in pruned.items():
                other, spread = results[task][metric]
                change = f"  {other - value:+.4f}"
                lines.append(f"  {name:<{width}}  {_shown(other, spread):<18}{change}")
    return "\n".join(lines)


def _shown(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" +- {error:.4f}")
