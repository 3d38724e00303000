"""Options that several jobs have one by one, and what becomes of their values."""

import dataclasses
from pathlib import Path
from typing import Any

from reap_driver.workflow.fields import option, refused
from reap_driver.workflow.options import DATA, RUN, DataOptions

FOLDS = 8
# What --overwrite does.
REPLACED = "replace what is there, once the new is complete"


def model_option(help: str = "checkpoint folder or hub id", metavar: str = "MODEL") -> Any:
    """The model of a job, by place."""
    return option(metavar=metavar, positional=True, help=help)


def stats_option() -> Any:
    """The statistics of a job, by place."""
    return option(metavar="STATS", positional=True, help="statistics: the file `observe` wrote")


def overwrite_option() -> Any:
    """Whether an output may be replaced."""
    return option(False, help=REPLACED)


def force_option() -> Any:
    """Whether a plan of another model is taken."""
    return option(
        False,
        help="take a plan of a model that routes otherwise or has other sizes, where it can be "
        "applied at all, and note what differs; a plan of a model that differs in neither, such as "
        "the base of a fine-tuned one, is taken anyway",
    )


def with_mtp_option() -> Any:
    """Whether the multi-token-prediction layer is observed, too."""
    return option(
        False,
        help="also observe the multi-token-prediction layer, so that it can be pruned by its own "
        "scores",
    )


def check_with_mtp(with_mtp: bool, **others: Any) -> None:
    """Raises OptionError for `with_mtp` together with one of other options, by name."""
    for name, given in others.items():
        if with_mtp and given is not None:
            raise refused(f"`with_mtp=True`: not together with `{name}`; leave one out")


def fuse_option() -> Any:
    """Whether kernels compute norms and rotations while a model is observed."""
    return option(
        None,
        group=RUN,
        help="compute norms, residual additions and rotary embeddings in fewer kernels while the "
        "model is observed, where they have the model's own values within rounding (default: where "
        "the launch table has it)",
    )


def folds_option() -> Any:
    """Parts of the data with statistics of their own."""
    return option(
        FOLDS,
        metavar="F",
        group=DATA,
        help="parts into which the sequences of each source are divided; each has statistics of "
        "its own beside those of the whole, which tell how far a plan depends on the sample (1: "
        "none)",
    )


def hold_out_option() -> Any:
    """Groups of the data that a model is not calibrated on."""
    return option(
        (),
        metavar="GROUP",
        group=DATA,
        help="do not calibrate on the sources of this group, so that a comparison can show what "
        "is kept on text of another kind; several can be given",
    )


def set_names(given: Any, *names: str) -> None:
    """Tuples where several values are meant, in options that were given as one text."""
    for name in names:
        value = getattr(given, name)
        listed = (value,) if isinstance(value, str | Path) else value
        object.__setattr__(given, name, tuple(map(str, listed)))


def set_paths(given: Any) -> None:
    """Paths where paths are meant, in options that were given as text, and the reverse."""
    for field in dataclasses.fields(given):
        value = getattr(given, field.name)
        if field.name in ("model", "original", "pruned") and isinstance(value, Path):
            object.__setattr__(given, field.name, str(value))
        elif field.name in _PATHS and isinstance(value, str):
            object.__setattr__(given, field.name, Path(value))


_PATHS = (
    "out",
    "source",
    "stats",
    "plan",
    "as_masks",
    "compare",
    "task_folder",
    "gram",
    "matrices",
)


def needs_data(data: DataOptions, also: str = "") -> None:
    """Raises OptionError without any source; `also` names what may be given in its place."""
    if not data.given:
        raise refused(f"no data to run the model on; give `data`{also or ' or `recipe`'}")
