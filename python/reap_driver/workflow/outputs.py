"""Checks of outputs, made before any work is done: what may be written, and what never is.

An output is never an input of the same run, and never a file of a checkpoint, with --overwrite or
without: files are compared by device and inode, so links of either kind change nothing.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reap_driver.files.exchange import partial_of
from reap_driver.files.gram_folder import HEAD
from reap_driver.files.matrices import INDEX
from reap_driver.workflow.fields import flat
from reap_driver.workflow.options import DataOptions
from reap_driver.workflow.sources import divided_sources
from reap_kernels.errors import CheckpointError
from reap_kernels.files import is_file

# By one of these, beside config.json, a folder is a checkpoint.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Options that name a file or a folder, or something else by its name.
_TEXTS = ("model", "original", "pruned", "recipe")
# What a journal's folder holds, also after a kill.
_JOURNAL = re.compile(r"\.?(journal\.json|stats-\d+\.safetensors|states-\d+)(\.[0-9a-f]{8})?")


class Kind(NamedTuple):
    """A kind of folder that a run fills file by file and then names.

    Attributes:
        of: what it holds, in words.
        head: the file by which it is known.
        files: every name in one that is unfinished, also after a kill.
    """

    of: str
    head: str
    files: re.Pattern[str]


GRAMS = Kind(
    "Gram matrices", HEAD, re.compile(r"\.?(gram\.json|gram-\d+\.safetensors)(\.[0-9a-f]{8})?")
)
MATRICES = Kind(
    "down projections", INDEX, re.compile(r"\.?(matrices\.json|.+\.safetensors)(\.[0-9a-f]{8})?")
)


def inputs_of(options: Any, *outputs: Path | None) -> list[Path]:
    """Files and folders that options name and that are there, but for the outputs.

    Args:
        options: of any job.
        outputs: those of its values that are written, which need not be all that it was given.

    Raises:
        DataError: a recipe or data that it names is not there, or cannot be read.
    """
    named = flat(options)
    values = [item for value in named.values() for item in _listed(value)]
    written = {id(path) for path in outputs}  # an input may be the same path, and then is found
    read = [path for path in values if isinstance(path, Path) and id(path) not in written]
    texts = [item for key in _TEXTS for item in _listed(named.get(key))]
    read += [Path(text) for text in texts if isinstance(text, str)]
    found = [path for path in read if os.path.exists(path)]
    data = getattr(options, "data", None)
    if isinstance(data, DataOptions) and data.given:
        places = (one.location for sources in divided_sources(options) for one in sources)
        found += [place for place in places if isinstance(place, Path)]
    return found


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else [value]


def check_file(path: Path, *, overwrite: bool, inputs: Iterable[Path]) -> None:
    """Refuses an output file that exists, that cannot be written, or that something else is in.

    Args:
        path: what is written.
        overwrite: whether an older output may be replaced.
        inputs: see `inputs_of`.

    Raises:
        CheckpointError: naming the path and the way out.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; give the name of a file to write")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path}: exists; choose another name, or pass `overwrite=True`")
    _check_no_input(path, inputs)
    _check_place(path, path.absolute().parent)


def check_folder(
    folder: Path, names: Sequence[str], *, overwrite: bool, inputs: Iterable[Path]
) -> None:
    """Refuses a folder for several files that cannot be made or written, or that holds one of them.

    Raises:
        CheckpointError: naming the path and the way out.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; give the name of a folder")
    _check_place(folder, folder if folder.exists() else folder.absolute().parent)
    inputs = list(inputs)
    for name in names:
        if (folder / name).exists() and not overwrite:
            raise CheckpointError(
                f"{folder / name}: exists; choose another folder, or pass `overwrite=True`"
            )
        _check_no_input(folder / name, inputs)


def check_filled_folder(folder: Path, kind: Kind, *, overwrite: bool) -> None:
    """Refuses a folder that exists, or cannot be made.

    Args:
        folder: what is written.
        kind: what it will hold.
        overwrite: whether an older one may be replaced; anything else never is.

    Raises:
        CheckpointError: naming the path and the way out.
    """
    part = partial_of(folder)
    if os.path.lexists(folder):
        if not is_file(folder / kind.head) or folder.is_symlink():
            raise CheckpointError(
                f"{folder}: exists and is no folder of {kind.of}; choose another name"
            )
        if not overwrite:
            raise CheckpointError(
                f"{folder}: exists; choose another name, or pass `overwrite=True`"
            )
    _check_place(folder, folder.absolute().parent)
    strange = strange_in(part, kind.files)
    if strange:
        raise CheckpointError(
            f"{part}: is where {kind.of} go until they are complete, and holds {strange!r}, "
            "which is none; move it away, or choose another name"
        )


def check_replaced_folder(out: Path, inputs: Iterable[Path]) -> None:
    """Refuses a folder that is replaced as a whole when it holds an input, or something else that
    is to stay. (That it is the source itself, the writer says.)

    Raises:
        CheckpointError: naming both.
    """
    target = out.resolve()
    for path in inputs:
        if target in path.resolve().parents:
            raise CheckpointError(
                f"{out}: holds {path}, which this run reads, and would be replaced; choose another "
                "folder, or copy that file elsewhere first"
            )


def check_journal_folder(folder: Path) -> None:
    """Refuses a journal's folder that holds anything else: it is deleted in the end.

    Raises:
        CheckpointError: naming it and what it holds.
    """
    strange = strange_in(folder, _JOURNAL)
    if strange:
        raise CheckpointError(
            f"{folder}: is where the journal goes, and holds {strange!r}, which is none; move "
            "it away, or choose another output"
        )


def strange_in(folder: Path, known: re.Pattern[str]) -> str | None:
    """The first name in a folder that is not one of the known, or its own where it is no folder;
    None if there is none.
    """
    if not os.path.lexists(folder):
        return None
    if not folder.is_dir() or folder.is_symlink():
        return folder.name
    return min((p.name for p in folder.iterdir() if not known.fullmatch(p.name)), default=None)


def _check_place(out: Path, folder: Path) -> None:
    """Refuses an output in a folder that is not there or cannot be written."""
    if not folder.is_dir():
        raise CheckpointError(f"{out}: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise CheckpointError(f"{out}: the folder {folder} cannot be written; choose another")


def _check_no_input(path: Path, inputs: Iterable[Path]) -> None:
    """Refuses what is read in this run or belongs to a checkpoint."""
    checkpoint = _checkpoint_around(path)
    if checkpoint is not None:
        raise CheckpointError(
            f"{path}: is in the checkpoint {checkpoint}, where nothing is replaced or added, with "
            "--overwrite or without; choose a name outside it"
        )
    if not path.exists():
        return
    written = path.stat()
    for one in inputs:
        for file in _files(one):
            if os.path.samestat(written, file.stat()):
                raise CheckpointError(
                    f"{path}: is {file}, which this run reads, so it is not replaced, with "
                    "--overwrite or without; choose another name"
                )


def _files(path: Path) -> Iterator[Path]:
    """A file, or every file of a folder."""
    yield from (file for file in (path.rglob("*") if path.is_dir() else [path]) if is_file(file))


def _checkpoint_around(path: Path) -> Path | None:
    """The checkpoint that a file is in, or would be: in its folder, or, of one that exists,
    anywhere below; also in the hub's cache, where its content is in `blobs`.
    """
    for place in {path.absolute().parent.resolve(), path.resolve().parent}:
        folders = [place, *place.parents] if path.exists() else [place]
        for folder in folders:
            weights = any(is_file(folder / name) for name in _WEIGHTS)
            if weights and is_file(folder / "config.json"):
                return folder
        if place.name == "blobs" and (place.parent / "snapshots").is_dir():
            return place.parent
    return None
