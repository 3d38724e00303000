"""What torch.compile knows of the hooks: a key of its caches."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm.compilation.caching import aot_compile_hash_factors
from vllm.config import VllmConfig

import reap_kernels as rk
from reap_driver.integrations.vllm.engine import compiled


def keys(config: VllmConfig) -> tuple[str, str]:
    """What compiled code is cached by: of Inductor, and ahead of time."""
    return config.compute_hash(), str(aot_compile_hash_factors(config))


def test_compiled_code_with_hooks_is_not_that_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = VllmConfig()
    without = keys(config)
    assert keys(VllmConfig()) == without
    compiled.enter_cache_key(config)
    found = keys(config)
    assert all(a != b for a, b in zip(found, without, strict=True))
    compiled.enter_cache_key(config)
    assert keys(config) == found
    changed = shutil.copytree(compiled.SOURCES, tmp_path / "engine")
    (changed / "layer.py").write_text("# another hook\n")
    other = VllmConfig()
    monkeypatch.setattr(compiled, "SOURCES", changed)
    compiled.enter_cache_key(other)
    assert all(a != b for a, b in zip(keys(other), found, strict=True))
    monkeypatch.setattr(rk, "__version__", "of the test")
    last = VllmConfig()
    compiled.enter_cache_key(last)
    assert keys(last)[0] not in (keys(other)[0], found[0], without[0])


def test_what_others_put_into_the_key_stays() -> None:
    config = VllmConfig(additional_config={"theirs": 1})
    compiled.enter_cache_key(config)
    assert config.additional_config == {"theirs": 1, **compiled.mark()}
    other = VllmConfig(additional_config={"theirs": 2})
    compiled.enter_cache_key(other)
    assert keys(other)[0] != keys(config)[0]


class Theirs:
    """A configuration of another plugin, with a hash."""

    value = 3

    def compute_hash(self) -> str:
        return "theirs"


def test_a_configuration_with_a_hash_of_its_own_is_kept() -> None:
    inner: Any = Theirs()
    config = VllmConfig(additional_config=inner)
    without = keys(config)
    compiled.enter_cache_key(config)
    found = keys(config)
    assert found[0] != without[0]
    assert config.additional_config.value == 3  # type: ignore[union-attr]
    compiled.enter_cache_key(config)
    assert keys(config) == found
