"""A re-fit right after a cut: the cut goes to a folder beside the output, and from there its re-fit
to the output.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from reap_driver.files.quantization import quantization_of
from reap_driver.observation.data_parallel import Ranks
from reap_driver.workflow.complete import Complete
from reap_driver.workflow.follow_up_jobs import RefitOptions
from reap_driver.workflow.inspection import inspect_model
from reap_driver.workflow.jobs import ApplyOptions, PruneOptions
from reap_driver.workflow.listener import Listener
from reap_driver.workflow.refit import refit
from reap_driver.workflow.refit_estimate import RefitEstimate
from reap_driver.workflow.refit_results import Refitted
from reap_driver.writer.new_experts import refuse_quantized
from reap_kernels.errors import ReapError

_Cut = TypeVar("_Cut")


def cut_beside(out: Path) -> Path:
    """Where the cut goes: in a folder of its own, with the output's name, which its card states."""
    return out.absolute().with_name(f"{out.name}.cut") / out.name


def remove_cut(out: Path) -> None:
    """Removes what is needed no more once the output is there."""
    shutil.rmtree(cut_beside(out).parent, ignore_errors=True)


def with_refit(
    options: PruneOptions | ApplyOptions,
    out: Path,
    cut: Callable[[Path], _Cut],
    world: Ranks,
    heard: Listener,
    *,
    resume: bool,
) -> tuple[_Cut, Refitted | Complete | None]:
    """Writes a cut of a model, re-fits it, and removes it.

    Args:
        options: of the job; its model, data and run are those of the re-fit.
        out: folder of the better of both.
        cut: writes the cut to the folder that it is given; called on every rank.
        world: the processes that share the data.
        heard: receives notes and progress.
        resume: whether an interrupted re-fit goes on.

    Returns:
        What `cut` returned, and what the re-fit came to, None on ranks other than the first.

    Raises:
        UnsupportedModel: the model is quantized; raised before the cut.
        ReapError: of the cut, or of the re-fit; then the cut stays.
    """
    source = inspect_model(
        str(options.model), trust_remote_code=options.run.trust_remote_code
    ).source
    refuse_quantized(source.folder, quantization_of(source))
    place = cut_beside(out)
    with _parent(place, world):
        made = cut(place)
    world.barrier()
    wanted = RefitOptions(
        pruned=str(place),
        original=options.model,
        out=out,
        overwrite=options.overwrite,
        data=options.data,
        hold_out_group=options.hold_out_group,
        run=options.run,
        resume="auto" if resume else False,
    )
    with _said(place, heard):
        refitted = refit(wanted, heard)
    assert not isinstance(refitted, RefitEstimate)
    if world.rank == 0:
        remove_cut(out)
    return made, refitted


@contextlib.contextmanager
def _parent(place: Path, world: Ranks) -> Iterator[None]:
    """Makes the folder of the cut, which is removed again if an error leaves it empty."""
    if world.rank == 0:
        place.parent.mkdir(parents=True, exist_ok=True)
    world.barrier()
    try:
        yield
    except BaseException:
        if world.rank == 0 and not any(place.parent.iterdir()):
            place.parent.rmdir()
        raise


@contextlib.contextmanager
def _said(place: Path, heard: Listener) -> Iterator[None]:
    """Says where the cut is if the re-fit of it fails or is interrupted."""
    try:
        yield
    except (ReapError, KeyboardInterrupt):
        heard.note(
            f"the cut is complete, in {place}; `resume=True` goes on from it; move it to keep it "
            "as it is"
        )
        raise
