"""Searching shapes: how many experts, and neurons of each, all layers should keep."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from reap_driver.base.interrupts import Stop, held_back
from reap_driver.base.units import in_bytes
from reap_driver.compensation.shaping import Shaping
from reap_driver.evaluation.router_masks import RouterMasks
from reap_driver.files.exchange import partial_of
from reap_driver.files.exchange import place as placed
from reap_driver.files.gram_folder import GramFolder
from reap_driver.files.matrices import Matrices, folder_beside
from reap_driver.memory.machine import free_disk
from reap_driver.plan_search.fitness import Candidate
from reap_driver.plan_search.recorder import Recorder
from reap_driver.plan_search.search_state import SHAPE
from reap_driver.plan_search.shape_search import MOST, FoundShape, search
from reap_driver.plan_search.shape_task import ShapeTask, narrow_shapes
from reap_driver.planning.plan import Plan
from reap_driver.workflow.inspection import Model
from reap_driver.workflow.jobs import SearchOptions
from reap_driver.workflow.listener import Listener
from reap_driver.workflow.outputs import MATRICES, check_filled_folder
from reap_driver.workflow.plan import stats_of
from reap_driver.workflow.ranking import planned, scored
from reap_driver.workflow.shape_plans import Evidence, check_writable
from reap_driver.workflow.sought import Outcome, Sought
from reap_kernels.errors import ResourceError


class Shapes(Sought):
    """Plans of one shape for all layers, that remove a share of the expert weights.

    Args:
        options: of the search.
        model: what is known of it.
        place: where the plan is saved; its matrices go beside it.

    Raises:
        PlanError, DataError: statistics, Gram matrices, model and options do not fit each other, or
            there is no shape but the cut of whole experts.
        CheckpointError: the folder of the matrices exists or cannot be written.
        UnsupportedModel: the writer could not write experts of another width.
    """

    kind, units = SHAPE, "shapes"

    def __init__(self, options: SearchOptions, model: Model, place: Path) -> None:
        self._place, self._shape, gram = place, options.shape, options.gram
        assert isinstance(gram, Path)  # as options that were checked have it
        self._folder = folder_beside(place)
        replaced = options.overwrite or options.resume is not False
        check_filled_folder(self._folder, MATRICES, overwrite=replaced)
        self._part = partial_of(self._folder)
        stats = stats_of(options.stats)
        scores = scored(stats, options.rank)
        self.uniform = planned(scores, options.rank, options.budget, stats=stats)
        self._grams = GramFolder.open(gram)
        evidence = Evidence(model, scores, stats, self._grams, options.run.trust_remote_code)
        self.notes = evidence.notes(options.rank)
        protected = self.uniform.settings.get("protected")
        self._shaping = Shaping(scores, stats, ridge=self._shape.ridge, protected=protected)
        multiple = self._shape.width_multiple
        shapes = narrow_shapes(self._shaping, self.uniform.ratio, multiple)
        self.most = 1 + min(len(shapes), MOST)
        check_writable(self._shaping.blank(shapes[0], self.uniform.ratio), evidence)

    def asked(self) -> dict[str, Any]:
        """See `Sought`."""
        digests = {name: known.digest for name, known in self._grams.layers.items()}
        return {**self._shape.settings, "gram": digests}

    def length(self) -> dict[str, Any]:
        """See `Sought`."""
        return {}

    def prepare(self, masks: RouterMasks, stop: Stop, heard: Listener) -> None:
        """See `Sought`."""
        self._task = ShapeTask(
            masks,
            self._grams,
            self._shaping,
            self.uniform,
            multiple=self._shape.width_multiple,
            settings=self._shape.settings,
        )
        self._task.notes = self.notes
        self._check_room(heard)
        names = self._shaping.names
        with heard.progress("ordering neurons", " layers", len(names)) as progress:
            for name in names:
                self._task.measure(name)
                progress.add(1)
                if stop.requested:
                    raise stop.interrupted("interrupted before a shape was tried")

    def measured(self, fitness: Callable[[Candidate], float]) -> Callable[[tuple[int, ...]], float]:
        """See `Sought`."""
        return self._task.measured(fitness)

    def find(self, recorder: Recorder) -> FoundShape:
        """See `Sought`."""
        return search(self._task, recorder)

    def settled(self, found: Outcome) -> Outcome:
        """See `Sought`."""
        if not (isinstance(found, FoundShape) and found.plan.narrows):
            return found
        self.close()  # of a run that was killed
        matrices = Matrices.create(self._part, model=found.plan.model)
        for name, down in self._task.matrices(found.plan):
            matrices.put(name, down)
        plan = replace(found.plan, matrices={"digest": matrices.digest})
        return replace(found, plan=plan, matrices=matrices)

    def compared(self, found: Outcome) -> list[Candidate]:
        """See `Sought`."""
        if not (isinstance(found, FoundShape) and found.plan.narrows):
            return []
        return [
            self._task.candidate(self.uniform),
            self._task.candidate(found.plan, found.matrices),
        ]

    def save(self, plan: Plan) -> None:
        """See `Sought`."""
        with held_back():
            if plan.narrows:
                placed(self._part, self._folder)
            plan.save(self._place)

    def close(self) -> None:
        """See `Sought`."""
        shutil.rmtree(self._part, ignore_errors=True)

    def _check_room(self, heard: Listener) -> None:
        """Says what trying a shape takes.

        Raises:
            ResourceError: memory or disk have less.
        """
        task = self._task
        heard.note(
            f"trying a shape takes up to {in_bytes(task.nbytes)} of memory, for its matrices and "
            f"those that they replace; those of the best take up to {in_bytes(task.file_bytes)} on "
            "disk"
        )
        task.check_memory()
        free = free_disk(self._folder.parent)
        if task.file_bytes > free.nbytes:
            raise ResourceError(
                f"{self._folder}: the matrices of a shape take up to {in_bytes(task.file_bytes)}, "
                f"{in_bytes(free.nbytes)} are free ({free.bound}); free some space, or choose an "
                "output on another disk"
            )
