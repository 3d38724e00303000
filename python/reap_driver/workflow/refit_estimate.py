"""What a re-fit takes: how the models are held for it, and what `dry_run` says of that."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reap_driver.base.units import in_bytes, in_operations, row
from reap_driver.data.packing import PackedSource
from reap_driver.memory.decision import Decision, decide
from reap_driver.memory.machine import free_disk, this_machine
from reap_driver.memory.model_sizes import ModelSizes
from reap_driver.observation.data_parallel import Ranks
from reap_driver.workflow import estimate_rows as rows
from reap_driver.workflow.calibration import group_lines
from reap_driver.workflow.comparing import together
from reap_driver.workflow.follow_up_jobs import RefitOptions
from reap_driver.workflow.holding import sized
from reap_driver.workflow.inspection import Model, device_of
from reap_driver.workflow.listener import Collector
from reap_driver.workflow.results import Result
from reap_kernels import LayerGram

_COPIES = 5  # of a layer's down projections, float32, that solving holds
_ROWS = 3  # tensors [T, H] in the model's dtype, and as many in float32, while a layer is solved


@dataclass(frozen=True)
class Needs:
    """What a re-fit holds and reads.

    Attributes:
        original, pruned: sizes of the models.
        solving: bytes of a layer's Gram matrices and of what solving it holds beside them.
        matrices: bytes of all new down projections on disk, in the model's dtype.
        tokens: of all data.
        steps: of conjugate gradients.
    """

    original: ModelSizes
    pruned: ModelSizes
    solving: int
    matrices: int
    tokens: int
    steps: int

    @property
    def state_bytes(self) -> int:
        """Bytes of states and rows for each token, where states are stored."""
        itemsize = self.original.state_bytes
        wide = itemsize if self.original.dtype == "float32" else 2 * itemsize
        return itemsize + self.pruned.state_bytes + _ROWS * (itemsize + wide)

    @property
    def passes(self) -> int:
        """Passes of the data through the pruned model's experts: one that sums the Gram matrices,
        two for each step, and less than one that chooses the ridge.
        """
        return 2 + 2 * self.steps

    @property
    def sizes(self) -> ModelSizes:
        """Both models and what solving holds, as `decide` takes them."""
        whole = together([self.original, self.pruned])
        pair = (self.original.largest_layer + self.pruned.largest_pair) // 2
        return replace(
            whole,
            layer_bytes=(pair, pair),
            rest_bytes=whole.rest_bytes + self.solving,
            state_bytes=self.state_bytes,
        )

    def lines(self) -> Iterator[str]:
        """The needs, for people."""
        yield from rows.model(self.original)
        pruned = self.pruned
        yield row(
            "pruned",
            f"{in_bytes(pruned.weight_bytes)} in {pruned.dtype}: decoder layers of up to "
            f"{in_bytes(pruned.largest_layer)}",
        )
        yield row("solving", f"{in_bytes(self.solving)}: Gram matrices and gradients of a layer")
        yield row(
            "data",
            f"{self.tokens:,} tokens; states and rows {in_bytes(self.tokens * self.state_bytes)}",
        )
        flops = self.tokens * (self.original.flops_per_token + self.passes * pruned.flops_per_token)
        yield row(
            "compute",
            f"at most {in_operations(flops)}: one pass through the original, {self.passes} through "
            "the pruned model's experts",
        )

    def facts(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "model": rows.model_facts(self.original),
            "pruned": rows.model_facts(self.pruned),
            "solving_bytes": self.solving,
            "matrices_bytes": self.matrices,
            "tokens": self.tokens,
            "state_bytes_per_token": self.state_bytes,
            "passes": self.passes,
        }


@dataclass(frozen=True, repr=False)
class RefitEstimate(Result):
    """What a re-fit would take.

    Attributes:
        lines: the arithmetic, as the command line prints it.
        known: the same as JSON values: bytes and operations.
        decision: where states would be stored, and how many sequences run at a time.

    Example:
        >>> asked = {"out": None, "seq_len": 64, "dry_run": True}
        >>> rd.refit("CUT", "MODEL", "code.jsonl:40", **asked).known["passes"]
        6
    """

    lines: tuple[str, ...]
    known: dict[str, Any]
    decision: Decision

    def facts(self) -> dict[str, Any]:
        """See `Result`."""
        return self.known

    def describe(self) -> str:
        """See `Result`."""
        return "\n".join(self.lines)


def needs_of(
    options: RefitOptions, original: Model, pruned: Model, sources: Sequence[PackedSource]
) -> Needs:
    """What a re-fit of this data holds and reads."""
    device = device_of(options.run)
    first, second = (sized(options.run, one, sources, device)[0] for one in (original, pruned))
    numbers = [la.num_experts * la.hidden_size * la.intermediate_size for la in pruned.layers]
    grams = [LayerGram.nbytes_of(la.num_experts, la.intermediate_size) for la in pruned.layers]
    each = zip(numbers, grams, strict=True)
    solving = max(2 * gram + 4 * _COPIES * number for number, gram in each)
    itemsize = pruned.meta.dtype.itemsize
    tokens = sum(source.tokens for source in sources)
    return Needs(first, second, solving, itemsize * sum(numbers), tokens, options.steps)


def fitting(
    options: RefitOptions,
    original: Model,
    pruned: Model,
    sources: Sequence[PackedSource],
    world: Ranks,
    beside: Path,
) -> Decision:
    """Decides where states are stored, and how many sequences run at a time.

    Both models go layer by layer, each layer read once for all data.

    Raises:
        ResourceError: they do not fit even so.
    """
    device = device_of(options.run, world)
    _, work = sized(options.run, original, sources, device, share=world.size)
    machine = this_machine(device, beside).shared(world.local_size)
    return decide("always", needs_of(options, original, pruned, sources).sizes, machine, work)


def estimated(
    options: RefitOptions,
    original: Model,
    pruned: Model,
    sources: Sequence[PackedSource],
    world: Ranks,
    heard: Collector,
) -> RefitEstimate:
    """What a re-fit would take, found without running it."""
    out = options.out
    beside = out.absolute().parent if isinstance(out, Path) else Path(tempfile.gettempdir())
    needs = needs_of(options, original, pruned, sources)
    decision = fitting(options, original, pruned, sources, world, beside)
    output = sum(size for _, size in _files(pruned))
    lines = [*needs.lines(), *group_lines([source.provenance() for source in sources])]
    place = decision.offload or "device"
    lines.append(
        row(
            "decision",
            f"layer by layer, states to: {place}; {decision.batch_size} sequences per batch",
        )
    )
    lines += [row(where, text) for where, text in decision.needs()]
    disk = output + needs.matrices
    free = free_disk(beside)
    lines.append(
        row(
            "to write",
            f"{in_bytes(output)}, and {in_bytes(needs.matrices)} meanwhile; "
            f"{in_bytes(free.nbytes)} is free on the disk",
        )
    )
    for line in lines:
        heard.say(line)
    known = {
        "dry_run": True,
        **needs.facts(),
        "decision": decision.facts(),
        "disk_bytes": disk,
        "free_disk_bytes": free.nbytes,
    }
    return RefitEstimate(heard.notes, tuple(lines), known, decision)


def _files(model: Model) -> Iterator[tuple[str, int]]:
    """Name and size of the files of a checkpoint."""
    for path in sorted(model.source.folder.iterdir()):
        if path.is_file():
            yield path.name, path.stat().st_size
