"""Choices of backends: kept while what they depend on stays, and made anew when it changes."""

import os

import pytest
import torch

import reap_kernels as rk
from reap_kernels import dispatch, selfcheck
from reap_kernels.dispatch import Backend, Passing, Request, Sizes, select
from reap_kernels.errors import BackendUnavailable, DtypeError, ShapeError, UsageError
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
    dtype = {"sort": torch.int64, "dequant": torch.bfloat16}.get(op, torch.float32)
    assert rk.check_backend(op, "cpu", dtype, "reference") == "reference"
    with pytest.raises(BackendUnavailable, match="'warp' does not exist"):
        rk.check_backend(op, "cpu", dtype, "warp")


def test_check_backend_asks_for_experts_there_are(monkeypatch) -> None:
    """Triton's self-check builds a layer of the request's activation, so the request needs one."""
    assert rk.check_backend("layer", CPU, torch.float32, "triton") == "triton"
    with pytest.raises(BackendUnavailable, match="inputs are on meta"):
        rk.check_backend("layer", "meta", torch.float32, "triton")


@pytest.mark.parametrize("op", dispatch.OPS)
def test_check_backend_asks_for_the_call_that_is_described(op: str) -> None:
    asked: list[Request] = []

    def supports(request: Request) -> str:
        asked.append(request)
        return "seen"

    dispatch.register(Backend(op, "new", lambda _: 99, supports, dispatch.always(print)))
    sizes = rk.Sizes(tokens=3, top_k=2, experts=5, hidden=7, intermediate=11)
    dtype = torch.int32 if op == "sort" else torch.bfloat16
    described = {"sizes": sizes, "activation": "relu2", "biased": True, "gram": True}
    rk.check_backend(op, "cpu", dtype, quantized="mxfp4", **described)
    activation = "relu2" if op in ("experts", "layer", "cross") else ""
    call = Request(op, CPU, dtype, activation, sizes, "quantized", biased=True, gram=True)
    assert asked == [call]


def test_check_backend_gives_the_reasons_that_explain_gives(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # without its self-check, which takes seconds
    monkeypatch.delenv("REAP_CUDA_HOST", raising=False)
    reasons = {}
    for name in dispatch.backends("layer"):
        try:
            rk.check_backend("layer", CPU, torch.float32, name, layout="table", biased=True)
        except BackendUnavailable as error:
            reasons[name] = str(error)
    told = rk.explain(CPU, torch.float32, layout="table", biased=True)
    refused = {v.backend: v.reason for v in told if v.op == "layer" and v.backend in reasons}
    assert set(reasons) == {"triton", "grouped_mm", "cuda", "wgmma"}
    for name, text in reasons.items():
        assert refused[name] in text


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (UsageError, "op 'attention' is not known; choose one of sort", {"op": "attention"}),
        (UsageError, "device 'gpu' is not known", {"device": "gpu"}),
        (UsageError, "activation 'swish' is not known", {"activation": "swish"}),
        (UsageError, "layout 'flat' is not known", {"layout": "flat"}),
        (DtypeError, "op 'layer' takes .*, not torch.int8", {"dtype": torch.int8}),
        (DtypeError, "op 'sort' takes torch.int64, .*, not torch.float32", {"op": "sort"}),
        *(
            (
                DtypeError,
                f"op '{op}' takes .*, not torch.float64",
                {"op": op, "dtype": torch.double},
            )
            for op in ("compare", "norm", "rotary")
        ),
        (DtypeError, "in mxfp4 takes torch.bfloat16, not torch.float32", {"quantized": "mxfp4"}),
        (DtypeError, "'nvfp4' is no format that is read; give one of", {"quantized": "nvfp4"}),
        (ShapeError, "top_k up to experts", {"sizes": Sizes(top_k=9, experts=8)}),
        (ShapeError, "sizes above 0", {"sizes": Sizes(hidden=0)}),
        (BackendUnavailable, "device 'cuda:99' is not here: torch finds", {"device": "cuda:99"}),
    ],
)
def test_check_backend_refuses_what_no_call_can_be(error, words, change) -> None:
    call = {"op": "layer", "device": "cpu", "dtype": torch.float32, **change}
    with pytest.raises(error, match=words):
        rk.check_backend(**call)
