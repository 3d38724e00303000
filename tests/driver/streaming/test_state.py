"""States are taken apart and restored; placeholders stand for tensors without values."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from reap_driver.observation.batch_state import BatchState
from reap_driver.observation.layer_runner import containers
from reap_driver.observation.placeholder import Placeholder, leaves, placeholder_like
from reap_kernels.errors import UnsupportedModel


def through_json(state: BatchState) -> BatchState:
    """With its skeleton as read from a file."""
    return BatchState(state.layer, json.loads(json.dumps(state.skeleton)), state.tensors)


def test_nested_output_and_changes_come_back() -> None:
    a, b = torch.ones(2), torch.zeros(3, dtype=torch.bool)
    output = (a, [None, {"b": b, 3: (True, 2, 2.5, "x")}, []], (), {})
    state = through_json(BatchState.of(5, output, {"0/shared": [{"c": a + 1}, ["gone"]]}))
    again = state.output()
    assert again[0] is state.tensors[0]
    assert again[1][1]["b"].tolist() == b.tolist()
    assert repr(again) == repr(output)
    assert repr(state.changes()) == repr({"0/shared": [{"c": a + 1}, ["gone"]]})
    assert (state.layer, state.nbytes) == (5, 8 + 3 + 8)


def test_a_tensor_that_is_there_twice_stays_one() -> None:
    """A layer that writes to one of them changes both, wherever states are stored."""
    h = torch.ones(4)
    state = BatchState.of(0, (h, [h, h + 1]), {"1": [{"h": h}, []]}).moved(Tensor.clone)
    assert len(state.tensors) == 2
    state.output()[0].add_(1)
    assert state.changes()["1"][0]["h"].tolist() == [2, 2, 2, 2]


def test_tensors_are_cut_from_their_graph() -> None:
    weight = torch.ones(2, requires_grad=True)
    assert BatchState.of(0, weight * 2, {}).output().grad_fn is None


class Pair(NamedTuple):
    """A named tuple, which would be restored as another type."""

    left: int


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Pair(1), "Pair"),
        ({1.5: 2}, "dict"),
        (torch.float32, "dtype"),
        ({1}, "set"),
        (1j, "complex"),
    ],
)
def test_what_cannot_be_kept_is_refused(value: Any, name: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"the layer passes on a {name}, .*`stream='never'`"):
        BatchState.of(0, [(value,)], {}, "the layer")
    with pytest.raises(UnsupportedModel, match=f"a decoder layer passes on a {name}"):
        BatchState.of(0, None, {"x": value})


def test_leaves_and_containers() -> None:
    inner: list[Any] = [1, {"b": 2}]
    value = {"a": inner, "c": (3, [])}
    assert list(leaves(value)) == [1, 2, 3]
    assert [path for path, _ in containers(value, "0")] == ["0", "0/a", "0/a/1", "0/c/1"]
    assert dict(containers(value, "0"))["0/a"] is inner


def test_unknown_has_shape_strides_dtype_and_device_but_no_numbers() -> None:
    known = torch.ones(4, 3, dtype=torch.bfloat16).T
    unknown = placeholder_like({"h": (known, 3)})["h"][0]
    assert isinstance(unknown, Placeholder)
    assert placeholder_like({"h": (known, 3)})["h"][1] == 3
    assert (unknown.shape, unknown.stride(), unknown.dtype) == ((3, 4), (1, 3), torch.bfloat16)
    assert unknown.device == known.device
    for look in (Tensor.tolist, lambda u: u.sum().item(), lambda u: bool((u > 0).any())):
        with pytest.raises(UnsupportedModel, match=r"more than the next layer.*`stream='never'`"):
            look(unknown)


def test_what_is_computed_from_unknown_is_unknown() -> None:
    unknown, known = Placeholder.like(torch.ones(3, 3)), torch.ones(3, 3)
    for made in (
        known + unknown,
        torch.where(known > 0, known, unknown),
        torch.stack([known, unknown]),
        torch.einsum("ij,jk->ik", known, unknown),
        torch.nn.functional.linear(known, unknown),
        unknown.to("meta"),
        unknown[0, :1],
        known[:, unknown.long()[0]],
        unknown.chunk(3)[2],
        unknown.mT,
        unknown.data,
        unknown.topk(2).indices,
        torch.zeros_like(unknown, device="cpu"),
        torch.ops.aten.mul(known, unknown),
    ):
        assert isinstance(made, Placeholder), made
    assert known.tolist() == [[1.0] * 3] * 3


def test_unknown_may_be_written_to() -> None:
    unknown = Placeholder.like(torch.ones(3))
    unknown += torch.ones(3)
    unknown[0] = 5
    torch.add(torch.ones(3), torch.ones(3), out=unknown)
    assert isinstance(unknown, Placeholder)


def test_unknown_may_not_be_written_to_a_known_tensor() -> None:
    unknown, known = Placeholder.like(torch.ones(3)), torch.ones(3)
    writes: list[Callable[[Tensor], Any]] = [
        known.copy_,
        known.add_,
        lambda u: torch.sub(u, 1, out=known),
        lambda u: known.__setitem__(0, u[0]),
        lambda u: torch._foreach_add_([known], [u]),
    ]
    for write in writes:
        with pytest.raises(UnsupportedModel, match="writes it to another tensor"):
            write(unknown)


def test_known_tensors_may_follow_its_device_and_dtype() -> None:
    """Placeholders report the requested device; the original tensors keep their values."""
    unknown, known = Placeholder.like(torch.ones(3)), torch.ones(3)
    assert type(known.to(unknown.device)) is Tensor
    assert torch.arange(3, device=unknown.device, dtype=unknown.dtype).tolist() == [0, 1, 2]
    assert (unknown * torch.ones(3, 3)).mT.device == torch.device("cpu")
