"""Loading in parts: the same tensors whatever the chunks, and errors that name the tensor."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import core_model_loading, modeling_utils
from transformers.utils import logging as library_logging

from reap_driver.compat import partial_load
from reap_driver.compat.conversion import KeyMap
from reap_driver.compat.partial_load import Chunk, LazyTensor, divide_into_chunks
from reap_driver.load.resident import load_model
from reap_driver.load.streamed_model import StreamedModel, open_streamed
from reap_kernels.errors import CheckpointError, UnsupportedModel
from tests.driver import zoo
from tests.driver.writer import saved
from tests.limits import HUNG

_NAMES = ("qwen3_moe", "mixtral", "deepseek_v3", "deepseek-v3.2", "gpt-oss-120b")


@pytest.fixture
def folder(
    request: pytest.FixtureRequest, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> Path:
    """A model of the zoo, or the small checkpoint of a published one."""
    name: str = request.param
    if name not in zoo.core_names():
        return checkpoint(name)
    saved.save(name, tmp_path / "model")
    return tmp_path / "model"


def in_chunks_of(size: int, monkeypatch: pytest.MonkeyPatch) -> list[Chunk]:
    """Divides keys into chunks of `size` bytes, and lists them."""
    made: list[Chunk] = []

    def small(keys: KeyMap, targets: Any, tensors: Any) -> list[Chunk]:
        chunks = divide_into_chunks(keys, targets, tensors, size)
        made.extend(chunks)
        return chunks

    monkeypatch.setattr(partial_load, "divide_into_chunks", small)
    return made


def experts_of(chunk: Chunk) -> set[int]:
    """The ids of the experts in a chunk."""
    return {int(key.partition(".experts.")[2].partition(".")[0]) for key in chunk.keys}


def loaded(folder: Path) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in load_model(folder).state_dict().items()}


@pytest.mark.parametrize("folder", _NAMES, indirect=True)
def test_chunks_of_any_size_give_the_same_tensors(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP8 with scales, and MXFP4, whose experts are stacked on disk, too."""
    whole = in_chunks_of(1 << 40, monkeypatch)
    wanted = loaded(folder)
    matrix = next((t.nbytes for k, t in saved.read_all(folder).items() if ".experts.0." in k), 0)
    # One expert in each; and three, which do not divide them evenly.
    for size in (1, 3 * 2 * matrix):
        small = in_chunks_of(size, monkeypatch)
        found = loaded(folder)
        assert len(small) > len(whole)
        assert size > 1 or all(len(experts_of(chunk)) == 1 for chunk in small if chunk.experts)
        assert sorted(k for c in small for k in c.keys) == sorted(k for c in whole for k in c.keys)
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert saved.same_bytes(found[key], tensor), key


def test_smallest_chunks_hold_one_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a stacked tensor are in the order of its experts, with their total number."""
    saved.save("qwen3_moe", tmp_path / "model")
    made = in_chunks_of(1, monkeypatch)
    load_model(tmp_path / "model")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    chunks = [chunk for chunk in made if name in chunk.experts]
    assert [experts_of(chunk) for chunk in chunks] == [{number} for number in range(8)]
    assert [chunk.experts[name] for chunk in chunks] == [8] * 8


class Sized(LazyTensor):
    """A tensor of which only the size is known."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def __getitem__(self, index: Any) -> torch.Tensor:
        raise AssertionError("dividing reads nothing")

    def get_dtype(self) -> str:
        raise AssertionError("dividing asks for sizes only")

    def get_shape(self) -> list[int]:
        raise AssertionError("dividing asks for sizes only")


@pytest.fixture(scope="module")
def keys() -> KeyMap:
    return KeyMap(zoo.tiny("qwen3_moe")[1])


def expert(number: int, matrix: str) -> str:
    return f"model.layers.0.mlp.experts.{number}.{matrix}_proj.weight"


def divided(keys: KeyMap, names: list[str], size: int) -> list[Chunk]:
    """Chunks of tensors of 10 bytes each."""
    targets = {name: keys.locate(name) for name in sorted(names)}
    return divide_into_chunks(keys, targets, {name: Sized(10) for name in names}, size)


def test_chunks_are_as_large_as_asked(keys: KeyMap) -> None:
    """Chunks hold whole experts; other tensors are combined up to the size."""
    others = [f"model.layers.0.{n}.weight" for n in ("input_layernorm", "self_attn.q_proj")]
    names = [expert(number, m) for number in range(8) for m in ("up", "gate", "down")]
    made = divided(keys, [*others, *names], 65)
    gate_up = [chunk for chunk in made if any("gate" in key for key in chunk.keys)]
    assert [len(chunk.keys) for chunk in gate_up] == [6, 6, 4]
    assert gate_up[0].keys == tuple(expert(n, m) for m in ("gate", "up") for n in range(3))
    down = [chunk for chunk in made if any("down" in key for key in chunk.keys)]
    assert [len(chunk.keys) for chunk in down] == [6, 2]
    assert made[-1].keys == tuple(others)


def test_lists_of_unequal_length_stay_together(keys: KeyMap) -> None:
    """Experts of which one lacks a key are converted together, which raises an error."""
    names = [expert(n, m) for n in range(8) for m in ("gate", "up") if (n, m) != (3, "up")]
    [chunk] = divided(keys, names, 20)
    assert sorted(chunk.keys) == sorted(names)
    assert not chunk.experts


# -- checkpoints that are not what config.json says ------------------------------------------------


def spoiled(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A model of 8 experts whose tensors a test changes."""
    saved.save("qwen3_moe", folder)

    def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        change(tensors)
        return tensors

    saved.change_tensors(folder, changed)
    return folder


@pytest.fixture(params=[1, 1 << 40], ids=["small", "whole"])
def any_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of one expert, and all together."""
    in_chunks_of(request.param, monkeypatch)


_GATE_UP, _DOWN = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def _pop(*keys: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: [tensors.pop(f"model.layers.1.{key}") for key in keys]


def _cut(key: str, rows: int) -> Callable[[dict[str, Tensor]], Any]:
    """Removes all but the first rows of a tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        name = f"model.layers.1.{key}"
        tensors[name] = tensors[name][:rows].clone()

    return change


@pytest.mark.usefixtures("any_chunks")
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_pop("mlp.experts.3.up_proj.weight"), _GATE_UP),
        (_pop("mlp.experts.3.down_proj.weight"), _DOWN),
        (_pop("mlp.experts.3.gate_proj.weight", "mlp.experts.5.up_proj.weight"), _GATE_UP),
        (_cut("mlp.experts.3.down_proj.weight", 5), _DOWN),
        (_cut("mlp.experts.3.down_proj.weight", 1), _DOWN),  # would broadcast
        (_cut("mlp.experts.0.up_proj.weight", 1), _GATE_UP),
    ],
    ids=["no up", "no down", "other experts", "rows", "one row", "first"],
)
def test_layer_that_does_not_fit_is_named(
    change: Callable[[dict[str, Tensor]], Any], name: str, tmp_path: Path
) -> None:
    """When the layer is loaded, and at once by `load_model`."""
    folder = spoiled(tmp_path / "model", change)
    with open_streamed(folder) as streamed:
        assert streamed.ready(0)
        with pytest.raises(CheckpointError, match=rf"model\.layers\.1\.{name}.*one and the same"):
            streamed.ready(1)
    with pytest.raises(CheckpointError, match=rf"model\.layers\.1\.{name}.*one and the same"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "rows", "shapes"),
    [
        ("mlp.gate.weight", 5, r"\[5, 32\] instead of \[8, 32\]"),
        ("input_layernorm.weight", 1, r"\[1\] instead of \[32\]"),  # would broadcast
    ],
)
def test_another_shape_is_found_before_a_layer_is_loaded(
    name: str, rows: int, shapes: str, tmp_path: Path
) -> None:
    folder = spoiled(tmp_path / "model", _cut(name, rows))
    said = rf"model\.layers\.1\.{name} \({shapes}\).*one and the same"
    with pytest.raises(CheckpointError, match=said), open_streamed(folder):
        pass
    with pytest.raises(CheckpointError, match=said):
        load_model(folder)


@pytest.mark.parametrize("key", ["mlp.gate.weight", "self_attn.q_proj.weight"])
def test_missing_tensor_is_found_before_a_layer_is_loaded(key: str, tmp_path: Path) -> None:
    folder = spoiled(tmp_path / "model", _pop(key))
    with (
        pytest.raises(CheckpointError, match=rf"missing .*model\.layers\.1\.{key}"),
        open_streamed(folder),
    ):
        pass


# -- a layer at a time -----------------------------------------------------------------------------


@pytest.fixture
def streamed(tmp_path: Path) -> Iterator[StreamedModel]:
    saved.save("deepseek_v3", tmp_path / "model")
    with open_streamed(tmp_path / "model") as opened:
        yield opened


def away(streamed: StreamedModel) -> list[set[bool]]:
    """For each layer, whether its tensors are on the meta device."""
    tensors = [[*m.parameters(), *m.buffers()] for _, m in streamed.layers]
    return [{tensor.is_meta for tensor in layer} for layer in tensors]


def test_layers_come_and_go(streamed: StreamedModel, tmp_path: Path) -> None:
    """Also in another order, and again; buffers that are in the checkpoint too."""
    wanted = load_model(tmp_path / "model").state_dict()
    outside = [
        key
        for key in wanted
        if not key.startswith(tuple(f"{name}." for name, _ in streamed.layers))
    ]
    assert away(streamed) == [{True}] * len(streamed.layers)
    for layer in (1, 0, 1):
        assert streamed.ready(layer)
        state = streamed.model.state_dict()
        for key in outside:
            assert torch.equal(state[key], wanted[key])
        for key in (key for key in wanted if key.startswith(f"{streamed.layers[layer][0]}.")):
            assert saved.same_bytes(state[key], wanted[key]), key
        assert [index for index, met in enumerate(away(streamed)) if met == {False}] == [layer]
        streamed.release(layer)
    assert away(streamed) == [{True}] * len(streamed.layers)


def test_prefetching_twice_and_past_the_end(streamed: StreamedModel) -> None:
    """Nothing is read twice."""
    for layer in (0, 0, 1, len(streamed.layers), 0):
        streamed.prefetch(layer)
    assert streamed.ready(1)
    assert streamed.ready(0)
    read = streamed.bytes_read
    assert streamed.ready(0)
    assert streamed.bytes_read == read


def test_layers_of_two_models_come_one_at_a_time(
    streamed: StreamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What loading replaces in the library is the library's, not a model's."""
    inside, most, convert = [0], [0], partial_load._converted

    def counted(*arguments: Any) -> Any:
        inside[0] += 1
        time.sleep(0.02)
        most[0] = max(most[0], inside[0])
        try:
            return convert(*arguments)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(partial_load, "_converted", counted)
    saved.save("qwen3_moe", tmp_path / "other")
    with open_streamed(tmp_path / "other") as other:
        for one in (streamed, other):
            one.prefetch(1)
        assert streamed.ready(1)
        assert other.ready(1)
    assert most == [1]


def tie(monkeypatch: pytest.MonkeyPatch, folder: Path, pairs: dict[str, str]) -> None:
    """A model whose class ties tensors, saved under both names."""
    from transformers import Qwen3MoeForCausalLM

    saved.save("qwen3_moe", folder)
    monkeypatch.setattr(Qwen3MoeForCausalLM, "_tied_weights_keys", pairs)
    saved.change_config(folder, tie_word_embeddings=True)

    def alike(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {target: tensors[source].clone() for target, source in pairs.items()}

    saved.change_tensors(folder, alike)


_ROUTER_WEIGHTS = {"model.layers.1.mlp.gate.weight": "model.layers.0.mlp.gate.weight"}


@pytest.mark.parametrize("held", ["both", "target", "source"])
def test_tied_layers_are_loaded_but_not_streamed(
    held: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the two names the checkpoint uses."""
    folder = tmp_path / "model"
    tie(monkeypatch, folder, _ROUTER_WEIGHTS)
    [(target, source)] = _ROUTER_WEIGHTS.items()
    wanted = saved.read_all(folder)[source]
    drop = {"both": (), "target": (source,), "source": (target,)}[held]
    saved.change_tensors(folder, lambda ts: {k: t for k, t in ts.items() if k not in drop})
    model = load_model(folder)
    first, second = (model.get_parameter(name) for name in (source, target))
    assert first is second
    assert torch.equal(first, wanted)
    with (
        pytest.raises(UnsupportedModel, match=r"mlp\.gate\.weight of .* shares .*`stream='never'`"),
        open_streamed(folder),
    ):
        pass


def test_embeddings_tied_outside_layers_are_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tie(monkeypatch, tmp_path / "model", {"lm_head.weight": "model.embed_tokens.weight"})
    with open_streamed(tmp_path / "model") as streamed:
        assert streamed.model.lm_head.weight is streamed.model.model.embed_tokens.weight
        assert not streamed.model.lm_head.weight.is_meta


# -- what is replaced in the library ---------------------------------------------------------------


def library() -> tuple[Any, ...]:
    """Everything in the library and the process that loading changes temporarily."""
    return (
        core_model_loading.convert_and_load_state_dict_in_model,
        core_model_loading.set_param_for_module,
        modeling_utils.convert_and_load_state_dict_in_model,
        library_logging.is_progress_bar_enabled(),
        library_logging.get_logger("transformers.core_model_loading").level,
        os.environ.get("HF_DEACTIVATE_ASYNC_LOAD"),
    )


@pytest.mark.parametrize("before", [None, "0"])
@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("end", ["loaded", "error in from_pretrained", "error in a layer"])
def test_library_is_as_it_was(
    before: str | None, bars: bool, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before is None:
        monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    else:
        monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", before)
    shown = library_logging.is_progress_bar_enabled()
    (library_logging.enable_progress_bar if bars else library_logging.disable_progress_bar)()
    try:
        was = library()
        key = {
            "loaded": None,
            "error in from_pretrained": "model.norm.weight",
            "error in a layer": "model.layers.1.mlp.gate.weight",
        }[end]
        cut = {} if key is None else {key: torch.zeros(3, 3)}
        folder = spoiled(tmp_path / "model", lambda tensors: tensors.update(cut))
        if key is None:
            load_model(folder)
        else:
            with pytest.raises(CheckpointError, match=key):
                load_model(folder)
        assert library() == was
    finally:
        (library_logging.enable_progress_bar if shown else library_logging.disable_progress_bar)()


def test_stopping_while_a_layer_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The context ends after the current chunk, and the library is restored."""
    in_chunks_of(1, monkeypatch)
    saved.save("qwen3_moe", tmp_path / "model")
    was = library()
    began, placed = threading.Event(), []
    with open_streamed(tmp_path / "model") as streamed:
        own = streamed._parts._placer

        def placer(chunk: Chunk, gathered: Any) -> Any:
            placed.append(chunk)
            began.set()
            assert streamed._stopped.wait(HUNG)
            return own(chunk, gathered)

        monkeypatch.setattr(streamed._parts, "_placer", placer)
        streamed.prefetch(0)
        streamed.prefetch(1)
        assert began.wait(HUNG)
    assert len(placed) == 1
    assert library() == was
