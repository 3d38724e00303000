"""What is bound is restored, and what cannot be bound runs the model's own code, with a reason."""

import contextlib
import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reap_driver as rd
from reap_driver.model.forward import forward
from reap_kernels import tuning
from reap_kernels.errors import UnsupportedModel, UsageError
from tests.driver import zoo
from tests.driver.observation.test_offload import offload
from tests.driver.writer.saved import save

ROTATE = "apply_rotary_pos_emb"


@pytest.fixture
def world() -> tuple[Any, dict[str, Tensor]]:
    """A model, and its inputs."""
    config, model = zoo.tiny("qwen3_moe")
    return model, zoo.tiny_inputs("qwen3_moe", config)


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = forward(model, inputs, all_logits=True).logits
    return found


def modeling(model: nn.Module) -> Any:
    return sys.modules[type(model).__module__]


def state(model: nn.Module) -> list[Any]:
    """Every class and attribute of a model's modules, and the function that rotates."""
    facts = [
        (type(module), sorted(vars(module)), len(module._forward_pre_hooks))
        for module in model.modules()
    ]
    return [*facts, getattr(modeling(model), ROTATE)]


class _Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [None, _Stop, KeyboardInterrupt])
def test_the_model_is_restored(
    world: tuple[Any, dict[str, Tensor]], stop: type[BaseException] | None
) -> None:
    model, inputs = world
    before = state(model)
    with contextlib.suppress(stop or ()), rd.fused(model) as fused:
        fused(**inputs)
        assert state(model) != before
        if stop is not None:
            raise stop
    assert state(model) == before


def test_the_model_is_restored_after_a_stop_inside_a_layer(
    world: tuple[Any, dict[str, Tensor]],
) -> None:
    model, inputs = world
    before = state(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), rd.observe(model, fuse=True) as obs:
        obs(**inputs)
    handle.remove()
    assert state(model) == before


def test_a_failed_entry_restores(
    world: tuple[Any, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = world
    before = state(model)
    monkeypatch.setattr("reap_driver.fusing.fusion._branch", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError), rd.fused(model):
        pass
    assert state(model) == before


@pytest.fixture
def gradients() -> Iterator[None]:
    """Gradients as before afterwards: `no_grad` contexts that cross restore each other's."""
    with torch.enable_grad():
        yield


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("first_ends_first", [False, True])
def test_two_models_of_one_architecture(first_ends_first: bool) -> None:
    """They share the function that rotates; contexts may end in any order."""
    pairs = [zoo.tiny("qwen3_moe", seed) for seed in range(2)]
    inputs = [zoo.tiny_inputs("qwen3_moe", config) for config, _ in pairs]
    models = [model for _, model in pairs]
    own = getattr(modeling(models[0]), ROTATE)
    plain = [logits(model, given) for model, given in zip(models, inputs, strict=True)]
    contexts = [rd.fused(model) for model in models]
    for context in contexts:
        context.__enter__()
    order = contexts if first_ends_first else contexts[::-1]
    for model, given, expected in zip(models, inputs, plain, strict=True):
        torch.testing.assert_close(logits(model, given), expected)
    assert all(context.counts["norm_rotary"] == 4 for context in contexts)
    order[0].__exit__(None, None, None)
    assert getattr(modeling(models[0]), ROTATE) is not own
    order[1].__exit__(None, None, None)
    assert getattr(modeling(models[0]), ROTATE) is own


def test_nested_contexts_of_one_model(world: tuple[Any, dict[str, Tensor]]) -> None:
    """The inner one leaves what the outer one has bound, and says so."""
    model, inputs = world
    before = state(model)
    with rd.fused(model) as outer:
        with rd.fused(model) as inner:
            inner(**inputs)
        reasons = {name: reason for name, reason in inner.left.items() if "norm" in name}
        assert len(reasons) == 9
        assert all("another context" in reason for reason in reasons.values())
        outer(**inputs)
        assert outer.counts["norm_rotary"] == 4
    assert state(model) == before


def test_a_context_is_entered_once_at_a_time(world: tuple[Any, dict[str, Tensor]]) -> None:
    model, _ = world
    fused = rd.fused(model)
    with fused, pytest.raises(UsageError, match="entered already"):
        fused.__enter__()
    with fused:
        assert fused.active


def test_a_model_in_training_mode_is_refused(world: tuple[Any, dict[str, Tensor]]) -> None:
    model, _ = world
    with pytest.raises(UnsupportedModel, match="training mode"), rd.fused(model.train()):
        pass


def test_gradients_run_the_models_own_code(world: tuple[Any, dict[str, Tensor]]) -> None:
    model, inputs = world
    with rd.fused(model) as fused, torch.enable_grad():
        loss = model(**inputs, use_cache=False).logits.square().mean()
        loss.backward()
    assert fused.counts["norm_rotary"] == 0
    assert model.model.norm.weight.grad is not None


def test_hooks_leave_a_module_alone(world: tuple[Any, dict[str, Tensor]]) -> None:
    """A hook would see another value than the model computes, or none."""
    model, inputs = world
    seen = []
    handle = model.model.layers[0].input_layernorm.register_forward_hook(
        lambda *given: seen.append(given[-1])
    )
    model.model.layers[1].self_attn.register_forward_hook(lambda *given: seen.append(given[-1]))
    with rd.fused(model) as fused:
        fused(**inputs)
    handle.remove()
    assert fused.left.keys() == {"model.layers.0.input_layernorm", "model.layers.1"}
    assert all("has hooks" in reason for reason in fused.left.values())
    assert type(seen[0]) is Tensor
    assert type(seen[1][0]) is Tensor


def test_offloaded_modules_are_left_alone(world: tuple[Any, dict[str, Tensor]]) -> None:
    """accelerate replaces their forwards by ones that load the weights."""
    model, inputs = world
    plain = logits(model, inputs)
    for module in model.modules():
        if not module._modules and "Norm" in type(module).__name__:
            offload(module)
    with rd.fused(model) as fused:
        torch.testing.assert_close(logits(model, inputs), plain)
    assert fused.counts["norm"] + fused.counts["norm_rotary"] == 0
    assert sum("another library" in reason for reason in fused.left.values()) == 9


def test_a_copy_runs_with_its_own_weights(world: tuple[Any, dict[str, Tensor]]) -> None:
    """As `DataParallel` copies modules: the copy's norm has the copy's weight."""
    model, _ = world
    x = torch.randn(2, 32)
    with rd.fused(model):
        replica = model.model.norm._replicate_for_data_parallel()
        replica.weight = torch.zeros(32)  # as torch's `replicate` does
        assert not replica(x).any()
        assert model.model.norm(x).any()


def test_inference_mode_defers_nothing(world: tuple[Any, dict[str, Tensor]]) -> None:
    """Its tensors do not count changes in place, so a late sum could be of other values."""
    model, inputs = world
    plain = logits(model, inputs)
    with rd.fused(model) as fused, torch.inference_mode():
        torch.testing.assert_close(logits(model, inputs), plain)
    counts = fused.counts
    assert (counts["norm"], counts["residual_norm"], counts["norm_rotary"]) == (9, 0, 0)


def test_a_model_in_float64_computes_its_own(world: tuple[Any, dict[str, Tensor]]) -> None:
    """The kernels do not have it."""
    model, inputs = world
    plain = logits(model.double(), inputs)
    with rd.fused(model) as fused:
        assert torch.equal(logits(model, inputs), plain)
    assert not any(fused.counts[kind] for kind in ("norm", "norm_rotary", "rotary"))
    assert all("float64" in reason for reason in fused.left.values())


def test_a_norm_that_gets_float64_computes_its_own(world: tuple[Any, dict[str, Tensor]]) -> None:
    model, _ = world
    x = torch.ones(3, 32, dtype=torch.float64)
    own = model.model.norm(x)
    with rd.fused(model):
        assert torch.equal(model.model.norm(x), own)


def test_a_norm_without_values_computes_its_own(world: tuple[Any, dict[str, Tensor]]) -> None:
    """On the meta device there is nothing to compare."""
    model, _ = world
    with rd.fused(model.to("meta")):
        found = model.model.norm(torch.empty(3, 32, device="meta"))
    assert found.is_meta


def test_a_first_call_that_is_not_finite_is_said(world: tuple[Any, dict[str, Tensor]]) -> None:
    model, inputs = world
    with torch.no_grad():
        model.model.layers[1].self_attn.q_norm.weight[0] = torch.nan
    plain = logits(model, inputs)
    with rd.fused(model) as fused:
        assert torch.equal(logits(model, inputs).isnan(), plain.isnan())
    assert "returned NaN or Inf" in fused.left["model.layers.1.self_attn.q_norm"]


def test_a_wrapped_model(world: tuple[Any, dict[str, Tensor]]) -> None:
    model, inputs = world
    with rd.fused(nn.DataParallel(model)) as fused:
        fused(**inputs)
    assert fused.counts["norm_rotary"] == 4


def test_a_compiled_model_computes_its_own(world: tuple[Any, dict[str, Tensor]]) -> None:
    """While torch.compile traces, the model's own code runs."""
    model, inputs = world
    plain = logits(model, inputs)
    compiled = torch.compile(model.model.norm, backend="eager")
    x = torch.randn(3, 32)
    own = model.model.norm(x)
    with rd.fused(model) as fused:
        assert torch.equal(compiled(x), own)
        torch.testing.assert_close(logits(model, inputs), plain)
    assert fused.counts["norm"] == 3
    assert torch.equal(compiled(x), own)


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Any, list[dict[str, Tensor]]]:
    """A checkpoint, its model, and batches."""
    save("qwen3_moe", tmp_path / "model")
    model = rd.load_model(tmp_path / "model")
    batches = [zoo.tiny_inputs("qwen3_moe", model.config, seed=seed) for seed in range(2)]
    return tmp_path / "model", model, batches


def test_streaming_has_the_bits_of_a_resident_model(
    checkpoint: tuple[Path, Any, list[dict[str, Tensor]]],
) -> None:
    folder, model, batches = checkpoint
    with rd.observe(model, fuse=True) as obs:
        for batch in batches:
            obs(**batch)
    resident = obs.stats
    streamed = rd.observe_streamed(folder, batches, fuse=True)
    assert streamed.provenance["fused"] == resident.provenance["fused"]
    for layer, stats in resident.layers.items():
        assert torch.equal(stats.sums, streamed.layers[layer].sums)


def test_the_launch_table_decides(
    world: tuple[Any, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is bound on CPUs, and on a GPU what the table has."""
    model, inputs = world
    with rd.observe(model) as obs:
        obs(**inputs)
    assert not obs.fused.active
    gpu = torch.device("cuda")
    monkeypatch.setattr("reap_driver.fusing.fusion.input_device", lambda _: gpu)
    asked = []

    def choose(where: torch.device, op: str, dtype: torch.dtype, width: int, rows: int) -> str:
        asked.append((where, op, dtype, width, rows))
        return "triton" if op == "norm" else "model"

    monkeypatch.setattr(tuning, "choose_backend", choose)
    fused = rd.observe(model).fused
    with contextlib.ExitStack() as stack:
        fused.bind(stack)
        assert fused.counts == {
            "norm": 9,
            "residual_norm": 0,
            "norm_rotary": 0,
            "rotary": 0,
            "left": 0,
        }
    expected = [(gpu, op, torch.float32, 32, 16_384) for op in ("norm", "rotary")]
    assert asked == expected


def _pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled])
def test_a_copy_made_inside_runs_the_models_own_code(
    world: tuple[Any, dict[str, Tensor]], copied: Callable[[nn.Module], Any]
) -> None:
    model, inputs = world
    plain = logits(model, inputs)
    classes = [type(module) for module in model.modules()]
    with rd.fused(model):
        twin = copied(model)
    assert [type(module) for module in twin.modules()] == classes
    assert torch.equal(logits(twin, inputs), plain)


def test_a_child_that_layers_share_is_bound_once(world: tuple[Any, dict[str, Tensor]]) -> None:
    model, inputs = world
    first, second = model.model.layers
    second.self_attn = first.self_attn
    plain, before = logits(model, inputs), state(model)
    with rd.fused(model) as fused:
        torch.testing.assert_close(logits(model, inputs), plain)
    assert fused.left == {}
    assert (fused.counts["residual_norm"], fused.counts["norm_rotary"]) == (2, 2)
    assert state(model) == before


def test_a_function_imported_inside_runs_the_models_own_code_afterwards(
    world: tuple[Any, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another Python module then holds the replacement for good; it can be bound again."""
    model, inputs = world
    with rd.fused(model) as first:
        first(**inputs)
        kept = getattr(modeling(model), ROTATE)
    monkeypatch.setattr(modeling(model), ROTATE, kept)
    calls = kept.calls
    assert calls
    logits(model, inputs)
    assert kept.calls == calls
    with rd.fused(model) as second:
        second(**inputs)
    assert second.counts["norm_rotary"] == 4
    assert kept.calls == calls


def test_a_function_bound_for_another_backend_is_left(
    world: tuple[Any, dict[str, Tensor]],
) -> None:
    """An explicit backend never runs another."""
    model, _ = world
    _, other = zoo.tiny("qwen3_moe", 1)
    with rd.fused(model, backend="cpu"), rd.fused(other, backend="reference") as fused:
        assert fused.counts["rotary"] == 0
    assert list(fused.left) == [f"modeling_qwen3_moe.{ROTATE}"]
    assert "bound with backend='cpu'" in fused.left[f"modeling_qwen3_moe.{ROTATE}"]


def test_made_inputs_run_on_the_cpu_whatever_backend_is_asked_for(
    world: tuple[Any, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`REAP_BACKEND=triton` on a GPU is for its tensors."""
    model, _ = world
    monkeypatch.setenv("REAP_BACKEND", "rms_norm=triton,rotary=triton")
    with rd.fused(model) as fused:
        assert (fused.counts["norm"], fused.counts["rotary"]) == (9, 1)
    assert fused.left == {}


def test_a_call_outside_the_block_is_refused(world: tuple[Any, dict[str, Tensor]]) -> None:
    model, inputs = world
    with pytest.raises(UsageError, match="outside its `with` block"):
        rd.fused(model)(**inputs)


@pytest.mark.parametrize("outer", ["fused", "observe"])
def test_an_observed_model_is_fused_by_its_observer_alone(
    world: tuple[Any, dict[str, Tensor]], outer: str
) -> None:
    """Statistics would not record another context, or would say that there is none."""
    model, inputs = world
    contexts: list[Any] = [rd.fused(model), rd.observe(model, fuse=False)]
    obs = contexts[1]
    with contextlib.ExitStack() as stack:
        for context in contexts if outer == "fused" else contexts[::-1]:
            stack.enter_context(context)
        with pytest.raises(UsageError, match=r"inside rd\.fused\(\) too"):
            obs(**inputs)
    assert not any(int(layer.tokens.sum()) for layer in obs.stats.layers.values())
    with obs:
        obs(**inputs)
    assert "fused" not in obs.stats.provenance


def test_a_width_that_the_configuration_does_not_name(
    world: tuple[Any, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is that of the embeddings."""
    model, _ = world
    width = model.config.hidden_size
    monkeypatch.setattr(model.config, "get_text_config", lambda *_: object())
    assert rd.fused(model)._hidden == width


def test_attention_compiles_as_one_graph(world: tuple[Any, dict[str, Tensor]]) -> None:
    """What stands in the place of its norms and rotation breaks no graph."""
    model, _ = world
    x = torch.randn(1, 5, 32)
    angles = model.model.rotary_emb(x, torch.arange(5)[None])
    attention = model.model.layers[0].self_attn
    with torch.no_grad(), rd.fused(model):
        compiled = torch.compile(attention, backend="eager", fullgraph=True)
        found = compiled(x, position_embeddings=angles, attention_mask=None)[0]
    with torch.no_grad():
        own = attention(x, position_embeddings=angles, attention_mask=None)[0]
    assert torch.equal(found, own)
