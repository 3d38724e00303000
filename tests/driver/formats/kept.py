"""What a pruned checkpoint must hold: the experts that are kept, as they were."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from reap_driver.load.resident import load_model

Kept = Mapping[str, tuple[int, ...]]


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights that are observed."""
    return load_model(folder).state_dict()


def check_kept(full: Mapping[str, Tensor], cut: Mapping[str, Tensor], kept: Kept) -> None:
    """Experts and router rows are those that are kept, everything else is as it was."""
    assert full.keys() == cut.keys()
    shorter = 0
    for name, tensor in full.items():
        owner = next((layer for layer in kept if name.startswith(layer.rpartition(".")[0])), None)
        if cut[name].shape == tensor.shape:
            assert torch.equal(cut[name], tensor), name
            continue
        assert owner is not None, name
        assert torch.equal(cut[name], tensor[list(kept[owner])]), name
        shorter += 1
    assert shorter >= 3 * len(kept)


def check_kept_files(model: Path, out: Path, kept: Kept) -> None:
    """Every stored tensor of a kept expert is as it was, under its new number; routers are cut, and
    everything else is as it was. For checkpoints that store each expert by itself.
    """
    full, cut = read_files(model), read_files(out)
    expected = {}
    for key, tensor in full.items():
        block = next((layer for layer in kept if key.startswith(f"{layer}.")), None)
        router = next(
            (layer for layer in kept if key == f"{layer[: -len('experts')]}gate.weight"), None
        )
        if block is not None:
            number, _, rest = key.removeprefix(f"{block}.").partition(".")
            if int(number) in kept[block]:
                expected[f"{block}.{kept[block].index(int(number))}.{rest}"] = tensor
        else:
            expected[key] = tensor if router is None else tensor[list(kept[router])]
    assert cut.keys() == expected.keys()
    for key, tensor in expected.items():
        assert cut[key].dtype == tensor.dtype
        assert torch.equal(*(one.flatten().view(torch.uint8) for one in (cut[key], tensor))), key


def read_files(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint as stored."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found
