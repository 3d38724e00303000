"""The folder of a re-fit that goes on: new down projections of the layers that are done, and the
hidden states behind them.

It is beside the output, OUT.refit, until that is written. What is in it appears at once or not at
all, so a run that was killed goes on behind the last layer that was written down.
"""

import contextlib
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from reap_driver.files.matrices import Matrices
from reap_driver.observation.data_parallel import Ranks
from reap_driver.observation.file_digests import check_digests, digests
from reap_driver.observation.resume_file import FIELDS, ResumeFile
from reap_driver.observation.state_store import states_folder
from reap_driver.refitting.engine import STREAMS, LayerFacts
from reap_driver.workflow.inspection import Model
from reap_driver.workflow.outputs import strange_in
from reap_driver.workflow.refit_results import layer_facts
from reap_kernels.documents import Format, as_read
from reap_kernels.errors import CheckpointError, DataError
from reap_kernels.provenance import MAX_EXPERTS
from reap_kernels.schema import Flag, Int, ListOf, MapOf, Real, Record, Text

_ANY = Real(low=0)
_LAYER = Record(
    {
        "experts": ListOf(Int(0, MAX_EXPERTS), shortest=1),
        "ridge": _ANY,
        "error_before": _ANY,
        "error_after": _ANY,
        "kept": Flag(),
        "fitted": Int(),
        "held_out": Int(),
        "scale": Real(),
    }
)
FORMAT = Format(
    "reap-refit-state",
    1,
    "state of a re-fit",
    {**FIELDS, "position": Int(), "layers": MapOf(_LAYER), "files": MapOf(Text(100))},
    DataError,
    "delete its folder and run without `resume=True`",
    sealed=True,
)
_SHARE = 0.05  # of the time may go to saving states
_FILE, _MATRICES, _STATES = "state.json", "matrices", "states"
# What the folder may hold, also after a kill.
_PARTS = re.compile(r"\.?state\.json(\.[0-9a-f]{8})?|matrices|states")


class RefitState:
    """What one re-fit keeps until its output is written.

    Args:
        folder: of this re-fit alone, shared by the ranks, of which the first writes.
        world: the processes that share the data.

    Attributes:
        position: decoder layers that are done.
        layers: facts of those of them that have experts.
        matrices: of the first rank, new down projections of those of them whose re-fit is kept.
    """

    def __init__(self, folder: Path, world: Ranks) -> None:
        self.folder, self._world = folder, world
        self._file = ResumeFile(folder / _FILE, FORMAT, folder)
        self._run: dict[str, Any] = {}
        self._before, self._began = 0.0, time.monotonic()
        self._took, self._ended = 0.0, self._began
        self._writing: float | None = None
        self._begun = False
        self.position = 0
        self.layers: Mapping[str, LayerFacts] = {}
        self.matrices: Matrices

    def check(self, resume: bool | str, *, overwrite: bool) -> None:
        """Checks what is there, before any data is read.

        Raises:
            DataError: a re-fit is to be resumed, and there is none.
            CheckpointError: an interrupted re-fit left its state, and neither `resume` nor
                `overwrite` is given; or the folder holds something else.
        """
        strange = strange_in(self.folder, _PARTS)
        if strange is not None:
            raise CheckpointError(
                f"{self.folder}: is where layers that are done go, and holds {strange!r}, which is "
                "no part of that; move it away, or choose another output"
            )
        if resume is True:
            self._file.read()
        elif self._file.exists() and not resume and not overwrite:
            raise CheckpointError(
                f"{self.folder}: the state of a re-fit that was interrupted; give `resume=True` to "
                "go on from it, or `overwrite=True` to start anew"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs away; ranks other than the first are let in. Nothing is left of a run
        that ends before a layer is done.
        """
        with self._file.locked() if self._world.rank == 0 else contextlib.nullcontext():
            try:
                yield
            finally:
                if self._begun and not self.position:
                    self.remove()

    def begin(
        self,
        asked: Mapping[str, Any],
        environment: Mapping[str, Any],
        pruned: Model,
        resume: bool | str,
    ) -> None:
        """Reads what is done already where that is wanted, and is of the same run.

        Raises:
            DataError: it is of another run.
        """
        self._run = as_read({**asked, **environment})
        mine = self._world.rank == 0
        if resume and self._file.exists():
            content = self._file.read()
            self._file.check_same({**content["run"], "rank": ""}, {**self._run, "rank": ""})
            self._before, self.position = content["seconds"], content["position"]
            if mine:
                places = self._states_of_all(self.position)
                check_digests(FORMAT, self.folder, content["files"], places)
            self.layers = {
                name: LayerFacts(**{**facts, "experts": tuple(facts["experts"])})
                for name, facts in content["layers"].items()
            }
        elif mine:
            self.remove()
        if mine:
            self.folder.mkdir(exist_ok=True)
            self._begun = True
            self.matrices = Matrices.create(
                self.folder / _MATRICES,
                model=pruned.provenance["model"],
                kind="refit",
                resume=True,
            )
            lost = [n for n, one in self.layers.items() if one.kept and n not in self.matrices]
            if lost:
                path = self.folder / _FILE
                raise FORMAT.refusal(path, f"has {lost[0]} done, whose matrices are not there")
        self._world.barrier()

    def put(self, name: str, down: Tensor) -> None:
        """Adds a layer's new down projections."""
        if self._world.rank == 0:
            with self._file.writing():
                self.matrices.put(name, down)

    def due(self) -> bool:
        """Whether the states between two layers should be saved: that takes a small share of the
        time.
        """
        now = time.monotonic()
        due = self._took <= _SHARE * (now - self._ended)
        self._writing = now
        return self._world.of_first(str(due)) == str(True)

    def write(self, position: int, layers: Mapping[str, LayerFacts]) -> None:
        """Writes down that layers are done, whose states all ranks have saved."""
        self._world.barrier()
        self.position, self.layers = position, dict(layers)
        if self._world.rank == 0:
            known = {name: layer_facts(one) for name, one in layers.items()}
            with self._file.writing():
                files = digests(self.folder, self._states_of_all(position))
            self._file.write(self._run, self.seconds, position=position, layers=known, files=files)
        self._world.barrier()
        for stream in STREAMS:
            kept = states_folder(self.states / stream, position)
            for folder in kept.parent.iterdir():
                if folder != kept:
                    shutil.rmtree(folder, ignore_errors=True)
        self._ended = time.monotonic()
        if self._writing is not None:
            self._took, self._writing = self._ended - self._writing, None

    @property
    def seconds(self) -> float:
        """The re-fit took so far, interrupted runs included."""
        return self._before + time.monotonic() - self._began

    @property
    def states(self) -> Path:
        """The folder of this rank's states between two layers, and of what memory cannot hold."""
        return self.folder / _STATES / str(self._world.rank)

    def _states_of_all(self, position: int) -> list[Path]:
        """The folders of all ranks' states after a number of layers; some ranks may have none."""
        found = [
            states_folder(self.folder / _STATES / str(rank) / stream, position)
            for rank in range(self._world.size)
            for stream in STREAMS
        ]
        return [folder for folder in found if folder.is_dir()]

    def left(self) -> str:
        """How an interrupted run goes on, in words; empty where no layer is done."""
        if not self.position:
            return ""
        return (
            f"; the layers done are in {self.folder}: run the same command with `resume=True` to "
            "continue from there"
        )

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
