"""The text of a search: what is read, how many sequences run at a time, and what is held out."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from reap_driver.data.packing import PackedSource
from reap_driver.plan_search.search_state import Saved
from reap_driver.workflow.calibration import batches_of, read_data
from reap_driver.workflow.holding import Holding, decided
from reap_driver.workflow.inspection import Model, check_packing, device_of, sequence_length
from reap_driver.workflow.jobs import SearchOptions
from reap_driver.workflow.listener import Listener
from reap_driver.workflow.sources import sources_of
from reap_kernels import check_backend
from reap_kernels.errors import DataError, ResourceError

Batches = list[dict[str, Tensor]]


def searched_sources(options: SearchOptions, model: Model, heard: Listener) -> list[PackedSource]:
    """The text of a search, read after the checks that need no weights.

    Raises:
        DataError, UnsupportedModel, BackendUnavailable: text, model and options do not fit.
    """
    data, run = options.data, options.run
    wanted = sources_of(options, heard)
    seq_len = sequence_length(model, data, run)
    check_backend("compare", device_of(run), model.meta.dtype, run.backend)
    check_packing(model, data)
    model.check_files()
    return read_data(model, wanted, data, run, seq_len, heard)


def batch_sizes(
    options: SearchOptions,
    model: Model,
    sources: Sequence[PackedSource],
    saved: Saved | None,
    place: Path,
) -> list[int]:
    """Sequences at a time, for each source: as before where a search is resumed.

    Raises:
        ResourceError: the model would have to be streamed.
    """
    run = options.run
    if saved is not None and run.batch_size is None:
        return list(saved.run.get("batch sizes", []))
    size = run.batch_size or 1
    if run.device_map is None:
        decision = decided(run, model, sources, place.parent, all_logits=True)
        size = decision.batch_size
        if decision.stream:
            raise ResourceError(
                "the model does not fit in memory, and a search runs it for every plan: "
                f"{'; '.join(decision.reasons)}; use a machine with more memory, several GPUs by "
                "`device_map=auto`, or `stream=never` to try"
            )
    return [min(size, source.full_sequences) for source in sources]


def divided(
    options: SearchOptions, model: Model, sources: Sequence[PackedSource], how: Holding
) -> tuple[Batches, Batches]:
    """Batches to search on, and those that are held out.

    Raises:
        DataError: there are too few sequences for both.
    """
    share = options.share
    packed = batches_of(model.config, model.layers, sources, how.batch_sizes, share.denominator)
    parts: tuple[Batches, Batches] = ([], [])
    for number in range(len(packed)):
        parts[packed.fold(number) < share.numerator].append(packed.inputs(number))
    if not parts[0] or (share and not parts[1]):
        sequences = sum(source.sequences for source in sources)
        raise DataError(
            f"the data is {sequences} sequences, too few to hold out {share} of them; give more, a "
            "smaller `seq_len`, or `validation=0`"
        )
    return parts
