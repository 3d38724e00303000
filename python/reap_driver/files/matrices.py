"""A folder of new down projections, one file per layer, that compensate for what a plan removes.

Layers are added one by one, each at once under its name, so a run that was killed goes on with the
layers that are missing. The index has the digest of every file, and one over all.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reap_driver.base.arguments import typed
from reap_driver.base.json_text import json_in_lines
from reap_kernels.documents import Format
from reap_kernels.errors import PlanError
from reap_kernels.files import exists, is_file, replaced
from reap_kernels.provenance import MAX_EXPERTS, MODEL
from reap_kernels.schema import Anything, Int, ListOf, MapOf, Record, Text, short
from reap_kernels.tensor_files import read_tensors, write_tensors

INDEX = "matrices.json"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_REMEDY = "make it again, with its plan"
_LAYER = Record(
    {
        "file": Text(300),
        "shape": ListOf(Int(1, MAX_EXPERTS), 3, 3),
        "dtype": Text(choices=tuple(str(dtype).removeprefix("torch.") for dtype in _DTYPES)),
        "digest": Text(100),
    }
)
FORMAT = Format(
    "reap-matrices",
    1,
    "folder of matrices",
    {
        "model": MODEL,
        "kind": Text(choices=("width", "refit")),
        "layers": MapOf(_LAYER),
    },
    PlanError,
    _REMEDY,
    {"run": MapOf(Anything())},
    sealed=True,
)
LAYER_FORMAT = Format(
    "reap-matrices-layer",
    1,
    "file of matrices",
    {"layer": Text(500)},
    PlanError,
    _REMEDY,
    sealed=True,
)


class Matrices(Mapping[str, Tensor]):
    """The new down projections of a plan, by layer, read from their files when they are asked for.

    Attributes:
        folder: where they are.
        model: of the model they are for, as in `Plan.model`.
        kind: "width" (of experts that lose neurons) or "refit" (solved for a pruned model).
        run: what was asked for that made them.

    Example:
        >>> matrices = rd.Matrices.create("plan.matrices", model={"id": "MODEL"})
        >>> matrices.put("model.layers.0.mlp.experts", torch.zeros(24, 64, 32))
        >>> matrices = rd.Matrices.open("plan.matrices")
        >>> matrices["model.layers.0.mlp.experts"].shape
        torch.Size([24, 64, 32])
    """

    def __init__(self, folder: Path, content: Mapping[str, Any]) -> None:
        self.folder = folder
        self.model: dict[str, Any] = content["model"]
        self.kind: str = content["kind"]
        self.run: dict[str, Any] = content.get("run", {})
        self._layers: dict[str, dict[str, Any]] = content["layers"]
        self._digest: str = content["digest"]

    @classmethod
    @typed
    def create(
        cls,
        folder: str | os.PathLike[str],
        *,
        model: Mapping[str, Any],
        kind: str = "width",
        run: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> "Matrices":
        """A folder to put layers into; its parent must exist.

        Args:
            folder: a new or empty one, or with `resume` one of the same model, kind and run.
            model: as in `Plan.model`.
            kind: "width" or "refit".
            run: what is asked for, so that only the same is resumed.
            resume: whether to go on with the layers that the folder has.

        Raises:
            PlanError: the folder holds other things or matrices, or is damaged.
            OSError: it cannot be written.
        """
        path = Path(folder)
        content = {"model": model, "kind": kind, **({"run": run} if run else {}), "layers": {}}
        if exists(path) and (not path.is_dir() or any(path.iterdir())):
            if not resume:
                raise PlanError(f"{path}: exists already; delete it, or give another name")
            return cls.open(path)._same(FORMAT.complete(content))
        path.mkdir(exist_ok=True)
        return cls(path, _written(path, content))

    @classmethod
    @typed
    def open(cls, folder: str | os.PathLike[str]) -> "Matrices":
        """A folder that was written; files of layers are checked when they are read.

        Raises:
            PlanError: it is not there, of another format or version, or damaged.
        """
        path = Path(folder)
        content = FORMAT.read(path / INDEX)
        for name, entry in content["layers"].items():
            if entry["file"] != Path(entry["file"]).name:
                why = f"has the file {short(entry['file'])} of layer {short(name)} elsewhere"
                raise FORMAT.refusal(path / INDEX, why)
        return cls(path, content)

    @property
    def digest(self) -> str:
        """`sha256:...` over everything in the folder, as a plan records it."""
        return self._digest

    @property
    def layers(self) -> dict[str, tuple[int, int, int]]:
        """{layer: E', H, I' of its matrices}, without reading them."""
        return {name: tuple(entry["shape"]) for name, entry in self._layers.items()}

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a layer's matrices, without reading them."""
        dtype: torch.dtype = getattr(torch, self._entry(name)["dtype"])
        return dtype

    @typed
    def put(self, name: str, down: Tensor) -> None:
        """Adds or replaces a layer, at once.

        Args:
            name: of its experts module.
            down: [E', H, I'] floating point, on any device: output x input of every kept expert.

        Raises:
            PlanError: the name, shape or dtype is not possible, or a value is not finite.
            OSError: the disk refused.
        """
        file = f"{name}.safetensors"
        if Path(file).name != file or len(file) > 250 or not name.isprintable():
            raise PlanError(f"{short(name)}: names no layer; give the name of an experts module")
        if down.dim() != 3 or 0 in down.shape or down.dtype not in _DTYPES:
            raise PlanError(
                f"{name}: down is {down.dtype} {list(down.shape)}; give floating point of [experts "
                "kept, hidden size, neurons kept]"
            )
        if not bool(down.isfinite().all()):
            raise PlanError(f"{name}: down has values that are not finite; solve it with a ridge")
        with replaced(self.folder / file) as temporary:
            head = write_tensors({"down": down}, temporary, LAYER_FORMAT, {"layer": name})
        entry = {
            "file": file,
            "shape": list(down.shape),
            "dtype": str(down.dtype).removeprefix("torch."),
            "digest": head["digest"],
        }
        self._layers = {**self._layers, name: entry}
        content = {"model": self.model, "kind": self.kind, "layers": self._layers}
        content |= {"run": self.run} if self.run else {}
        self._digest = _written(self.folder, content)["digest"]

    def __getitem__(self, name: str) -> Tensor:
        """A layer's matrices, [E', H, I'], on the CPU.

        Raises:
            PlanError: the folder has no such layer, or its file is missing, damaged, not finite or
                of another run than the index.
        """
        entry = self._entry(name)
        path = self.folder / entry["file"]
        head, tensors = read_tensors(path, LAYER_FORMAT)
        down = tensors.get("down")
        if head["digest"] != entry["digest"] or down is None:
            raise LAYER_FORMAT.refusal(path, f"is another file than {INDEX} names")
        if list(down.shape) != entry["shape"]:
            why = f"holds {list(down.shape)}, {INDEX} says {entry['shape']}"
            raise LAYER_FORMAT.refusal(path, why)
        if not bool(down.isfinite().all()):
            raise LAYER_FORMAT.refusal(path, "holds values that are not finite")
        return down

    def __contains__(self, name: object) -> bool:
        return name in self._layers

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"Matrices: {len(self)} layers in {self.folder}"

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self._layers:
            raise PlanError(
                f"{self.folder}: has no matrices of layer {short(name)}, only of {len(self)} "
                f"others; {_REMEDY}"
            )
        return self._layers[name]

    def _same(self, asked: Mapping[str, Any]) -> "Matrices":
        """Itself, checked to be of what is asked for."""
        for field in ("model", "kind", "run"):
            found, wanted = getattr(self, field), asked.get(field, {})
            if found != wanted:
                raise PlanError(
                    f"{self.folder}: has matrices of another {field}: {short(found, 200)}, now it "
                    f"is {short(wanted, 200)}; delete the folder, or give another name"
                )
        return self


def folder_beside(plan: str | os.PathLike[str]) -> Path:
    """The folder of a plan's matrices, beside its file.

    Example:
        >>> print(folder_beside("runs/plan.json"))
        runs/plan.matrices
    """
    return Path(plan).with_suffix(".matrices")


def holds_matrices(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has an index of matrices."""
    return is_file(Path(folder) / INDEX)


def _written(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the index; returns what it holds."""
    head = FORMAT.complete(content)
    with replaced(folder / INDEX) as temporary:
        temporary.write_text(json_in_lines(head), encoding="utf-8")
    return head
