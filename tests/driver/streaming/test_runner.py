"""One layer at a time through a model's own forward: the same bits, or a refusal."""

from collections import UserDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reap_driver.observation.batch_state import BatchState
from reap_driver.observation.layer_runner import LayerRunner
from reap_driver.observation.state_store import read_state, write_state
from reap_kernels.errors import UnsupportedModel

WIDTH, COUNT = 8, 4

Step = Callable[..., Any]


class Layer(nn.Module):
    """A layer whose computation a test defines: `step(self, h, *args)`."""

    def __init__(self, index: int, step: Step) -> None:
        super().__init__()
        self.index, self.step = index, step
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.step(self, *args, **kwargs)


class Model(nn.Module):
    """Layers, and a forward that a test defines: `body(self, h)`, with h a copy of the batch."""

    def __init__(self, step: Step, body: Step) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(index, step) for index in range(COUNT))
        self.body = body

    def forward(self, batch: Tensor) -> Any:
        return self.body(self, batch * 2)


def plain(layer: Layer, h: Tensor) -> Tensor:
    """A layer that takes and returns a tensor."""
    return torch.tanh(layer.linear(h))


def in_turn(model: Model, h: Tensor) -> Tensor:
    """The usual loop."""
    for layer in model.layers:
        h = layer(h)
    return h


def data() -> list[Tensor]:
    """Batches of different sizes."""
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, WIDTH, generator=rng) for size in (2, 1)]


@torch.no_grad()
def replay(
    model: Model, batches: Sequence[Tensor], via: Callable[[BatchState], BatchState] = lambda s: s
) -> list[Any]:
    """What the model returns when its layers ran one by one, as `run_streamed` does it."""
    runner = LayerRunner([(f"layers.{number}", layer) for number, layer in enumerate(model.layers)])
    states: dict[int, BatchState | None] = dict.fromkeys(range(len(batches)))
    outputs: list[Any] = []
    with runner.bound():
        for index in range(COUNT):
            for number, batch in enumerate(batches):
                new = runner.run(index, lambda b=batch: model(b.clone()), states[number])
                states[number] = states[number] if new is None else via(new)
        for number, batch in enumerate(batches):
            left = runner.run(
                COUNT, lambda b=batch: outputs.append(model(b.clone())), states[number]
            )
            assert left is None
    return outputs


@pytest.fixture(params=["kept", "files"])
def via(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[BatchState], BatchState]:
    """States as they are, and as they are read from files."""

    def written(state: BatchState) -> BatchState:
        write_state(tmp_path / "state", state)
        return read_state(tmp_path / "state")

    return written if request.param == "files" else lambda state: state


def assert_replayed(model: Model, via: Callable[[BatchState], BatchState] = lambda s: s) -> None:
    """The bits of plain forwards, for every batch."""
    batches = data()
    with torch.no_grad():
        wanted = [model(batch.clone()) for batch in batches]
    for mine, theirs in zip(replay(model, batches, via), wanted, strict=True):
        assert type(mine) is type(theirs)
        pairs = zip(mine, theirs, strict=True) if isinstance(mine, tuple) else [(mine, theirs)]
        assert all(torch.equal(left, right) for left, right in pairs)


@torch.no_grad()
def refused(model: Model, *words: str) -> None:
    """The model is refused with this text, and its forwards are restored."""
    batches = data()
    with pytest.raises(UnsupportedModel, match="`stream='never'`") as caught:
        replay(model, batches)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not any("forward" in vars(layer) for layer in model.layers)
    model(batches[0].clone())


# -- what is replayed ------------------------------------------------------------------------------


def test_tensor(via: Callable[[BatchState], BatchState]) -> None:
    assert_replayed(Model(plain, in_turn), via)


def test_tuple_with_none_and_numbers(via: Callable[[BatchState], BatchState]) -> None:
    def step(layer: Layer, h: Tensor, *, carried: Tensor | None) -> tuple[Any, ...]:
        h = plain(layer, h if carried is None else h + carried)
        return h, [h.mT.contiguous().mT, {"twice": 2 * h, 3: h > 0}], None, 1.5

    def body(model: Model, h: Tensor) -> tuple[Tensor, Tensor]:
        carried = None
        for layer in model.layers:
            h, (other, named), nothing, number = layer(h, carried=carried)
            assert nothing is None
            carried = other * number + named["twice"] * named[3]
        return h, carried

    assert_replayed(Model(step, body), via)


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_entries_of_a_dict_added_replaced_and_deleted(
    kind: type[Any], via: Callable[[BatchState], BatchState]
) -> None:
    """Layer 0 adds one, 1 replaces it and one of the model's, 2 deletes both, 3 looks."""

    def step(layer: Layer, h: Tensor, shared: Any) -> Tensor:
        h = plain(layer, h + sum(v for v in shared.values() if isinstance(v, Tensor)))
        if layer.index == 0:
            shared["new"], shared["deep"] = h * 3, {"list": [h, h[:1]]}
        elif layer.index == 1:
            shared["new"], shared["old"] = h * 5, h * 7
            shared["deep"]["list"][0] = h * 11
            shared["inner"]["by model"].append(h)
        elif layer.index == 2:
            del shared["new"], shared["old"]
        else:
            assert sorted(shared) == ["deep", "inner", "same"]
            h = h + shared["deep"]["list"][0] + shared["inner"]["by model"][0]
        return h

    def body(model: Model, h: Tensor) -> Tensor:
        shared = kind({"old": h + 1, "same": h + 2, "inner": {"by model": []}})
        for layer in model.layers:
            h = layer(h, shared)
        return h

    assert_replayed(Model(step, body), via)


def test_list_that_layers_append_to_and_shorten(via: Callable[[BatchState], BatchState]) -> None:
    def step(layer: Layer, h: Tensor, shared: list[Tensor]) -> Tensor:
        h = plain(layer, sum(shared, h))
        if layer.index == 2:
            shared.pop(0)
        shared.append(h * 2)
        return h

    def body(model: Model, h: Tensor) -> Tensor:
        shared: list[Tensor] = [h + 1]
        for layer in model.layers:
            h = layer(h, shared=shared)
        return h

    assert_replayed(Model(step, body), via)


def test_list_that_the_model_appends_outputs_to(via: Callable[[BatchState], BatchState]) -> None:
    """Given to every layer, it is part of the state: all earlier outputs may be used."""

    def step(layer: Layer, h: Tensor, earlier: list[Tensor]) -> Tensor:
        return plain(layer, sum(earlier, h))

    def body(model: Model, h: Tensor) -> Tensor:
        earlier: list[Tensor] = []
        for layer in model.layers:
            h = layer(h, earlier)
            earlier.append(h)
        return h

    assert_replayed(Model(step, body), via)


def test_dict_given_to_some_layers_only(via: Callable[[BatchState], BatchState]) -> None:
    """Layer 3 finds what layer 0 wrote, although 1 and 2 do not receive the dict."""

    def step(layer: Layer, h: Tensor, shared: dict[str, Tensor] | None = None) -> Tensor:
        h = plain(layer, h + shared.get("h", 0) if shared is not None else h)
        if shared is not None:
            shared["h"] = h
        return h

    def body(model: Model, h: Tensor) -> Tensor:
        shared: dict[str, Tensor] = {}
        for layer in model.layers:
            h = layer(h) if layer.index in (1, 2) else layer(h, shared=shared)
        return h + shared["h"]

    assert_replayed(Model(step, body), via)


def test_two_dicts_under_one_name(via: Callable[[BatchState], BatchState]) -> None:
    """Each is for two layers; what the model adds and no layer reads does not matter."""

    def step(layer: Layer, h: Tensor, shared: dict[str, Tensor]) -> Tensor:
        shared["h"] = h = plain(layer, h + shared.get("h", 0))
        return h

    def body(model: Model, h: Tensor) -> Tensor:
        first, second, before = {}, {}, None  # type: ignore[var-annotated]
        for layer in model.layers:
            first["before"], before = before, h
            h = layer(h, first if layer.index < 2 else second)
        return h + first["h"] + second["h"]

    assert_replayed(Model(step, body), via)


def test_one_batch_skips_a_layer(via: Callable[[BatchState], BatchState]) -> None:
    def body(model: Model, h: Tensor) -> Tensor:
        for layer in model.layers:
            if len(h) == 1 and layer.index in (0, 2):
                continue
            h = layer(h)
        return h

    assert_replayed(Model(plain, body), via)


def test_layer_that_writes_to_its_own_input(via: Callable[[BatchState], BatchState]) -> None:
    """And to what it stored in a dict, which is the same tensor as its output."""

    def step(layer: Layer, h: Tensor, shared: dict[str, Tensor]) -> Tensor:
        h += plain(layer, h)
        shared["h"] = h
        return h

    def body(model: Model, h: Tensor) -> Tensor:
        shared: dict[str, Tensor] = {}
        for layer in model.layers:
            h = layer(h, shared)
        return h + shared["h"]

    assert_replayed(Model(step, body), via)


def test_computing_with_the_devices_and_shapes_of_outputs() -> None:
    def body(model: Model, h: Tensor) -> Tensor:
        scale = torch.ones(WIDTH)
        for layer in model.layers:
            h = layer(h)
            scale = scale.to(h.device, h.dtype) + torch.ones(h.shape[-1], device=h.device)
        return h * scale

    assert_replayed(Model(plain, body))


# -- what is refused -------------------------------------------------------------------------------


def test_output_used_two_layers_later() -> None:
    def body(model: Model, h: Tensor) -> Tensor:
        before = torch.zeros_like(h)
        for layer in model.layers:
            h, before = layer(h + before), h
        return h

    refused(Model(plain, body), "layers.2")


def test_output_used_in_an_expression_with_known_tensors() -> None:
    def body(model: Model, h: Tensor) -> Tensor:
        first = h = model.layers[0](h)
        h = model.layers[1](h)
        best, _ = first.mT.max(-1)
        mixed = torch.cat([torch.ones_like(h), h * torch.sigmoid(first)], 1) @ torch.eye(WIDTH)
        return model.layers[3](model.layers[2](mixed * best.unsqueeze(1)))

    refused(Model(plain, body), "layers.2")


def test_output_kept_in_a_list_of_the_model() -> None:
    def body(model: Model, h: Tensor) -> Tensor:
        kept = [h]
        for layer in model.layers:
            kept.append(layer(torch.stack(kept).sum(0)))
        return kept[-1]

    refused(Model(plain, body), "layers.2")


def test_output_written_into_a_known_tensor() -> None:
    """The real tensor would keep its old value."""

    def body(model: Model, h: Tensor) -> Tensor:
        total = torch.zeros_like(h)
        for layer in model.layers:
            h = layer(h + total)
            total[:, :1] = h[:, 1:2]
        return h

    refused(Model(plain, body), "the model uses the output of a layer", "__setitem__")


def test_output_looked_at_between_layers() -> None:
    """No error of torch about tensors without data."""

    def body(model: Model, h: Tensor) -> Tensor:
        for layer in model.layers:
            h = layer(h)
            h = h.clamp(-1, 1) if (h > 9).any() else h
        return h

    refused(Model(plain, body), "the model uses the output of a layer", "__bool__")


def test_layer_run_twice() -> None:
    def body(model: Model, h: Tensor) -> Tensor:
        for layer in model.layers:
            h = layer(h)
            if layer.index == 1:
                h = layer(h)
        return h

    refused(Model(plain, body), "layers.1 runs twice")


@pytest.mark.parametrize(("order", "late"), [((0, 2, 1, 3), 1), ((0, 1, 3, 2), 2)])
def test_layers_out_of_order(order: tuple[int, ...], late: int) -> None:
    """Also if only the last forward, to the model's end, reaches the late layer."""

    def body(model: Model, h: Tensor) -> Tensor:
        for index in order:
            h = model.layers[index](h)
        return h

    refused(Model(plain, body), f"layers.{late} runs after layers that follow it")


def test_layer_that_one_forward_calls_and_another_does_not() -> None:
    calls = 0

    def body(model: Model, h: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        for layer in model.layers:
            if layer.index != 1 or calls > 4:  # two batches, two layers
                h = layer(h)
        return h

    refused(Model(plain, body), "layers.1 was skipped on a batch")


def test_stack_run_twice() -> None:
    """Detected by a forward that reaches the model's end."""

    def body(model: Model, h: Tensor) -> Tensor:
        return in_turn(model, in_turn(model, h))

    refused(Model(plain, body), "layers.0 runs twice")


class Cache:
    """An object in which a layer could store anything."""


def test_unknown_object_given() -> None:
    def step(layer: Layer, h: Tensor, cache: Any) -> Tensor:
        return plain(layer, h)

    def body(model: Model, h: Tensor) -> Tensor:
        for layer in model.layers:
            h = layer(h, {"deep": [Cache() if layer.index == 1 else None]})
        return h

    refused(Model(step, body), "layers.1 is given a Cache")


def test_unknown_object_returned() -> None:
    def step(layer: Layer, h: Tensor) -> Any:
        return plain(layer, h), (Cache() if layer.index == 2 else None)

    def body(model: Model, h: Tensor) -> Tensor:
        for layer in model.layers:
            h = layer(h)[0]
        return h

    refused(Model(step, body), "layers.2 passes on a Cache")


@pytest.mark.parametrize("where", range(COUNT))
def test_shared_tensor_changed_in_place(where: int) -> None:
    """By the first layer as by any other."""

    def step(layer: Layer, h: Tensor, shared: Any) -> Tensor:
        if layer.index == where:
            shared["bias"][0].add_(1)
        return plain(layer, h + shared["bias"][0])

    def body(model: Model, h: Tensor) -> Tensor:
        shared = {"bias": [torch.zeros(WIDTH)]}
        for layer in model.layers:
            h = layer(h, shared)
        return h

    refused(Model(step, body), f"layers.{where} changes a tensor that other layers use")


def test_changed_input_of_the_first_layer_used_again() -> None:
    """It is recomputed in every forward, as it was before the layer changed it."""

    def step(layer: Layer, h: Tensor) -> Tensor:
        return h.add_(plain(layer, h)) * 2 if layer.index == 0 else plain(layer, h)

    def body(model: Model, h: Tensor) -> Tensor:
        start = h
        h = model.layers[1](model.layers[0](h))
        return model.layers[3](model.layers[2](h) + start)

    refused(Model(step, body), "layers.3")


def test_output_changed_between_layers_by_a_batch_that_skips_one() -> None:
    """The second forward from the same state would change it again."""

    def body(model: Model, h: Tensor) -> Tensor:
        for layer in model.layers:
            if layer.index != 2:
                h = layer(h)
                h += 1
        return h

    refused(Model(plain, body), "in place", "layers.2")


# -- forwards that end otherwise -------------------------------------------------------------------


def test_error_inside_a_layer_leaves_forwards_as_they_were() -> None:
    def step(layer: Layer, h: Tensor) -> Tensor:
        if layer.index == 2:
            raise ZeroDivisionError("of the layer")
        return plain(layer, h)

    model = Model(step, in_turn)
    model.layers[1].forward = patched = lambda h: h + 1  # as accelerate's hooks do
    with pytest.raises(ZeroDivisionError, match="of the layer"):
        replay(model, data())
    assert vars(model.layers[1])["forward"] is patched
    assert not any("forward" in vars(model.layers[index]) for index in (0, 2, 3))


def test_forwards_behind_the_wanted_layer_do_not_run() -> None:
    """And the layers before it run only once per batch."""
    calls: list[int] = []

    def step(layer: Layer, h: Tensor) -> Tensor:
        calls.append(layer.index)
        return plain(layer, h)

    replay(Model(step, in_turn), data()[:1])
    assert calls == [0, 1, 2, 3]


def test_model_that_catches_every_exception() -> None:
    """A forward is aborted in spite of exception handlers."""

    def body(model: Model, h: Tensor) -> Tensor:
        for layer in model.layers:
            try:
                h = layer(h)
            except Exception:  # noqa: BLE001 - what such a model does
                caught.append(layer.index)
        return h

    caught: list[int] = []
    assert_replayed(Model(plain, body))
    assert not caught
