"""Observing restores the model: after success, an exception, Ctrl-C, a failed entry."""

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

from reap_driver.compat.experts_interface import IMPLEMENTATION
from reap_driver.observation.observer import observe
from reap_kernels.errors import UnsupportedModel
from tests.driver import zoo

# One of each way of binding: interface, interface with nested configs, look-alike, router and
# experts, experts of batched hidden states.
NAMES = ["qwen3_moe", "qwen3_5_moe_vl", "step3p7", "llama4", "dbrx"]


def _state(model: nn.Module) -> dict[str, Any]:
    """Everything that observation changes: attributes, hooks, configs."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in vars(module).items()
            if key not in ("_parameters", "_buffers", "_modules")
        }
        config = vars(module).get("config")
        if config is not None:
            found[f"{name}.config"] = dict(vars(config))
    return found


def _assert_state_equal(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, attributes in before.items():
        assert attributes.keys() == after[name].keys(), name
        for key, value in attributes.items():
            same = value is after[name][key] or repr(value) == repr(after[name][key])
            assert same, f"{name}.{key}"


class _Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [None, _Stop, KeyboardInterrupt])
@pytest.mark.parametrize("name", NAMES)
def test_model_is_restored(name: str, stop: type[BaseException] | None) -> None:
    """Attributes, hooks and configs as before, and a bit-equal forward."""
    config, model = zoo.tiny(name)
    inputs = zoo.tiny_inputs(name, config)
    with torch.no_grad():
        before = model(**inputs, use_cache=False).logits
    state = _state(model)
    with contextlib.suppress(stop or ()), observe(model) as obs:
        obs(**inputs)
        if stop is not None:
            raise stop
    _assert_state_equal(state, _state(model))
    with torch.no_grad():
        assert torch.equal(before, model(**inputs, use_cache=False).logits)


@pytest.mark.parametrize("name", NAMES)
def test_model_is_restored_after_stop_inside_a_layer(name: str) -> None:
    """Ctrl-C in the middle of a forward, inside our function."""
    config, model = zoo.tiny(name)
    inputs = zoo.tiny_inputs(name, config)
    state = _state(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    obs = observe(model)
    handle = obs.layers[-1].module.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), obs:
        obs(**inputs)
    handle.remove()
    _assert_state_equal(state, _state(model))


def test_statistics_survive_an_exception() -> None:
    """What was observed before an interruption can be read after it."""
    config, model = zoo.tiny("qwen3_moe")
    with contextlib.suppress(KeyboardInterrupt), observe(model) as obs:
        obs(**zoo.tiny_inputs("qwen3_moe", config))
        raise KeyboardInterrupt
    assert all(int(layer.tokens.sum()) == 24 for layer in obs.stats.layers.values())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_implementation_is_put_back(implementation: str) -> None:
    """The model runs with the same experts implementation as before."""
    config, model = zoo.tiny("qwen3_moe")
    model.set_experts_implementation(implementation)
    with observe(model) as obs:
        assert model.config._experts_implementation == IMPLEMENTATION
        obs(**zoo.tiny_inputs("qwen3_moe", config))
    assert model.config._experts_implementation == implementation


@pytest.mark.parametrize("name", NAMES)
def test_nested_observation_is_refused(name: str) -> None:
    """A second observer would take tokens from the first; it is refused, the first continues."""
    config, model = zoo.tiny(name)
    inputs = zoo.tiny_inputs(name, config)
    state = _state(model)
    with observe(model) as outer:
        with pytest.raises(UnsupportedModel, match="being observed already"), observe(model):
            pass
        outer(**inputs)
    assert all(int(layer.tokens.sum()) == 24 for layer in outer.stats.layers.values())
    _assert_state_equal(state, _state(model))


def test_observer_can_be_entered_again() -> None:
    """Statistics continue to accumulate in a second context."""
    config, model = zoo.tiny("mixtral")
    inputs = zoo.tiny_inputs("mixtral", config)
    obs = observe(model)
    for _ in range(2):
        with obs:
            obs(**inputs)
    assert all(int(layer.tokens.sum()) == 48 for layer in obs.stats.layers.values())


def test_models_sharing_a_config_do_not_share_statistics() -> None:
    """Another model of the same config object runs as it should, uncounted."""
    config, model = zoo.tiny("qwen3_moe")
    other = type(model)(config).eval()
    inputs = zoo.tiny_inputs("qwen3_moe", config)
    with torch.no_grad():
        plain = other(**inputs).logits
        with observe(model) as obs:
            assert torch.equal(plain, other(**inputs).logits)
            obs(**inputs)
    assert all(int(layer.tokens.sum()) == 24 for layer in obs.stats.layers.values())
