"""Choices of backends: kept while what they depend on stays, and made anew when it changes."""

import os

import pytest
import torch

import reap_kernels as rk
from reap_kernels import dispatch, selfcheck
from reap_kernels.dispatch import Backend, Passing, Request, Sizes, select
from reap_kernels.errors import BackendUnavailable, UsageError
from reap_kernels.tuning import Table

CPU = torch.device("cpu")
REQUEST = Request("layer", CPU, torch.float32, "silu", Sizes(8, 2, 8, 32, 16))


@pytest.fixture(autouse=True)
def own_backends(monkeypatch):
    """Backends of `layer` that a test adds go with it."""
    registry = {op: list(known) for op, known in dispatch._REGISTRY.items()}
    monkeypatch.setattr(dispatch, "_REGISTRY", registry)
    dispatch.forget()
    yield
    dispatch.forget()


def backend(name: str, *reasons: str | None) -> tuple[Backend, list[Request]]:
    """A backend of highest priority that gives these reasons in turn, and what it was asked."""
    asked: list[Request] = []

    def supports(request: Request) -> str | None:
        asked.append(request)
        return reasons[min(len(asked), len(reasons)) - 1]

    made = Backend("layer", name, lambda _: 99, supports, dispatch.always(lambda call: call))
    dispatch.register(made)
    return made, asked


def test_an_equal_request_is_chosen_for_once() -> None:
    made, asked = backend("new", None)
    assert select(REQUEST) is select(REQUEST._replace())
    assert select(REQUEST).backend is made
    assert len(asked) == 1
    select(REQUEST._replace(sizes=REQUEST.sizes._replace(tokens=9)))
    assert len(asked) == 2


def test_the_implementation_is_prepared_once() -> None:
    prepared: list[Request] = []
    run = lambda call: call  # noqa: E731

    def prepare(request: Request):
        prepared.append(request)
        return run

    dispatch.register(Backend("layer", "new", lambda _: 99, lambda _: None, prepare))
    assert select(REQUEST).run is select(REQUEST).run is run
    assert prepared == [REQUEST]


def test_registration_is_seen_at_once() -> None:
    assert select(REQUEST).name == "cpu"
    backend("new", None)
    assert select(REQUEST).name == "new"


def test_what_the_environment_asks_for_is_seen_at_once(monkeypatch) -> None:
    assert select(REQUEST).name == "cpu"
    monkeypatch.setenv("REAP_BACKEND", "reference")
    assert select(REQUEST).name == "reference"
    monkeypatch.setenv("REAP_BACKEND", "layer=cpu")
    assert select(REQUEST).name == "cpu"
    assert select(REQUEST, "reference").name == "reference"


@pytest.mark.parametrize("name", ["REAP_CUDA_HOST", "TRITON_INTERPRET"])
def test_every_condition_of_a_choice_makes_it_anew(monkeypatch, name: str) -> None:
    _, asked = backend("new", None)
    select(REQUEST)
    monkeypatch.setenv(name, "something else")
    select(REQUEST)
    assert len(asked) == 2


def test_another_launch_table_is_another_choice_and_so_is_one_written_again(
    monkeypatch, tmp_path
) -> None:
    table = tmp_path / "table.json"
    Table("interpreter", "a test", ()).save(table)
    _, asked = backend("new", None)
    select(REQUEST)
    monkeypatch.setenv("REAP_TUNING", str(table))
    select(REQUEST)
    assert len(asked) == 2
    os.utime(table, ns=(1, 1))
    select(REQUEST)
    select(REQUEST)
    assert len(asked) == 3


def test_tf32_is_another_request() -> None:
    _, asked = backend("new", None)
    select(REQUEST)
    torch.set_float32_matmul_precision("high")
    try:
        select(REQUEST)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(asked) == 2


def test_a_passing_reason_is_asked_for_again() -> None:
    backend("new", Passing("a graph is being captured"), None)
    assert select(REQUEST).name == "cpu"
    assert select(REQUEST).name == "new"


def test_a_refusal_is_asked_for_again() -> None:
    backend("new", "not today", None)
    with pytest.raises(BackendUnavailable, match="not today"):
        select(REQUEST, "new")
    assert select(REQUEST, "new").name == "new"


def test_forgotten_verdicts_forget_choices() -> None:
    _, asked = backend("new", None)
    select(REQUEST)
    selfcheck.forget()
    select(REQUEST)
    assert len(asked) == 2


def test_choices_are_bounded(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "_MOST_CHOSEN", 3)
    for tokens in range(10):
        select(REQUEST._replace(sizes=REQUEST.sizes._replace(tokens=tokens)))
    assert len(dispatch._CHOSEN) <= 3


@pytest.mark.parametrize("op", dispatch.OPS)
def test_check_backend_names_who_serves(op: str) -> None:
    assert rk.check_backend(op, "cpu", torch.float32, "reference") == "reference"
    with pytest.raises(BackendUnavailable, match="'warp' does not exist"):
        rk.check_backend(op, "cpu", torch.float32, "warp")


def test_check_backend_asks_for_experts_there_are(monkeypatch) -> None:
    """Triton's self-check builds a layer of the request's activation, so the request needs one."""
    assert rk.check_backend("layer", CPU, torch.float32, "triton") == "triton"
    with pytest.raises(BackendUnavailable, match="inputs are on meta"):
        rk.check_backend("layer", "meta", torch.float32, "triton")


def test_check_backend_refuses_what_is_no_op() -> None:
    with pytest.raises(UsageError, match="op 'attention' is not known; choose one of"):
        rk.check_backend("attention", "cpu", torch.float32)
