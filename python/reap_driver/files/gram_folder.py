"""A folder of Gram matrices: one safetensors file per MoE layer, and a head that is written last.

A layer's file holds the lower triangles of the matrices of its experts, packed row by row. Each
file appears at once under its name and carries a digest, and `gram.json` lists the digests of all,
so a folder without it is one that is still being written.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reap_driver.base.json_text import json_in_lines
from reap_driver.files.exchange import partial_of, place
from reap_kernels import LayerGram
from reap_kernels.documents import Format
from reap_kernels.errors import DataError
from reap_kernels.files import is_file, replaced
from reap_kernels.model_match import merged_provenance
from reap_kernels.provenance import MAX_EXPERTS, MAX_TOKENS, PROVENANCE
from reap_kernels.schema import Int, ListOf, Record, Text
from reap_kernels.tensor_files import read_tensors, write_tensors

HEAD = "gram.json"
_REMEDY = "make one with `reap-kernels observe --gram`"
FORMAT = Format(
    "reap-gram",
    1,
    "Gram folder",
    {
        "layers": ListOf(
            Record(
                {
                    "layer": Text(500),
                    "file": Text(200),
                    "experts": Int(1, MAX_EXPERTS),
                    "intermediate_size": Int(1, MAX_EXPERTS),
                    "digest": Text(200),
                }
            ),
            shortest=1,
        ),
        "provenance": PROVENANCE,
    },
    DataError,
    _REMEDY,
    sealed=True,
)
LAYER = Format(
    "reap-gram-layer",
    1,
    "file of Gram matrices",
    {"layer": Text(500), "of": Text(200)},
    DataError,
    _REMEDY,
    sealed=True,
)


@dataclass(frozen=True)
class GramFile:
    """What a Gram folder says of one layer: its file, its sizes E and I, and the file's digest."""

    file: str
    experts: int
    intermediate_size: int
    digest: str

    @property
    def sizes(self) -> tuple[int, int]:
        """E and I."""
        return self.experts, self.intermediate_size


@dataclass(frozen=True)
class GramFolder:
    """Gram matrices on disk, read layer by layer.

    Attributes:
        folder: where they are.
        layers: qualified name of the experts module -> its file, in the model's order.
        provenance: of model, data, software and backend, as statistics have it.

    Example:
        >>> writer = rd.GramWriter("sums", ["layers.0.mlp.experts"])
        >>> writer.put("layers.0.mlp.experts", rk.LayerGram(num_experts=4, intermediate_size=8))
        >>> found = writer.finish({"notes": ["nothing was observed"]})
        >>> found.get("layers.0.mlp.experts").count
        tensor([0, 0, 0, 0])
    """

    folder: Path
    layers: Mapping[str, GramFile]
    provenance: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "GramFolder":
        """Opens a folder that is complete; its layers are read one by one.

        Raises:
            DataError: there is none, it is unfinished or damaged, or of another format or version.
        """
        path = Path(folder)
        head = path / HEAD
        if not is_file(head):
            why = "is missing, or still being written" if path.is_dir() else "is missing"
            raise FORMAT.refusal(path, why)
        content = FORMAT.read(head)
        layers = {
            entry["layer"]: GramFile(
                entry["file"], entry["experts"], entry["intermediate_size"], entry["digest"]
            )
            for entry in content["layers"]
        }
        if len(layers) < len(content["layers"]):
            raise FORMAT.refusal(head, "names a layer twice")
        for name, known in layers.items():
            if not is_file(path / known.file) or Path(known.file).name != known.file:
                raise FORMAT.refusal(path, f"lacks the file {known.file!r} of {name}")
        return cls(path, layers, content["provenance"])

    def get(self, layer: str) -> LayerGram:
        """The sums of a layer, on the CPU; only the lower triangles are filled.

        Raises:
            DataError: the folder has no such layer; or its file is damaged, of another run, or
                holds numbers that no observation leaves.
        """
        known = self._known(layer)
        path = self.folder / known.file
        head, sums = read_layer(path)
        sizes = sums.num_experts, sums.intermediate_size
        if (head["layer"], head["digest"]) != (layer, known.digest) or sizes != known.sizes:
            raise LAYER.refusal(path, f"is not the one that {HEAD} names for {layer}")
        return sums

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return sum((self.folder / known.file).stat().st_size for known in self.layers.values())

    def merge(self, other: "GramFolder", out: str | os.PathLike[str]) -> "GramFolder":
        """Writes both observations as one, layer by layer; rows of both count.

        Args:
            other: of the same model, and the same layers.
            out: the folder to write, which must not exist.

        Raises:
            DataError: the models do not match, or the layers differ; names what does.
        """
        what = "cannot merge Gram folders"
        provenance = merged_provenance(self.provenance, other.provenance, what)
        for name in [*self.layers, *other.layers]:
            mine, theirs = (folder.layers.get(name) for folder in (self, other))
            sizes = [known and known.sizes for known in (mine, theirs)]
            if sizes[0] != sizes[1]:
                raise DataError(
                    f"{what}: experts and neurons of {name} are {sizes[0]} in {self.folder} and "
                    f"{sizes[1]} in {other.folder}; merge observations of one model only"
                )
        writer = GramWriter(out, list(self.layers))
        for name in self.layers:
            writer.put(name, self.get(name).merge_(other.get(name)))
        return writer.finish(provenance)

    def _known(self, layer: str) -> GramFile:
        found = self.layers.get(layer)
        if found is None:
            raise DataError(
                f"{self.folder}: has no Gram matrices of {layer}; observe this model with "
                "`gram=True`, or give the folder that was made of it"
            )
        return found


class GramWriter:
    """Writes a Gram folder, layer by layer, beside its name until it is complete.

    Args:
        out: the folder to write; one that is there stays until the new one is complete.
        layers: names of the layers that it may hold, in the model's order.
        of: identifies the run; files of the same run that are there already are kept.
        part: where the files are meanwhile; by default `OUT.partial`.

    Example:
        >>> rd.GramWriter("sums", ["layers.0.mlp.experts"]).part.name
        'sums.partial'
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        layers: Sequence[str],
        *,
        of: str = "",
        part: Path | None = None,
    ) -> None:
        self.out = Path(out)
        self.part = partial_of(self.out) if part is None else part
        self._files = {name: f"gram-{number:04}.safetensors" for number, name in enumerate(layers)}
        self._of = of

    def put(self, layer: str, sums: LayerGram) -> None:
        """Writes the sums of a layer, at once and durably.

        Raises:
            OSError: the disk refused.
        """
        self.put_packed(layer, packed(sums))

    def put_packed(self, layer: str, tensors: Mapping[str, Tensor]) -> None:
        """The same, given the tensors of the file: see `packed`."""
        self.part.mkdir(parents=True, exist_ok=True)
        with replaced(self.part / self._files[layer]) as temporary:
            write_tensors(tensors, temporary, LAYER, {"layer": layer, "of": self._of})

    def get_packed(self, layer: str) -> dict[str, Tensor] | None:
        """The tensors of a layer's file, on the CPU; None if this run wrote none."""
        path = self.part / self._files[layer]
        if _head(path, self._of) is None:
            return None
        return read_tensors(path, LAYER)[1]

    def done(self, layer: str) -> bool:
        """Whether this run has written a layer, or completed the folder with it."""
        folders = (self.part, self.out)
        return any(_head(folder / self._files[layer], self._of) for folder in folders)

    def finish(self, provenance: Mapping[str, Any]) -> GramFolder:
        """Writes the head, and gives the folder its name; an older one is removed.

        Args:
            provenance: of what was observed, as `SaliencyStats.provenance`.

        Raises:
            DataError: no layer was written.
            OSError: the disk refused.
        """
        if not self.part.exists() and any(map(self.done, self._files)):
            return GramFolder.open(self.out)  # completed before what followed it was interrupted
        layers = []
        for name, file in self._files.items():
            path = self.part / file
            head = _head(path, self._of)
            if head is not None:
                with safe_open(os.fspath(path), framework="pt") as opened:
                    experts, width = opened.get_slice("first").get_shape()
                sizes = {"experts": experts, "intermediate_size": width}
                layers.append({"layer": name, "file": file, **sizes, "digest": head["digest"]})
        content = FORMAT.complete({"layers": layers, "provenance": dict(provenance)})
        with replaced(self.part / HEAD) as temporary:
            temporary.write_text(json_in_lines(content), encoding="utf-8")
        place(self.part, self.out)
        return GramFolder.open(self.out)

    def remove(self) -> None:
        """Deletes what was written so far."""
        shutil.rmtree(self.part, ignore_errors=True)


def packed(sums: LayerGram) -> dict[str, Tensor]:
    """The tensors of a layer's file, on the CPU.

    Returns:
        `gram` [E, I (I + 1) / 2] float32, the lower triangles row by row; `first` [E, I] float64,
        `weight` [E] float64 and `count` [E] int64.
    """
    experts, width = sums.num_experts, sums.intermediate_size
    triangle = torch.ones(width, width, dtype=torch.bool, device=sums.device).tril_()
    gram = torch.empty(experts, width * (width + 1) // 2, dtype=torch.float32)
    for expert in range(experts):
        gram[expert] = sums.gram[expert][triangle]
    rest = {name: getattr(sums, name).cpu() for name in ("first", "weight", "count")}
    return {"gram": gram, **rest}


def read_layer(path: Path) -> tuple[dict[str, Any], LayerGram]:
    """The head of a layer's file, and its sums, on the CPU.

    Raises:
        DataError: it is damaged, or holds numbers that no observation leaves.
    """
    head, tensors = read_tensors(path, LAYER)
    try:
        return head, _unpacked(tensors)
    except ValueError as error:
        raise LAYER.refusal(path, str(error)) from error


def file_bytes(experts: int, intermediate_size: int) -> int:
    """Bytes of the tensors of a layer's file, for E experts of I neurons.

    Example:
        >>> file_bytes(128, 768)  # a layer of Qwen3-30B-A3B
        151980032
    """
    whole = LayerGram.nbytes_of(experts, intermediate_size)
    return whole - 4 * experts * (intermediate_size * (intermediate_size - 1) // 2)


def layout(experts: int, width: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of a layer's file, for E experts of I neurons."""
    return {
        "gram": ((experts, width * (width + 1) // 2), torch.float32),
        "first": ((experts, width), torch.float64),
        "weight": ((experts,), torch.float64),
        "count": ((experts,), torch.int64),
    }


def _unpacked(tensors: Mapping[str, Tensor]) -> LayerGram:
    """The sums of a layer from the tensors of its file.

    Raises:
        ValueError: they are not those of a layer, or no observation leaves them.
    """
    if "first" not in tensors or tensors["first"].ndim != 2 or not tensors["first"].numel():
        raise ValueError("has no tensor first [experts, neurons]")
    experts, width = tensors["first"].shape
    wanted = layout(experts, width)
    if tensors.keys() != wanted.keys():
        raise ValueError(f"holds the tensors {sorted(tensors)}; expected {sorted(wanted)}")
    for name, (shape, dtype) in wanted.items():
        found = tensors[name]
        if found.shape != shape or found.dtype != dtype:
            raise ValueError(
                f"has {name} of {found.dtype} {list(found.shape)}; expected {dtype} {list(shape)}"
            )
        if not bool(found.isfinite().all()):
            raise ValueError(f"has {name} with NaN or an infinity")
    count = tensors["count"]
    if bool(((count < 0) | (count > MAX_TOKENS)).any()):
        raise ValueError(f"has a count outside 0 to {MAX_TOKENS}")
    sums = LayerGram(experts, width)
    triangle = torch.ones(width, width, dtype=torch.bool).tril_()
    for expert in range(experts):
        sums.gram[expert][triangle] = tensors["gram"][expert]
    for name in ("first", "weight", "count"):
        getattr(sums, name).copy_(tensors[name])
    return sums


def _head(path: Path, of: str) -> dict[str, Any] | None:
    """The head of a layer's file, without its tensors; None if there is none of this run."""
    if not is_file(path):
        return None
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            head: dict[str, Any] = json.loads((file.metadata() or {}).get(LAYER.name, "{}"))
    except (SafetensorError, ValueError):
        return None
    return head if head.get("of") == of else None
