"""Pruning with a re-fit behind it."""

import os
from dataclasses import replace
from pathlib import Path

from reap_driver.observation.data_parallel import Ranks, ranks
from reap_driver.workflow.complete import Complete
from reap_driver.workflow.jobs import PruneOptions
from reap_driver.workflow.listener import Collector, Listener
from reap_driver.workflow.outputs import check_replaced_folder, inputs_of
from reap_driver.workflow.prune import Pruned
from reap_driver.workflow.prune import prune as cut
from reap_driver.workflow.refit_behind import cut_beside, remove_cut, with_refit
from reap_driver.workflow.refit_results import Refitted
from reap_driver.writer.staging import check_replaceable
from reap_kernels.errors import CheckpointError

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
    with ranks() as world:
        heard.only(world.rank == 0)
        found = _complete(options, out, heard)
        if found is None:
            return _both(options, out, world, heard)
        if world.rank > 0:
            return None
        remove_cut(out)
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


def _both(options: PruneOptions, out: Path, world: Ranks, heard: Collector) -> Done:
    """The cut, and its re-fit; where the cut was complete, the re-fit goes on."""
    resume = options.journal.resume
    if resume is True and cut_beside(out).is_dir():
        resume = "auto"
    journal = replace(options.journal, resume=resume)

    def write(place: Path) -> Pruned | Complete | None:
        return cut(replace(options, out=place, journal=journal), heard)

    pruned, refitted = with_refit(options, out, write, world, heard, resume=bool(resume))
    if isinstance(pruned, Pruned) and isinstance(refitted, Refitted):
        return replace(pruned, notes=heard.notes, out=out, refitted=refitted)
    return refitted
