"""Reads rows of a data set of the Hugging Face hub with the `datasets` library.

The library downloads a data set once, into its own cache, and maps the files into memory, so only
the selected rows are read. With `HF_HUB_OFFLINE=1` it uses only the cache.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from socket import gaierror
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from reap_driver.compat.library_errors import one_line, wrap_errors
from reap_driver.data.arrow import known_columns, row_records
from reap_driver.data.records import BadRecords, Record
from reap_driver.data.source import SPLIT, HubDataset
from reap_kernels.errors import DataError

_ROWS = 1024  # rows read at a time


class HubRows:
    """The rows of one split of a data set, as records."""

    def __init__(self, location: HubDataset) -> None:
        self._location = location

    @cached_property
    def _loaded(self) -> tuple[Any, list[str]]:
        """(the split, with the columns that are read; other columns that may hold content)."""
        rows = _load(self._location)
        columns, others = known_columns(rows.column_names)
        # No output format: it could convert token ids to tensors.
        return _undecoded(rows.select_columns(columns)).with_format(None), others

    def count(self) -> int:
        """Number of rows."""
        return len(self._loaded[0])

    def read(self, bad: BadRecords | None) -> Iterator[Record]:
        """All rows, in order.

        Raises:
            DataError: the data set cannot be loaded.
        """
        return (record for _, record in self.pick(range(self.count()), bad))

    def pick(self, chosen: Sequence[int], bad: BadRecords | None) -> Iterator[tuple[int, Record]]:
        """(number, record) of the chosen rows, by ascending number from 0.

        Raises:
            DataError: the data set cannot be loaded.
        """
        loaded, others = self._loaded
        for start in range(0, len(chosen), _ROWS):
            part = chosen[start : start + _ROWS]
            places = {number: f"{self._location}, row {number + 1}" for number in part}
            yield from row_records(loaded.select(part), places, others, bad)


def check_access(location: HubDataset) -> None:
    """Checks that the hub has a data set and gives access to it, before others are downloaded.

    Raises:
        DataError: it does not. If the hub cannot be asked, nothing is raised: the data set may be
            in the cache, and loading it will tell.
    """
    try:
        HfApi().auth_check(location.name, repo_type="dataset")
    except RepositoryNotFoundError as error:  # or its subclass for gated ones
        raise DataError(
            f"data {location}: no file or folder has that name, and the hub gives no access to a "
            f"data set of that name ({type(error).__name__}); {_remedy(error)}"
        ) from error
    except Exception:  # noqa: BLE001  of the network, of any class: the hub cannot be asked
        return


def first_rows(location: HubDataset, count: int) -> list[Record]:
    """The first rows of a data set, read without downloading it; none if that is impossible (its
    format or the network does not allow it), which reading it in full will explain.
    """
    with suppress(DataError), wrap_errors("rows", "see above", error=DataError):
        rows = list(_load(location, streaming=True).take(count))
        return [Record(f"{location}, row {n}", row) for n, row in enumerate(rows, start=1)]
    return []


def _undecoded(rows: Any) -> Any:
    """The rows, with images as bytes and paths rather than as pixels."""
    import datasets

    for name, kind in rows.features.items():
        inner = getattr(kind, "feature", kind)  # the type of a list's items
        if isinstance(inner, datasets.Image):
            encoded = datasets.Image(mode=inner.mode, decode=False)
            rows = rows.cast_column(name, encoded if inner is kind else datasets.List(encoded))
    return rows


def _load(location: HubDataset, **options: Any) -> Any:
    """Loads the split as a `datasets.Dataset`, or as an iterable one with `streaming=True`."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data {location}: no file or folder has that name, and a data set of the hub needs "
            "the datasets library, which is not installed; run `pip install reap-kernels[data]`"
        ) from error
    files = {SPLIT: list(location.files)} if location.files else None
    try:
        return datasets.load_dataset(
            location.name,
            location.subset,
            data_files=files,
            split=location.split or SPLIT,
            revision=location.revision,
            **options,
        )
    except Exception as error:  # of datasets, or of the network and Arrow libraries
        if not _offline() and (unreachable := _unreachable(error)):
            raise DataError(
                f"data {location}: no file or folder has that name, and the hub cannot be reached "
                f"({one_line(unreachable)}); check the network, give a local file, or download the "
                "data set elsewhere, copy the cache of Hugging Face here and set HF_HUB_OFFLINE=1"
            ) from error
        raise DataError(
            f"data {location}: no file or folder has that name, and the hub's data set cannot be "
            f"loaded ({type(error).__name__}: {one_line(error)}); {_remedy(error)}"
        ) from error


def _offline() -> bool:
    """Whether the user has forbidden to ask the hub."""
    return bool(os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE"))


def _unreachable(error: BaseException) -> BaseException | None:
    """The error of the network behind an error of the libraries, whose own text says that a file
    is missing; None if there is none.
    """
    found: BaseException | None = error
    while found is not None and not isinstance(found, gaierror | ConnectionError | TimeoutError):
        found = found.__cause__ or found.__context__
    return found


def _remedy(error: Exception) -> str:
    kind, text = type(error).__name__, str(error)
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return "check its name, and log in with `hf auth login` if it is private"
    if isinstance(error, ValueError) and ("split" in text or "Config name" in text):
        return "give one that it has, as name[subset](split)"
    if "Gated" in kind or "gated" in text:
        return "ask for access on its page and log in with `hf auth login`"
    if _offline():
        return "unset HF_HUB_OFFLINE, or download it before on a machine with network"
    return "check its name and the network, or give a local file"
