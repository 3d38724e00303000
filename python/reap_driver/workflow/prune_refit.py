"""Pruning with a re-fit behind it: the cut goes to a folder beside the output, and from there its
re-fit to the output.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from reap_driver.observation.data_parallel import Ranks, ranks
from reap_driver.workflow.complete import Complete
from reap_driver.workflow.follow_up_jobs import RefitOptions
from reap_driver.workflow.jobs import PruneOptions
from reap_driver.workflow.listener import Collector, Listener
from reap_driver.workflow.outputs import check_replaced_folder, inputs_of
from reap_driver.workflow.prune import Pruned
from reap_driver.workflow.prune import prune as cut
from reap_driver.workflow.refit import refit
from reap_driver.workflow.refit_estimate import RefitEstimate
from reap_driver.workflow.refit_results import Refitted
from reap_driver.writer.staging import check_replaceable
from reap_kernels.errors import CheckpointError, ReapError

Done = Pruned | Refitted | Complete | None


def prune(options: PruneOptions, listener: Listener | None = None) -> Done:
    """Prunes a model, and re-fits what is left where that is asked for; see `reap_driver.prune`.

    Returns:
        What was done; only the re-fit where the cut was done before; None on ranks other than the
        first.
    """
    if not options.refit:
        return cut(options, listener)
    heard, out = Collector(listener), options.out
    assert isinstance(out, Path)  # as options that were checked have it
    # In a folder of its own, the cut has the output's name, which its card states.
    beside = out.absolute().with_name(f"{out.name}.cut")
    with ranks() as world:
        heard.only(world.rank == 0)
        found: Done = _complete(options, out, heard)
        if found is None:
            found = _both(options, out, beside / out.name, world, heard)
        if world.rank > 0:
            return None
        shutil.rmtree(beside, ignore_errors=True)
        return found


def _complete(options: PruneOptions, out: Path, heard: Collector) -> Complete | None:
    """With `resume='auto'`, whether this command has written its output already.

    Raises:
        CheckpointError: the output is there, and may not be replaced; or would replace an input.
    """
    check_replaced_folder(out, inputs_of(options, out))
    if options.journal.resume != "auto" or not os.path.lexists(out):
        check_replaceable(out, overwrite=options.overwrite)
        return None
    try:
        found = cut(replace(options, overwrite=False), heard)
    except CheckpointError:
        if not options.overwrite:
            raise
        return None
    return found if isinstance(found, Complete) else Complete(heard.notes, out)


def _both(options: PruneOptions, out: Path, place: Path, world: Ranks, heard: Collector) -> Done:
    """The cut, and its re-fit; where the cut was complete, the re-fit goes on."""
    resume = options.journal.resume
    if world.rank == 0:
        place.parent.mkdir(parents=True, exist_ok=True)
    world.barrier()
    if resume is True and place.is_dir():
        resume = "auto"
    journal = replace(options.journal, resume=resume)
    pruned = cut(replace(options, out=place, journal=journal), heard)
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
    if isinstance(pruned, Pruned) and isinstance(refitted, Refitted):
        return replace(pruned, notes=heard.notes, out=out, refitted=refitted)
    assert not isinstance(refitted, RefitEstimate)
    return refitted


@contextmanager
def _said(place: Path, heard: Listener) -> Iterator[None]:
    """Says where the cut is if the re-fit of it fails."""
    try:
        yield
    except ReapError:
        heard.note(f"the cut is complete, in {place}; move it to keep it as it is")
        raise
