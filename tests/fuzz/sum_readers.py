"""Readers of Gram matrices, new down projections, constants, and the state of a re-fit."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from reap_driver.base.json_text import json_in_lines
from reap_driver.files.gram_folder import GramFolder, GramWriter
from reap_driver.files.matrices import Matrices
from reap_driver.observation.data_parallel import Ranks
from reap_driver.workflow.refit_state import FORMAT as REFIT_STATE
from reap_driver.workflow.refit_state import RefitState
from reap_driver.writer.constants_file import export_constants, load_constants
from reap_kernels import LayerGram
from tests.fuzz.campaign import Nonsense, Reader
from tests.fuzz.changes import container, json_value
from tests.fuzz.inputs import in_file, unsealed
from tests.fuzz.world import World

_LAYER = "model.layers.0.mlp.experts"
_FACTS = {
    "experts": [0, 2],
    "ridge": 0.03,
    "error_before": 2.0,
    "error_after": 1.5,
    "kept": True,
    "fitted": 700,
    "held_out": 100,
    "scale": 1.0,
}


def sums(world: World) -> Iterable[Reader]:
    """Folders and files that hold or follow from Gram matrices, also with digests that fit."""
    new = world.folder / "sums"
    new.mkdir()
    for name, path, use, change in (
        ("gram folder", _grams(new), _use_grams, json_value),
        ("gram layer", _file_in(new / "grams"), _use_grams, container),
        ("matrices folder", _matrices(new), _use_matrices, json_value),
        ("matrices layer", _file_in(new / "plan.matrices"), _use_matrices, container),
        ("constants", _constants(world, new), _use_constants, container),
        ("state of a re-fit", _state(new), _use_state, json_value),
    ):
        valid = path.read_bytes()
        yield Reader(name, [valid], change, _restoring(path, valid, use))
        yield Reader(
            f"{name} without digest", [valid], change, unsealed(_restoring(path, valid, use)), 2
        )


def _grams(new: Path) -> Path:
    """The head of a folder of Gram matrices."""
    writer = GramWriter(new / "grams", [_LAYER])
    writer.put(_LAYER, LayerGram(2, 3))
    writer.finish({"notes": ["nothing was observed"]})
    return new / "grams" / "gram.json"


def _matrices(new: Path) -> Path:
    """The head of a folder of new down projections."""
    folder = new / "plan.matrices"
    model = {"config_digest": "sha256:" + "0" * 64}
    Matrices.create(folder, model=model, kind="width").put(_LAYER, torch.ones(2, 4, 3))
    return folder / "matrices.json"


def _file_in(folder: Path) -> Path:
    """The tensors of the one layer in a folder."""
    [path] = folder.glob("*.safetensors")
    return path


def _constants(world: World, new: Path) -> Path:
    path = new / "constants.safetensors"
    names = [f"model.layers.{index}.mlp.experts" for index in range(2)]
    export_constants(world.model, {name: _seen(world) for name in names}, path)
    return path


def _seen(world: World) -> LayerGram:
    """Gram matrices of a layer of the world's model, as of one row per expert."""
    from reap_driver.compat.model_config import load_config

    config = load_config(world.model)
    found = LayerGram(config.num_experts, config.moe_intermediate_size)
    found.count.fill_(1)
    found.weight.fill_(1)
    found.first.fill_(1)
    return found


def _state(new: Path) -> Path:
    """Where a re-fit was after one layer."""
    (new / "out.refit").mkdir()
    path = new / "out.refit" / "state.json"
    content = {"run": {"seed": 0}, "seconds": 1.0, "position": 1, "layers": {_LAYER: _FACTS}}
    content["files"] = {"states/0/original/states-00001/0.safetensors": "sha256:" + "0" * 64}
    path.write_text(json_in_lines(REFIT_STATE.complete(content)), encoding="utf-8")
    return path


def _restoring(path: Path, valid: bytes, use: Callable[[Path], None]) -> Callable[[bytes], None]:
    """Reads with another content of one file, which gets its own again: others need it."""

    def read(content: bytes) -> None:
        try:
            in_file(path, use)(content)
        finally:
            path.write_bytes(valid)

    return read


def _use_grams(path: Path) -> None:
    folder = GramFolder.open(path.parent)
    for name in folder.layers:
        found = folder.get(name)
        if not bool((found.count >= 0).all() and found.gram.tril().isfinite().all()):
            raise Nonsense("Gram matrices that no observation leaves")


def _use_matrices(path: Path) -> None:
    matrices = Matrices.open(path.parent)
    for name, shape in matrices.layers.items():
        down = matrices[name]
        if tuple(down.shape) != shape or not bool(down.isfinite().all()):
            raise Nonsense("matrices of another shape than said, or not finite")


def _use_constants(path: Path) -> None:
    for experts in load_constants(path).values():
        if any(number < 0 or found.ndim != 1 for number, found in experts.items()):
            raise Nonsense("a constant is no vector, or of no expert")


def _use_state(path: Path) -> None:
    state = RefitState(path.parent, Ranks())
    state.check(True, overwrite=False)
