"""Plans of a shape: from statistics, Gram matrices and the model's experts to neurons and matrices.

The criterion ranks experts as for `keep`. Then, one decoder layer in memory at a time, neurons of
the experts that stay are removed, and new down projections go into a folder.
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from reap_driver.base.interrupts import held_back
from reap_driver.compensation.shaping import Shaping
from reap_driver.files.exchange import partial_of, place
from reap_driver.files.gram_folder import GramFolder
from reap_driver.files.matrices import Matrices, folder_beside
from reap_driver.load.experts import read_experts
from reap_driver.planning.criteria import Scores
from reap_driver.planning.plan import Plan
from reap_driver.planning.shape import Shape
from reap_driver.workflow.inspection import Model
from reap_driver.workflow.jobs import PlanOptions
from reap_driver.workflow.listener import Listener
from reap_driver.workflow.outputs import MATRICES, check_filled_folder
from reap_driver.workflow.plan_sizes import model_of
from reap_driver.workflow.rank_options import RankOptions
from reap_driver.workflow.shape_choice import ShapeChoice
from reap_driver.workflow.shape_options import ShapeOptions
from reap_driver.writer.apply import output_size
from reap_kernels import LayerGram, SaliencyStats
from reap_kernels.errors import DataError
from reap_kernels.model_match import differences


@dataclass(frozen=True)
class Evidence:
    """What the neurons of a plan are chosen by.

    Args:
        model: whose experts are read.
        scores, stats: of it.
        grams: of it.
        trust: run model code that comes with the checkpoint.

    Raises:
        DataError: the Gram matrices are of another model, or lack layers.
    """

    model: Model
    scores: Scores
    stats: SaliencyStats
    grams: GramFolder
    trust: bool

    def __post_init__(self) -> None:
        folder = self.grams.folder
        found = differences(self.grams.provenance, self.model.provenance)
        if found.deciding or found.unnamed:
            raise DataError(
                f"`gram={folder}`: is not of {self.model.path}: "
                f"{', '.join(found.deciding) or found.text}; give the Gram matrices of this model"
            )
        for name in self.scores:
            if name not in self.grams.layers:
                raise DataError(
                    f"`gram={folder}`: has no Gram matrices of layer {name}; observe all layers of "
                    "this model with `gram`"
                )

    def notes(self, rank: RankOptions) -> list[str]:
        """What a reader of the plan should know of it."""
        notes = []
        if rank.weights is not None:
            notes.append(
                "the weights of groups decide which experts stay; the Gram matrices, by which "
                "their neurons are chosen, are of all text as it was observed"
            )
        digests = [
            [source.get("digest") for source in one.get("data", [])]
            for one in (self.stats.provenance, self.grams.provenance)
        ]
        if digests[0] != digests[1]:
            notes.append(
                "the Gram matrices are of other data than the statistics, so neurons are chosen by "
                "other text than experts"
            )
        return notes

    def read(self) -> Iterator[tuple[str, Sequence[Tensor], LayerGram]]:
        """Name, down projections and Gram sums of every layer, one decoder layer in memory at a
        time.
        """
        read = read_experts(self.model.path, set(self.scores), trust_remote_code=self.trust)
        with contextlib.closing(read):
            for name, weights in read:
                down = list(weights.down)
                del weights  # or this layer would stay while the next one is loaded
                yield name, down, self.grams.get(name)
                del down


def save_plan_of_shape(
    options: PlanOptions, stats: SaliencyStats, scores: Scores, listener: Listener
) -> Plan:
    """Makes the plan that options ask for, and saves it and its matrices beside it.

    Nothing is left of either where it ends early.

    Args:
        options: with `shape`, `gram` and `out`.
        stats, scores: that the plan is made from.
        listener: hears notes and progress.

    Raises:
        CheckpointError: the folder of the matrices exists or cannot be written.
        DataError, PlanError, UnsupportedModel: see `Evidence` and `plan_of_shape`.
    """
    out, gram = options.out, options.gram
    assert isinstance(out, Path)  # as options that were checked have it
    assert isinstance(gram, Path)
    folder = folder_beside(out)
    check_filled_folder(folder, MATRICES, overwrite=options.overwrite)
    grams = GramFolder.open(gram)
    trust = options.trust_remote_code
    model = model_of(options.model, stats.provenance, trust=trust)
    model.check_files()
    evidence = Evidence(model, scores, stats, grams, trust)
    part = partial_of(folder)
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    try:
        plan = plan_of_shape(options.shape, options.rank, evidence, part, listener)
        model.check_unchanged()
        with held_back():
            if plan.compensates:
                place(part, folder)
            plan.save(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return plan


def plan_of_shape(
    shape: ShapeOptions, rank: RankOptions, evidence: Evidence, out: Path, listener: Listener
) -> Plan:
    """The plan that options ask for. Its matrices are written, if it has any.

    Args:
        shape: with a shape.
        rank: which experts stay, and for `shape='auto'` how much goes.
        evidence: what is known of the model.
        out: a new folder for the matrices, which is not made for a plan of whole experts.
        listener: hears progress.

    Raises:
        PlanError: the shape does not fit the model, or nothing of the size that is asked for does.
        UnsupportedModel: the writer could not write experts of another width.
        DataError: a Gram is singular, or matrices are not finite.
    """
    choice = ShapeChoice.of(shape, rank, evidence.scores, evidence.stats)
    shaping, shapes = choice.shaping, choice.shapes
    if choice.narrow:
        check_writable(choice.foreseen(), evidence)
    notes, chosen = evidence.notes(rank), shapes[0]
    if len(shapes) > 1:
        chosen, reason = _best(shapes, shaping, evidence, listener)
        notes.append(reason)
    found: dict[str, str] = {}
    if chosen.width < shaping.width:
        blank = shaping.blank(chosen, choice.ratio)
        least = None if len(shapes) > 1 else chosen.width
        found = {"digest": _solve(blank, least, shaping, evidence, out, listener)}
    else:
        notes.append(f"{chosen} has all neurons of its experts, so these stay as they are")
    if shape.explicit is None and not choice.narrow:
        notes.append(
            f"{chosen} is the only shape of this size; a smaller `width_multiple` allows others"
        )
    plan = shaping.plan(chosen, choice.ratio, choice.settings)
    return replace(plan.noting(notes), matrices=found)


def check_writable(blank: Plan, evidence: Evidence) -> None:
    """Raises before the long work what the writer would raise of plans of this shape.

    Args:
        blank: see `Shaping.blank`.
        evidence: of the model.

    Raises:
        UnsupportedModel: experts of this model cannot get another width.
    """
    output_size(
        evidence.model.source,
        blank,
        mtp="drop",
        shard_size=None,
        trust_remote_code=evidence.trust,
        non_uniform=False,
        force_model=True,
    )


def _best(
    shapes: Sequence[Shape], shaping: Shaping, evidence: Evidence, listener: Listener
) -> tuple[Shape, str]:
    """The shape of least expected error, and a sentence on the others."""
    least = min(shape.width for shape in shapes)
    with listener.progress("measuring shapes", " experts", _experts(shaping)) as step:
        for name, down, sums in evidence.read():
            shaping.measure(name, down, sums, least)
            del down, sums
            step.add(shaping.router.num_experts)
    errors = {shape: shaping.expected(shape) for shape in shapes}
    ranked = sorted(errors, key=errors.__getitem__)
    said = ", ".join(f"{shape} {errors[shape]:.3f}" for shape in ranked)
    return ranked[0], (
        f"chose {ranked[0]}, of the least expected error: {said} (size of the error of a layer's "
        "output, relative to its parts, mean over layers)"
    )


def _solve(
    blank: Plan,
    least: int | None,
    shaping: Shaping,
    evidence: Evidence,
    out: Path,
    listener: Listener,
) -> str:
    """Writes the new down projections of a plan to a folder; returns its digest.

    Args:
        blank: see `Shaping.blank`.
        least: the width to find the orders of neurons for; None where they are known.
        shaping, evidence, out, listener: see `plan_of_shape`.
    """
    matrices = Matrices.create(out, model=blank.model)
    with listener.progress("removing neurons", " experts", _experts(shaping)) as step:
        for name, down, sums in evidence.read():
            if least is not None:
                shaping.measure(name, down, sums, least)
            matrices.put(name, shaping.matrices(blank, name, down, sums))
            del down, sums
            step.add(shaping.router.num_experts)
    return matrices.digest


def _experts(shaping: Shaping) -> int:
    """Of all layers."""
    return len(shaping.names) * shaping.router.num_experts
