"""One MoE layer after another inside vLLM: statistics, masks and what they leave as it was."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from reap_driver.integrations.vllm.engine import layers, rows, self_check
from reap_kernels import LayerStats
from reap_kernels.errors import PlanError, UnsupportedModel
from reap_kernels.stats import SUMS
from tests.interop.vllm.in_process import TOKENS, Engine, running

ARCHITECTURES = ("qwen3_moe", "glm4_moe", "gpt_oss", "mixtral", "qwen2_moe", "dots1", "llama4")
# Relative, of sums over 24 tokens in float32; and in nats, of log-probabilities.
SUMS_BOUND, LOGPROBS_BOUND = 1e-5, 2e-5
# What a mask of a quarter of the experts moves the log-probabilities by, at least.
MOVED = 1e-2


@pytest.fixture(scope="module", params=ARCHITECTURES)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    with running(request.param, tmp_path_factory.mktemp(request.param)) as found:
        yield found


def difference(found: LayerStats, expected: LayerStats) -> float:
    """The greatest relative difference of a sum; counts and tokens must be equal."""
    assert torch.equal(found.count, expected.count)
    assert torch.equal(found.tokens, expected.tokens)
    assert int(found.nonfinite.sum()) == 0
    worst = 0.0
    for name in SUMS:
        mine, theirs = getattr(found, name), getattr(expected, name)
        worst = max(worst, float(((mine - theirs) / theirs.clamp(min=1e-30)).abs().max()))
    return worst


def test_every_layer_passes_its_self_check(engine: Engine) -> None:
    state = torch.random.get_rng_state()
    assert self_check.check_layers(engine.layers.values(), engine.worker.vllm_config) == {}
    assert torch.equal(torch.random.get_rng_state(), state)
    for layer in engine.layers.values():
        assert (layer.refusal, layer.mask_refusal, layer.stats, layer.masked) == (
            None,
            None,
            None,
            [],
        )
        assert layer.step is engine.step


@pytest.mark.parametrize("mode", ["shadow", "replace"])
def test_statistics_are_those_of_offline_observation(engine: Engine, mode: str) -> None:
    plain = engine.logprobs()
    assert float((plain - engine.whole).abs().max()) < LOGPROBS_BOUND
    before = [layer.calls() for layer in engine.layers.values()]
    found = engine.observe(mode)
    if mode == "shadow":
        assert torch.equal(found, plain)
    else:
        assert float((found - plain).abs().max()) < LOGPROBS_BOUND
    assert [layer.calls() for layer in engine.layers.values()] == [calls + 1 for calls in before]
    for layer, theirs in zip(engine.layers.values(), engine.stats.layers.values(), strict=True):
        assert layer.stats is not None
        assert difference(layer.stats, theirs) < SUMS_BOUND


def test_a_wrong_scale_would_be_seen(engine: Engine) -> None:
    layer = next(iter(engine.layers.values()))
    right = layer._facts["scale"]
    layer._facts["scale"] = right * 1.001
    engine.observe("shadow")
    layer._facts["scale"] = right
    assert layer.stats is not None
    assert difference(layer.stats, next(iter(engine.stats.layers.values()))) > 1e-4


def test_a_mask_is_the_pruned_checkpoint(engine: Engine) -> None:
    plain = engine.logprobs()
    biases = [layers.selection_biases(layer.runner) for layer in engine.layers.values()]
    saved = [[bias.clone() for bias in of_layer] for of_layer in biases]
    for layer, of_layer in zip(engine.layers.values(), engine.plan.layers.values(), strict=True):
        layer.set_mask(of_layer.removed)
        assert layer.masked == list(of_layer.removed)
    masked = engine.observe("replace")
    assert float((masked - engine.pruned).abs().max()) < LOGPROBS_BOUND
    assert float((masked - plain).abs().max()) > MOVED
    for layer in engine.layers.values():
        assert layer.stats is not None
        assert int(layer.stats.count[:, layer.masked].sum()) == 0
        assert int(layer.stats.count.sum()) == len(TOKENS) * layer.facts()["top_k"]
        layer.set_mask([])
    assert torch.equal(engine.logprobs(), plain)
    for now, before in zip(biases, saved, strict=True):
        assert all(map(torch.equal, now, before))


def test_a_mask_needs_no_branch_where_graphs_are_captured(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a graph replays what ran when it was captured: the same kernels with or
    without a mask, and a counter of the device.
    """
    plain = engine.logprobs()
    for layer in engine.layers.values():
        monkeypatch.setattr(layer, "_captured", True)
        monkeypatch.setattr(layer, "_always", True)
    assert torch.equal(engine.logprobs(), plain)
    assert [layer.calls() for layer in engine.layers.values()] == [1] * len(engine.layers)
    kept = [layer._removed for layer in engine.layers.values()]
    for layer, of_layer in zip(engine.layers.values(), engine.plan.layers.values(), strict=True):
        layer.set_mask(of_layer.removed)
    assert float((engine.logprobs() - engine.pruned).abs().max()) < LOGPROBS_BOUND
    for layer, buffer in zip(engine.layers.values(), kept, strict=True):
        assert layer._removed is buffer
        layer.set_mask([])
        layer._replayed.zero_()
    assert torch.equal(engine.logprobs(), plain)
    for layer in engine.layers.values():
        layer._replayed.zero_()


def test_tokens_are_counted_by_group_and_mark(engine: Engine) -> None:
    half = len(TOKENS) // 2
    engine.step.of_groups = [0] * half + [1] * half
    engine.step.marks = [True] * (len(TOKENS) - 3) + [False] * 3
    engine.observe("shadow", num_groups=2)
    split = {name: layer.stats for name, layer in engine.layers.items()}
    engine.step.of_groups = None
    engine.observe("shadow")
    engine.step.marks = None
    for name, layer in engine.layers.items():
        found, whole = split[name], layer.stats
        assert found is not None
        assert whole is not None
        assert found.tokens.tolist() == [half, half - 3]
        assert difference(found.total(), whole) < 1e-12


def test_chunks_change_nothing_but_rounding(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = engine.observe("replace")
    stats = {name: layer.stats for name, layer in engine.layers.items()}
    for layer in engine.layers.values():
        monkeypatch.setattr(layer, "_most_rows", 7)
    assert float((engine.observe("replace") - whole).abs().max()) < LOGPROBS_BOUND
    for name, layer in engine.layers.items():
        expected = stats[name]
        assert layer.stats is not None
        assert expected is not None
        assert difference(layer.stats, expected) < SUMS_BOUND


def test_a_failure_leaves_the_pass_to_vllm(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("of the test")

    plain = engine.logprobs()
    [layer, *others] = engine.layers.values()
    monkeypatch.setattr(layer, "_record", fail)
    with pytest.raises(AssertionError):
        engine.observe("replace")
    assert layer.error == f"layer {layer.name}: RuntimeError: of the test"
    assert all(other.error is None for other in others)
    assert torch.equal(engine.logprobs(), plain)
    layer.reset()
    layer.begin(1)
    assert layer.error is None


def test_masks_that_leave_too_few_are_refused(engine: Engine) -> None:
    layer = next(iter(engine.layers.values()))
    facts = layer.facts()
    for removed in ([layer.experts], [-1], [0, 0], list(range(layer.experts - facts["top_k"] + 1))):
        with pytest.raises(PlanError, match=f"layer {layer.name}: "):
            layer.set_mask(removed)
    assert layer.masked == []


def test_self_checks_see_faults(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Controls: of a kernel, of a router, of a bias that stays changed."""
    layer = next(iter(engine.layers.values()))
    config = engine.worker.vllm_config

    def failed() -> str:
        found = self_check.check_layers([layer], config)
        layer.refusal = layer.mask_refusal = None
        return " ".join(found[layer.name])

    own = layer._own_forward

    def wrong(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return own(x, *args, **kwargs) * (1.01 if len(x) > self_check.ROWS else 1)

    if layer.facts()["top_k"] > 1:
        with monkeypatch.context() as patched:
            patched.setattr(layer, "_own_forward", wrong)
            assert "another output for one expert at a time" in failed()
    with monkeypatch.context() as patched:
        patched.setattr(layer, "_own_forward", lambda *_: None)
        assert "in place of a tensor" in failed()
    with monkeypatch.context() as patched:
        patched.setattr(layer, "_record", lambda *_: None)
        assert "0 of" in failed()
    with monkeypatch.context() as patched:
        patched.setattr(rows, "lowest", lambda _: 0.0)
        assert "chooses experts" in failed()
    assert self_check.check_layers([layer], config) == {}


def test_layers_give_their_functions_back(engine: Engine) -> None:
    plain = engine.logprobs()
    for layer in engine.layers.values():
        layer.remove()
        assert layer.runner.router.select_experts == layer._own_select
        assert layer.runner.routed_experts.forward_modular == layer._own_forward
        before = layer.calls()
        assert torch.equal(engine.logprobs(), plain)
        assert layer.calls() == before
        layer.install()


def test_unobservable_layers_say_why(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = next(iter(engine.layers.values()))
    monkeypatch.setattr(layer, "refusal", "of the test")
    monkeypatch.setattr(layer, "mask_refusal", "of the test")
    with pytest.raises(UnsupportedModel, match="cannot be observed: of the test"):
        layer.begin(1)
    with pytest.raises(UnsupportedModel, match="cannot be masked: of the test"):
        layer.set_mask([0])
    layer.set_mask([])
