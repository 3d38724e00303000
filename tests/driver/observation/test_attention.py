"""cuDNN's attention is tried first while observed forwards run, and never afterwards."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

import reap_driver as rd
from reap_driver.model import attention
from reap_kernels.errors import BackendUnavailable, UnsupportedModel, UsageError
from tests.driver import zoo

CUDNN = int(SDPBackend.CUDNN_ATTENTION)
Switches = tuple[list[int], list[bool]]


def switches() -> Switches:
    """The order of torch's attention kernels, and which are on."""
    names = ("cudnn", "flash", "mem_efficient", "math")
    on = [getattr(torch._C, f"_get_{name}_sdp_enabled")() for name in names]
    return torch._C._get_sdp_priority_order(), on


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any device counts as one with cuDNN's attention; the CPU's kernels ignore the order."""
    monkeypatch.setattr(attention, "has_cudnn", lambda _: True)


def sdpa(name: str = "qwen3_moe") -> tuple[PreTrainedModel, dict[str, Tensor], list[Switches]]:
    """A model that computes attention by torch's function, a batch, and what each layer's attention
    has found set.
    """
    config, model = zoo.tiny(name)
    model.set_attn_implementation("sdpa")
    seen: list[Switches] = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: seen.append(switches()))
    return model, zoo.tiny_inputs(name, config), seen


@pytest.mark.usefixtures("hopper")
def test_cudnn_comes_first_inside_and_the_others_follow_in_their_order() -> None:
    model, batch, seen = sdpa()
    before = switches()
    with rd.observe(model) as obs:
        plain = obs(**batch).logits
    with rd.observe(model, attention="cudnn") as obs:
        assert switches() == before  # outside of its forwards
        assert torch.equal(obs(**batch).logits, plain)
        assert switches() == before
    order, on = before
    assert seen == [before, ([CUDNN, *(one for one in order if one != CUDNN)], on)]
    assert obs.stats.provenance["attention"] == "cudnn"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_order_is_restored_after_an_error(error: type[BaseException]) -> None:
    model, batch, _ = sdpa()
    before = switches()

    def fail(*_: Any) -> None:
        raise error("on purpose")

    model.model.layers[1].register_forward_pre_hook(fail)
    with rd.observe(model, attention="cudnn") as obs:
        with pytest.raises(error):
            obs(**batch)
        assert switches() == before


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("place", ["around", "inside"])
@pytest.mark.parametrize(
    "own",
    [
        lambda: sdpa_kernel(SDPBackend.MATH),
        lambda: sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]),
        lambda: sdpa_kernel(list(SDPBackend.__members__.values())[1:], set_priority=True),
        lambda: sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True),
    ],
    ids=["one", "some", "order", "some in order"],
)
def test_a_callers_own_choice_holds(own: Any, place: str) -> None:
    model, batch, seen = sdpa()
    before = switches()
    with contextlib.ExitStack() as stack:
        if place == "around":
            stack.enter_context(own())
        obs = stack.enter_context(rd.observe(model, attention="cudnn"))
        with own() if place == "inside" else contextlib.nullcontext():
            wanted = switches()
            obs(**batch)
            assert switches() == wanted
    assert wanted != before
    assert seen == [wanted]
    assert switches() == before
    assert "attention" not in obs.stats.provenance


@pytest.mark.usefixtures("hopper")
def test_the_launch_table_decides_without_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line that ships is off; a file without `off` turns it on for the tokens it names."""
    monkeypatch.setattr("reap_kernels.device.architecture", lambda _: "sm90")
    model, batch, seen = sdpa()
    before = switches()
    with rd.observe(model) as obs:
        obs(**batch)
    assert seen == [before]
    line = {"op": "attention", "dtype": "float32", "width": None, "rows": 20, "backend": "cudnn"}
    facts = {"format": "reap-launch-table", "version": 1, "arch": "sm90", "origin": "a test"}
    (tmp_path / "table.json").write_text(json.dumps({**facts, "entries": [line]}))
    monkeypatch.setenv("REAP_TUNING", str(tmp_path / "table.json"))
    with rd.observe(model) as obs:
        obs(**batch)  # 24 tokens
        obs(input_ids=batch["input_ids"][:1])  # 12
    with rd.observe(model, attention="model") as plain:
        plain(input_ids=batch["input_ids"][:1])
    assert [order[0] == CUDNN for order, _ in seen[1:]] == [False, True, False]
    assert obs.stats.provenance["attention"] == "cudnn"
    assert "attention" not in plain.stats.provenance


@pytest.mark.usefixtures("hopper")
def test_a_streamed_layer_is_left_with_the_order_restored(tmp_path: Path) -> None:
    """Its forward is aborted after the layer."""
    model, batch, _ = sdpa()
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(tmp_path)
    before = switches()
    stats = rd.observe_streamed(tmp_path, [batch, batch], attention="cudnn")
    assert switches() == before
    assert stats.provenance["attention"] == "cudnn"


def test_requests_that_cannot_be_served_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, seen = sdpa()
    with pytest.raises(BackendUnavailable, match=r"compute capability 9\.0 .* is on cpu"):
        rd.observe(model, attention="cudnn")
    with pytest.raises(UsageError, match="attention is 'flash'"):
        rd.observe(model, attention="flash")  # type: ignore[arg-type]
    monkeypatch.setattr(attention, "has_cudnn", lambda _: True)
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModel, match="computes its attention by 'eager'"):
        rd.observe(model, attention="cudnn")
    with rd.observe(model) as obs:
        obs(**batch)
    assert seen == [switches()]
